// Decode and verify attention over paged keys and values, with the rotation of q and k and the write of the new rows.
//
// One launch per layer: a thread block takes one sequence, one key-value head and one part of the key axis. It stages
// the queries of all heads of the group and all verify rows (M = G * R of them) as the rows of one matrix, so that each
// key is read once for all. Warps walk tiles of 16 keys straight from global memory into tensor-core fragments: the
// contraction index and the output column may be permuted freely, so a lane takes 16 contiguous bytes of a row and no
// tile passes through shared memory. The new rows come from k and v, never from the pool, so that blocks need not wait
// for each other's writes. SHARED: a layer before wrote the new rows, all come from the pool and nothing is written; a
// launch then waits for that layer's (`Pool.last`). 32-bit floats have no such fragments and take plain dot products.
//
// Positions: sequence b holds positions 0 .. start-1 in the pool, its new rows are start .. start+R-1. Position p lies
// in block table[b][(p / S) % W] at p % S: a paged sequence has W blocks, a slot of capacity S one, where p wraps (ring).

#ifndef TANDEM_ATTENTION
#define TANDEM_ATTENTION
namespace tandem {
using mlx::core::cu::Strides;

#define NOTHING __int_as_float(0xff800000)  // -infinity: the maximum of no scores

struct Params {  // see `params_of` in workers/kernels/params.py
  float scale, cap;
  int window, S, W, has_sinks;
  float eps;
  int R, M;  // query rows a sequence; query vectors of a key-value head
};

__device__ inline Params read_params(const int* p, int R, int G) {
  return {__int_as_float(p[0]), __int_as_float(p[1]), p[2], p[3], p[4], p[5], __int_as_float(p[6]), R, R * G};
}

__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(__half x) { return __half2float(x); }
__device__ inline float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
template <typename T> __device__ inline T from_float(float x);
template <> __device__ inline float from_float<float>(float x) { return x; }
template <> __device__ inline __half from_float<__half>(float x) { return __float2half_rn(x); }
template <> __device__ inline __nv_bfloat16 from_float<__nv_bfloat16>(float x) { return __float2bfloat16_rn(x); }

__device__ inline unsigned pack(float a, float b, __half) {
  __half2 v = __floats2half2_rn(a, b);
  return *reinterpret_cast<unsigned*>(&v);
}
__device__ inline unsigned pack(float a, float b, __nv_bfloat16) {
  __nv_bfloat162 v = __floats2bfloat162_rn(a, b);
  return *reinterpret_cast<unsigned*>(&v);
}

__device__ inline void mma(float* d, const unsigned* a, unsigned b0, unsigned b1, __half) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
__device__ inline void mma(float* d, const unsigned* a, unsigned b0, unsigned b1, __nv_bfloat16) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Offset of a position's row in the pool, in rows of D. SHIFT > 0: blocks of 1 << SHIFT positions; 0: one ring of S.
template <int SHIFT>
__device__ inline long row_of(int p, const int* table, const Params& a, int heads, int h) {
  if constexpr (SHIFT == 0) {
    return (long(table[0]) * heads + h) * a.S + (p < a.S ? p : p % a.S);
  } else {
    int i = p >> SHIFT;
    return ((long(table[i < a.W ? i : i % a.W]) * heads + h) << SHIFT) + (p & ((1 << SHIFT) - 1));
  }
}

constexpr int COUNTERS = 1024;  // at the head of `scratch`, see `Attend::join`

// MT: tiles of 16 queries that share each key's read. NEW: most new rows. NORM: queries and keys are RMS-normed first.
template <typename T, int D, int G, int MT, int NEW, int ROPE, int SHIFT, int NW, bool SHARED, bool NORM>
struct Attend {
  static constexpr bool MMA = sizeof(T) == 2;
  static constexpr int ROWS = 16 * MT;
  static constexpr int CH = (D + 31) / 32, VC = (D + 63) / 64;
  static constexpr int PAD = D + 16 / sizeof(T);  // rows of shared memory start at different banks
  static constexpr int NO = MMA ? VC * 32 : (D + 31) / 32 * 16;  // accumulators of 16 queries, per lane
  static constexpr bool Q_IN_REGISTERS = MMA && MT == 1 && D <= 128;

