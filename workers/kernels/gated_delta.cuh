// The gated delta rule, token after token, with the state in registers.
//
// Per value head: S <- g S, d = beta (v - S k), S <- S + d k^T, y = S q, S being (Dv, Dk). A row of S needs nothing of
// another row, so each group of LANES lanes holds ROWS of them, DK / LANES columns a lane, and walks the tokens alone.
// S k, S q and k q are summed over the lanes at once, of the state before the token: y = g S q + d (k q).

#ifndef TANDEM_GATED_DELTA
#define TANDEM_GATED_DELTA
namespace tandem_delta {

using tandem_numbers::from_float;
using tandem_numbers::to_float;

constexpr int LANES = 8;  // that share a row of the state

__device__ inline float sum_of_lanes(float x) {
#pragma unroll
  for (int i = LANES / 2; i > 0; i /= 2) x += __shfl_xor_sync(0xffffffffu, x, i);
  return x;
}

// N values from x on, LANES apart, as floats.
template <int N, typename T>
__device__ inline void read(const T* x, float* to) {
#pragma unroll
  for (int i = 0; i < N; ++i) to[i] = to_float(x[i * LANES]);
}

// q, k: (B, L, Hk, DK); v, y: (B, L, Hv, Dv); g: (B, L, Hv), with VECTOR (B, L, Hv, DK); beta: (B, L, Hv);
// state, after: (B, Hv, Dv, DK); is_real: (B, L) or, unless MASKED, anything. Grid: x covers Dv, y is B * Hv.
template <typename T, typename TG, typename TB, int DK, int ROWS, bool VECTOR, bool MASKED>
__device__ void run(const T* q, const T* k, const T* v, const TG* g, const TB* beta, const float* state,
                    const bool* is_real, int L, int Hk, int Hv, int Dv, T* y, float* after) {
  constexpr int N = DK / LANES;
  const int group = (blockIdx.x * blockDim.x + threadIdx.x) / LANES, lane = threadIdx.x % LANES;
  const int row = group * ROWS;
  const int b = blockIdx.y / Hv, h = blockIdx.y % Hv;
  const bool has_rows = row < Dv;  // lanes without any go along, since sums need whole warps
  const int at_row = has_rows ? row : 0;

  float s[ROWS][N];
#pragma unroll
  for (int r = 0; r < ROWS; ++r) read<N>(state + (long(blockIdx.y) * Dv + at_row + r) * DK + lane, s[r]);

  q += (long(b) * L * Hk + h / (Hv / Hk)) * DK + lane;
  k += (long(b) * L * Hk + h / (Hv / Hk)) * DK + lane;
  v += (long(b) * L * Hv + h) * Dv + at_row;
  y += (long(b) * L * Hv + h) * Dv + at_row;
  g += (long(b) * L * Hv + h) * (VECTOR ? DK : 1) + (VECTOR ? lane : 0);
  beta += long(b) * L * Hv + h;
  is_real += MASKED ? long(b) * L : 0;

  float qs[N], ks[N], gs[VECTOR ? N : 1], vs[ROWS], bs = 0.f;
  auto fetch = [&](long t) {  // a token ahead, so that nobody waits for memory
    read<N>(q + t * Hk * DK, qs);
    read<N>(k + t * Hk * DK, ks);
    read<VECTOR ? N : 1>(g + t * Hv * (VECTOR ? DK : 1), gs);
#pragma unroll
    for (int r = 0; r < ROWS; ++r) vs[r] = to_float(v[t * Hv * Dv + r]);
    bs = to_float(beta[t * Hv]);
  };
  fetch(0);
  for (int t = 0; t < L; ++t) {
    float qt[N], kt[N], gt[VECTOR ? N : 1], vt[ROWS];
    const float bt = bs;
#pragma unroll
    for (int i = 0; i < N; ++i) qt[i] = qs[i], kt[i] = ks[i];
#pragma unroll
    for (int i = 0; i < (VECTOR ? N : 1); ++i) gt[i] = gs[i];
#pragma unroll
    for (int r = 0; r < ROWS; ++r) vt[r] = vs[r];
    if (t + 1 < L) fetch(t + 1);
    if (MASKED && !is_real[t]) {  // the same for all lanes
#pragma unroll
      for (int r = 0; r < ROWS; ++r)
        if (has_rows && lane == 0) y[long(t) * Hv * Dv + r] = from_float<T>(0.f);
      continue;
    }
    float kq = 0.f, sk[ROWS], sq[ROWS];
#pragma unroll
    for (int i = 0; i < N; ++i) kq += kt[i] * qt[i];
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
      sk[r] = sq[r] = 0.f;
#pragma unroll
      for (int i = 0; i < N; ++i) {
        s[r][i] *= gt[VECTOR ? i : 0];
        sk[r] += s[r][i] * kt[i];
        sq[r] += s[r][i] * qt[i];
      }
    }
    kq = sum_of_lanes(kq);
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
      sk[r] = sum_of_lanes(sk[r]);
      sq[r] = sum_of_lanes(sq[r]);
      const float d = (vt[r] - sk[r]) * bt;
#pragma unroll
      for (int i = 0; i < N; ++i) s[r][i] += d * kt[i];
      if (has_rows && lane == 0) y[long(t) * Hv * Dv + r] = from_float<T>(sq[r] + d * kq);
    }
  }
  if (!has_rows) return;
#pragma unroll
  for (int r = 0; r < ROWS; ++r)
#pragma unroll
    for (int i = 0; i < N; ++i) after[(long(blockIdx.y) * Dv + row + r) * DK + lane + i * LANES] = s[r][i];
}

}  // namespace tandem_delta
#endif