  struct Shared {
    alignas(16) T q[ROWS * PAD];
    union {
      struct {
        alignas(16) T k[NEW * PAD];
        alignas(16) T v[NEW * PAD];
      };
      float out[ROWS * D];  // once every warp is done with the new rows
    };
    float m[NW * ROWS], l[NW * ROWS];
    bool is_last;
  };

  // One warp's running softmax. Rows of the mma layout: g and g + 8 of each tile of 16 (g = lane / 4).
  struct State {
    float o[MT][NO];
    float m[MMA ? MT * 2 : 16], l[MMA ? MT * 2 : 16];
  };

  static __device__ __noinline__ float2 rotate(float a, float b, float angle) {
    float s, c;
    sincosf(angle, &s, &c);
    return {a * c - b * s, b * c + a * s};
  }

  // A warp's: x normed, and rotated at `position` where the head's first ROPE dimensions rotate: element d, and its
  // partner's where d < ROPE / 2. The norm rounds where MLX's does.
  template <typename F>
  static __device__ void stage(const T* x, long stride, int position, const float* inv_freq, const T* weight, float eps,
                               int lane, F put) {
    float scale = 1.f;
    if constexpr (NORM) {
      float sum = 0.f;
      for (int d = lane; d < D; d += 32) sum += to_float(x[d * stride]) * to_float(x[d * stride]);
#pragma unroll
      for (int w = 16; w > 0; w /= 2) sum += __shfl_xor_sync(0xffffffff, sum, w);
      scale = rsqrtf(sum / D + eps);
    }
    auto at = [&](int d) {
      if constexpr (!NORM) return x[d * stride];
      return from_float<T>(to_float(from_float<T>(to_float(x[d * stride]) * scale)) * to_float(weight[d]));
    };
#pragma unroll 1
    for (int d = lane; d < D; d += 32) {
      if (d < ROPE / 2) {
        float2 y = rotate(to_float(at(d)), to_float(at(d + ROPE / 2)), position * inv_freq[d]);
        put(d, from_float<T>(y.x));
        put(d + ROPE / 2, from_float<T>(y.y));
      } else if (d >= ROPE) {
        put(d, at(d));
      }
    }
  }

  static __device__ uint4 q_load(const T* q, int row, int d) {
    uint4 v = {0, 0, 0, 0};
    if (d < D) {
      unsigned at = static_cast<unsigned>(__cvta_generic_to_shared(q + row * PAD + d));
      asm volatile("ld.shared.v4.u32 {%0,%1,%2,%3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "r"(at));
    }
    return v;
  }

  static __device__ float score(float s, const Params& a) {  // in units of log2
    s *= a.scale;
    if (a.cap > 0.f) s = a.cap * tanhf(s / a.cap);
    return s * 1.44269504089f;
  }

  // Is the key at position p seen by query row m of this part? `start + row` is the query's position.
  static __device__ bool sees(int m, int p, int start, int last, const Params& a) {
    int position = start + m / G;
    return p < last && p <= position && (a.window == 0 || position - p < a.window);
  }

  // 16 keys from position p on, of which those below `last` exist. key(i), value(i): pointers to the row of position i.
  template <typename K, typename V>
  static __device__ void tile(State& st, const T* qs, const uint4 (*qf)[CH], int part, int p, int start, int last,
                              const Params& a, K key, V value) {
    const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    if constexpr (MMA) {
      uint4 kf[2][CH], vf[4][VC];
#pragma unroll
      for (int n = 0; n < 2; n++) {
        const T* x = key(min(p + n * 8 + g, last - 1));
#pragma unroll
        for (int c = 0; c < CH; c++) {
          kf[n][c] = uint4{0, 0, 0, 0};
          if (D % 32 == 0 || c * 32 + t * 8 < D) kf[n][c] = *reinterpret_cast<const uint4*>(x + c * 32 + t * 8);
        }
      }
#pragma unroll
      for (int i = 0; i < 4; i++) {
        int at = p + (i / 2) * 8 + 2 * t + i % 2;
        const T* x = value(min(at, last - 1));
#pragma unroll
        for (int c = 0; c < VC; c++) {
          vf[i][c] = uint4{0, 0, 0, 0};
          if (at < last && (D % 64 == 0 || c * 64 + g * 8 < D)) {
            vf[i][c] = *reinterpret_cast<const uint4*>(x + c * 64 + g * 8);
          }
        }
      }
#pragma unroll
      for (int mt = 0; mt < MT; mt++) {
        float s[2][4] = {};
#pragma unroll
        for (int c = 0; c < CH; c++) {
          uint4 lo, hi;
          if constexpr (Q_IN_REGISTERS) {
            lo = qf[0][c];
            hi = qf[1][c];
          } else {
            lo = q_load(qs, mt * 16 + g, c * 32 + t * 8);
            hi = q_load(qs, mt * 16 + g + 8, c * 32 + t * 8);
          }
          unsigned a0[4] = {lo.x, hi.x, lo.y, hi.y}, a1[4] = {lo.z, hi.z, lo.w, hi.w};
#pragma unroll
          for (int n = 0; n < 2; n++) {
            mma(s[n], a0, kf[n][c].x, kf[n][c].y, T());
            mma(s[n], a1, kf[n][c].z, kf[n][c].w, T());
          }
        }
        float top[2] = {NOTHING, NOTHING}, alpha[2], base[2], sum[2] = {};
#pragma unroll
        for (int i = 0; i < 8; i++) {
          int m = (part * MT + mt) * 16 + g + (i / 2 % 2) * 8, at = p + (i / 4) * 8 + 2 * t + i % 2;
          float& x = s[i / 4][i % 4];
          x = sees(m, at, start, last, a) ? score(x, a) : NOTHING;
          top[i / 2 % 2] = fmaxf(top[i / 2 % 2], x);
        }
#pragma unroll
        for (int i = 0; i < 2; i++) {
          float& m = st.m[mt * 2 + i];
          top[i] = fmaxf(top[i], __shfl_xor_sync(0xffffffff, top[i], 1));
          top[i] = fmaxf(fmaxf(top[i], __shfl_xor_sync(0xffffffff, top[i], 2)), m);
          base[i] = top[i] == NOTHING ? 0.f : top[i];  // nothing seen yet: all weights are 0
          alpha[i] = exp2f(m - base[i]);
          m = top[i];
        }
#pragma unroll
        for (int i = 0; i < 8; i++) {
          float& x = s[i / 4][i % 4];
          x = exp2f(x - base[i / 2 % 2]);
          sum[i / 2 % 2] += x;
        }
#pragma unroll
        for (int i = 0; i < 2; i++) st.l[mt * 2 + i] = st.l[mt * 2 + i] * alpha[i] + sum[i];
        if (__any_sync(0xffffffff, alpha[0] != 1.f || alpha[1] != 1.f)) {
#pragma unroll
          for (int i = 0; i < NO; i++) st.o[mt][i] *= alpha[i / 2 % 2];
        }
        unsigned w[4] = {pack(s[0][0], s[0][1], T()), pack(s[0][2], s[0][3], T()), pack(s[1][0], s[1][1], T()),
                         pack(s[1][2], s[1][3], T())};
#pragma unroll
        for (int c = 0; c < VC; c++) {
#pragma unroll
          for (int j = 0; j < 8; j++) {
            const unsigned *x0 = &vf[0][c].x, *x1 = &vf[1][c].x, *x2 = &vf[2][c].x, *x3 = &vf[3][c].x;
            const unsigned pick = j % 2 ? 0x7632 : 0x5410;
            mma(&st.o[mt][(c * 8 + j) * 4], w, __byte_perm(x0[j / 2], x1[j / 2], pick),
                __byte_perm(x2[j / 2], x3[j / 2], pick), T());
          }
        }
      }
    } else {
      constexpr int N = (D + 31) / 32;
      for (int at = p; at < min(p + 16, last); at++) {
        const T *xk = key(at), *xv = value(at);
        float k[N], v[N];
#pragma unroll
        for (int i = 0; i < N; i++) {
          int d = i * 32 + lane;
          k[i] = d < D ? to_float(xk[d]) : 0.f;
          v[i] = d < D ? to_float(xv[d]) : 0.f;
        }
#pragma unroll
        for (int r = 0; r < 16; r++) {
          int m = part * 16 + r;
          if (m >= a.M || !sees(m, at, start, last, a)) continue;
          float s = 0.f;
#pragma unroll
          for (int i = 0; i < N; i++) s += k[i] * (i * 32 + lane < D ? to_float(qs[r * PAD + i * 32 + lane]) : 0.f);
#pragma unroll
          for (int w = 16; w > 0; w /= 2) s += __shfl_xor_sync(0xffffffff, s, w);
          s = score(s, a);
          float top = fmaxf(st.m[r], s), alpha = exp2f(st.m[r] - top), w = exp2f(s - top);
          st.m[r] = top;
          st.l[r] = st.l[r] * alpha + w;
#pragma unroll
          for (int i = 0; i < N; i++) st.o[0][r * N + i] = st.o[0][r * N + i] * alpha + w * v[i];
        }
      }
    }
  }

  // Joins the parts of the key axis: the thread block that ends last reads what all of them left in `scratch`. That
  // holds COUNTERS numbers, 0 between launches, then (thread blocks, splits, ROWS, D + 2) floats: a query's weighted
  // values, its largest score and its sum.
  template <typename SINK>
  static __device__ void join(Shared& sh, float* scratch, int splits, const Params& a, int part, int b, int h,
                              int heads_kv, const SINK* sinks, T* out) {
    const int block = blockIdx.y * gridDim.x + blockIdx.x, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) {
      sh.is_last = atomicInc(reinterpret_cast<unsigned*>(scratch) + block, splits - 1) == splits - 1;
    }
    __syncthreads();
    if (!sh.is_last) return;
    __threadfence();
    constexpr int N = (D + 31) / 32;
    constexpr long STEP = long(ROWS) * (D + 2);
#pragma unroll 1
    for (int i = warp; i < ROWS; i += NW) {
      const int m = part * ROWS + i;
      if (m >= a.M) continue;
      const float* x = scratch + COUNTERS + block * splits * STEP + i * (D + 2);
      float sink = a.has_sinks ? to_float(sinks[h * G + m % G]) * 1.44269504089f : NOTHING, top = sink;
      for (int s = lane; s < splits; s += 32) top = fmaxf(top, __ldcg(x + s * STEP + D));
#pragma unroll
      for (int w = 16; w > 0; w /= 2) top = fmaxf(top, __shfl_xor_sync(0xffffffff, top, w));
      float l = a.has_sinks ? exp2f(sink - top) : 0.f, acc[N] = {};
#pragma unroll 4
      for (int s = 0; s < splits; s++) {
        float f = exp2f(__ldcg(x + s * STEP + D) - top);
        l += f * __ldcg(x + s * STEP + D + 1);
#pragma unroll
        for (int j = 0; j < N; j++) {
          if (D % 32 == 0 || j * 32 + lane < D) acc[j] += f * __ldcg(x + s * STEP + j * 32 + lane);
        }
      }
      T* to = out + ((long(b) * a.R + m / G) * heads_kv * G + h * G + m % G) * D;
#pragma unroll
      for (int j = 0; j < N; j++) {
        if (D % 32 == 0 || j * 32 + lane < D) to[j * 32 + lane] = from_float<T>(acc[j] / l);
      }
    }
  }

  // Writes keys and values of qkv (B, L, (H + 2 KV) * D) at their rows' positions, as `run` would: a warp for each.
  static __device__ void append(const T* qkv, const T* pool_k, const T* pool_v, const int* table, const int* starts,
                                const int* params, const float* inv_freq, const T* k_norm, int batch, int length,
                                int heads_kv) {
    const Params a = read_params(params, 0, G);
    const int index = blockIdx.x * NW + threadIdx.x / 32, lane = threadIdx.x % 32;
    const int h = index % heads_kv, i = index / heads_kv % length, b = index / heads_kv / length;
    if (b >= batch) return;
    const int position = starts[b] + i;
    const T* k = qkv + ((long(b) * length + i) * (G + 2) * heads_kv + G * heads_kv + h) * D;
    const T* v = k + heads_kv * D;
    T *to_k = const_cast<T*>(pool_k), *to_v = const_cast<T*>(pool_v);
    const long at = row_of<SHIFT>(position, table + b * a.W, a, heads_kv, h) * D;
    stage(k, 1, position, inv_freq, k_norm, a.eps, lane, [&](int d, T x) { to_k[at + d] = x; });
    for (int d = lane; d < D; d += 32) to_v[at + d] = v[d];
  }

  // out: (B, R, H, D). q_norm, k_norm: (D,), weights of the norms where there are NORM.
  template <typename SINK>
  static __device__ void run(const T* q, const Strides& qs, const T* k, const Strides& ks, const T* v, const Strides& vs,
                             const T* pool_k, const T* pool_v, const int* table, const int* starts, const int* params,
                             const float* inv_freq, const SINK* sinks, const T* q_norm, const T* k_norm, int R,
                             int heads_kv, T* out, float* scratch) {
    __shared__ Shared sh;
    const Params a = read_params(params, R, G);
    const int M = a.M, parts = (M + ROWS - 1) / ROWS, part = blockIdx.x % parts, h = blockIdx.x / parts, b = blockIdx.y, split = blockIdx.z, splits = gridDim.z;
    const int start = starts[b], tid = threadIdx.x, warp = tid / 32, lane = tid % 32, g = lane / 4, t = lane % 4;
    table += b * a.W;
    const int lo = a.window == 0 ? 0 : max(0, start - a.window + 1);
    const int end = SHARED ? start + R : start;  // of what is read from the pool
    const int chunk = ((end - lo + splits - 1) / splits + 15) / 16 * 16;
    const int first = lo + split * chunk, last = min(end, first + chunk);
    const bool owns_new = !SHARED && split == splits - 1;

#pragma unroll 1
    for (int i = warp; i < ROWS; i += NW) {
      int m = part * ROWS + i;
      if (m < M) {
        stage(q + b * qs[0] + (h * G + m % G) * qs[1] + m / G * qs[2], qs[3], start + m / G, inv_freq, q_norm, a.eps,
              lane, [&](int d, T x) { sh.q[i * PAD + d] = x; });
      } else {
        for (int d = lane; d < D; d += 32) sh.q[i * PAD + d] = from_float<T>(0.f);
      }
    }
    if (owns_new) {
#pragma unroll 1
      for (int i = warp; i < R; i += NW) {
        T *to_k = const_cast<T*>(pool_k), *to_v = const_cast<T*>(pool_v);
        long at = row_of<SHIFT>(start + i, table, a, heads_kv, h) * D;
        stage(k + b * ks[0] + h * ks[1] + i * ks[2], ks[3], start + i, inv_freq, k_norm, a.eps, lane, [&](int d, T x) {
          sh.k[i * PAD + d] = x;
          if (part == 0) to_k[at + d] = x;
        });
        for (int d = lane; d < D; d += 32) {
          T x = v[b * vs[0] + h * vs[1] + i * vs[2] + d * vs[3]];
          sh.v[i * PAD + d] = x;
          if (part == 0) to_v[at + d] = x;
        }
      }
    }
    __syncthreads();

    State st;
#pragma unroll
    for (int mt = 0; mt < MT; mt++) {
#pragma unroll
      for (int i = 0; i < NO; i++) st.o[mt][i] = 0.f;
    }
#pragma unroll
    for (int i = 0; i < (MMA ? MT * 2 : 16); i++) {
      st.m[i] = NOTHING;
      st.l[i] = 0.f;
    }
    uint4 qf[2][CH];
    if constexpr (Q_IN_REGISTERS) {
#pragma unroll
      for (int c = 0; c < CH; c++) {
        qf[0][c] = q_load(sh.q, g, c * 32 + t * 8);
        qf[1][c] = q_load(sh.q, g + 8, c * 32 + t * 8);
      }
    }
    if (owns_new) {
#pragma unroll 1
      for (int i = warp; i < (R + 15) / 16; i += NW) {
        tile(st, sh.q, qf, part, start + i * 16, start, start + R, a,
             [&](int p) { return sh.k + (p - start) * PAD; }, [&](int p) { return sh.v + (p - start) * PAD; });
      }
    }
#pragma unroll 1
    for (int p = first + (NW - 1 - warp) * 16; p < last; p += NW * 16) {
      tile(st, sh.q, qf, part, p, start, last, a,
           [&](int i) { return pool_k + row_of<SHIFT>(i, table, a, heads_kv, h) * D; },
           [&](int i) { return pool_v + row_of<SHIFT>(i, table, a, heads_kv, h) * D; });
    }

    // Join the warps: maxima first, then each warp adds its share.
    if constexpr (MMA) {
#pragma unroll
      for (int i = 0; i < MT * 2; i++) {
        float l = st.l[i];
        l += __shfl_xor_sync(0xffffffff, l, 1);
        l += __shfl_xor_sync(0xffffffff, l, 2);
        int row = warp * ROWS + i / 2 * 16 + i % 2 * 8 + g;
        if (t == 0) {
          sh.m[row] = st.m[i];
          sh.l[row] = l;
        }
      }
    } else if (lane == 0) {
#pragma unroll
      for (int r = 0; r < 16; r++) {
        sh.m[warp * ROWS + r] = st.m[r];
        sh.l[warp * ROWS + r] = st.l[r];
      }
    }
    __syncthreads();
#pragma unroll 1
    for (int i = tid; i < ROWS * D; i += NW * 32) sh.out[i] = 0.f;
    __syncthreads();
    auto share = [&](int w, int row) {  // what the warp's sums are multiplied with
      float top = NOTHING;
#pragma unroll
      for (int j = 0; j < NW; j++) top = fmaxf(top, sh.m[j * ROWS + row]);
      return top == NOTHING ? 0.f : exp2f(sh.m[w * ROWS + row] - top);
    };
#pragma unroll 1
    for (int w = 0; w < NW; w++) {
      if (w == warp) {
        if constexpr (MMA) {
#pragma unroll
          for (int i = 0; i < MT * 2; i++) {
            int row = i / 2 * 16 + i % 2 * 8 + g;
            float f = part * ROWS + row < M ? share(w, row) : 0.f;
            if (f != 0.f) {
#pragma unroll
              for (int j = 0; j < VC * 8; j++) {
                int d = j / 8 * 64 + t * 16 + j % 8;
                if (D % 64 == 0 || d < D) {
                  sh.out[row * D + d] += f * st.o[i / 2][j * 4 + i % 2 * 2];
                  sh.out[row * D + d + 8] += f * st.o[i / 2][j * 4 + i % 2 * 2 + 1];
                }
              }
            }
          }
        } else {
          constexpr int N = (D + 31) / 32;
#pragma unroll
          for (int r = 0; r < 16; r++) {
            if (part * 16 + r < M) {
              float f = share(w, r);
#pragma unroll
              for (int i = 0; i < N; i++) {
                if (i * 32 + lane < D) sh.out[r * D + i * 32 + lane] += f * st.o[0][r * N + i];
              }
            }
          }
        }
      }
      __syncthreads();
    }

    const int heads = heads_kv * G;
#pragma unroll 1
    for (int i = warp; i < ROWS; i += NW) {
      int m = part * ROWS + i;
      if (m >= M) continue;
      float top = NOTHING, l = 0.f;
      for (int j = 0; j < NW; j++) top = fmaxf(top, sh.m[j * ROWS + i]);
      for (int j = 0; j < NW; j++) l += share(j, i) * sh.l[j * ROWS + i];
      if (splits > 1) {
        long block = long(blockIdx.y) * gridDim.x + blockIdx.x;
        float* to = scratch + COUNTERS + ((block * splits + split) * ROWS + i) * (D + 2);
        for (int d = lane; d < D; d += 32) to[d] = sh.out[i * D + d];
        if (lane == 0) {
          to[D] = top;
          to[D + 1] = l;
        }
      } else {
        float f = 1.f;
        if (a.has_sinks) {
          float sink = to_float(sinks[h * G + m % G]) * 1.44269504089f, both = fmaxf(top, sink);
          f = exp2f(top - both);
          l = l * f + exp2f(sink - both);
        }
        f /= l;
        T* to = out + ((long(b) * R + m / G) * heads + h * G + m % G) * D;
        for (int d = lane; d < D; d += 32) to[d] = from_float<T>(sh.out[i * D + d] * f);
      }
    }
    if (splits > 1) join(sh, scratch, splits, a, part, b, h, heads_kv, sinks, out);
  }
};

// Writes k and v (B, KV, L, D) at each row's positions; with OLD also gives back the `old` positions before and the new
// rows, contiguous: (B, KV, old + L, D). One thread per 16 bytes; k and v must have contiguous last dimensions.
template <typename T, int D, int SHIFT, bool OLD>
__device__ void write_rows(const T* k, const Strides& ks, const T* v, const Strides& vs, const T* pool_k,
                           const T* pool_v, const int* table, const int* starts, const int* params, int num_rows,
                           int heads_kv, int length, int old, T* keys, T* values) {
  constexpr int E = 16 / sizeof(T), V = D / E;
  const Params a = read_params(params, 0, 1);
  const long index = long(blockIdx.x) * blockDim.x + threadIdx.x;
  const int e = index % V * E, i = index / V % (old + length), h = index / V / (old + length) % heads_kv,
            b = index / V / (old + length) / heads_kv;
  if (b >= num_rows) return;
  const long at = row_of<SHIFT>(starts[b] - old + i, table + b * a.W, a, heads_kv, h) * D + e;
  alignas(16) T x[E], y[E];
  if (i < old) {
    *reinterpret_cast<uint4*>(x) = *reinterpret_cast<const uint4*>(pool_k + at);
    *reinterpret_cast<uint4*>(y) = *reinterpret_cast<const uint4*>(pool_v + at);
  } else {
    for (int j = 0; j < E; j++) {
      x[j] = k[b * ks[0] + h * ks[1] + (i - old) * ks[2] + (e + j) * ks[3]];
      y[j] = v[b * vs[0] + h * vs[1] + (i - old) * vs[2] + (e + j) * vs[3]];
    }
    *reinterpret_cast<uint4*>(const_cast<T*>(pool_k) + at) = *reinterpret_cast<uint4*>(x);
    *reinterpret_cast<uint4*>(const_cast<T*>(pool_v) + at) = *reinterpret_cast<uint4*>(y);
  }
  if constexpr (OLD) {
    *reinterpret_cast<uint4*>(keys + index * E) = *reinterpret_cast<uint4*>(x);
    *reinterpret_cast<uint4*>(values + index * E) = *reinterpret_cast<uint4*>(y);
  }
}
}  // namespace tandem
#endif
