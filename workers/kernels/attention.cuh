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

using tandem_numbers::from_float;
using tandem_numbers::to_float;

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
  // Rows of shared memory start at different banks: of queries for 8 lanes that read 16 bytes of two rows each, of
  // sums for lanes that add to 8 rows.
  static constexpr int PAD = D + 16 / sizeof(T), QPAD = MMA ? (D + 31) / 64 * 64 + 32 : PAD, OPAD = D + 1;
  static constexpr int NO = MMA ? VC * 32 : (D + 31) / 32 * 16;  // accumulators of 16 queries, per lane
  static constexpr bool Q_IN_REGISTERS = MMA && MT == 1 && D <= 128;
  static constexpr bool AHEAD = MMA && D <= 128;  // the next tile is loaded as this one's registers are free; else they are few

  struct Shared {
    alignas(16) T q[ROWS * QPAD];
    union {
      struct {
        alignas(16) T k[NEW * PAD];
        alignas(16) T v[NEW * PAD];
      };
      float out[ROWS * OPAD];  // once every warp is done with the new rows
    };
    float m[NW * ROWS], l[NW * ROWS];
    bool is_last;
  };

  // One warp's running softmax. Rows of the mma layout: g and g + 8 of each tile of 16 (g = lane / 4).
  struct State {
    float o[MT][NO];
    float m[MMA ? MT * 2 : 16], l[MMA ? MT * 2 : 16];
  };

  static __device__ __noinline__ float2 exact_sincos(float angle) {
    float s, c;
    sincosf(angle, &s, &c);
    return {s, c};
  }

  // (sine, cosine). For 16 bits the fast ones, which are off by 4e-7 near 0: whole turns are taken away first.
  static __device__ float2 sincos_of(float angle) {
    if constexpr (!MMA) return exact_sincos(angle);
    float turns = rintf(angle * 0.15915494309f), s, c;
    angle = fmaf(turns, 1.7484556e-7f, fmaf(turns, -6.28318548f, angle));  // 2 pi in two parts
    __sincosf(angle, &s, &c);
    return {s, c};
  }

  // A warp's: x normed, and rotated at `position` where the head's first ROPE dimensions rotate: element d with the one
  // ROPE / 2 behind it. All is loaded before any of it is used. The norm rounds where MLX's does.
  template <typename F>
  static __device__ void stage(const T* x, long stride, int position, const float* inv_freq, const T* weight, float eps,
                               int lane, F put) {
    constexpr int N = (D + 31) / 32, HALF = ROPE / 64;  // a lane has both elements of a pair where HALF is whole
    auto is_there = [&](int j) { return D % 32 == 0 || j * 32 + lane < D; };
    T e[N], w[NORM ? N : 1];
    float f[HALF > 0 ? HALF : 1];
#pragma unroll
    for (int j = 0; j < N; j++) {
      e[j] = is_there(j) ? x[(j * 32 + lane) * stride] : from_float<T>(0.f);
      if constexpr (NORM) w[j] = is_there(j) ? weight[j * 32 + lane] : from_float<T>(0.f);
    }
#pragma unroll
    for (int j = 0; j < HALF; j++) f[j] = inv_freq[j * 32 + lane];
    if constexpr (NORM) {
      float sum = 0.f;
#pragma unroll
      for (int j = 0; j < N; j++) sum += to_float(e[j]) * to_float(e[j]);
#pragma unroll
      for (int i = 16; i > 0; i /= 2) sum += __shfl_xor_sync(0xffffffff, sum, i);
      float scale = rsqrtf(sum / D + eps);
#pragma unroll
      for (int j = 0; j < N; j++) e[j] = from_float<T>(to_float(from_float<T>(to_float(e[j]) * scale)) * to_float(w[j]));
    }
    if constexpr (ROPE % 64 == 0) {
#pragma unroll
      for (int j = 0; j < HALF; j++) {
        float2 y = rotated(to_float(e[j]), to_float(e[j + HALF]), position * f[j]);
        put(j * 32 + lane, from_float<T>(y.x));
        put((j + HALF) * 32 + lane, from_float<T>(y.y));
      }
#pragma unroll
      for (int j = 2 * HALF; j < N; j++) {
        if (is_there(j)) put(j * 32 + lane, e[j]);
      }
    } else {
#pragma unroll
      for (int j = 0; j < N; j++) {  // the partner is another lane's
        const int d = j * 32 + lane;
        const bool is_second = d >= ROPE / 2;
        const float other = to_float(at_element(e, is_second ? d - ROPE / 2 : d + ROPE / 2));
        float2 y = {to_float(e[j]), 0.f};
        if (d < ROPE) {
          float angle = position * inv_freq[is_second ? d - ROPE / 2 : d];
          y = is_second ? rotated(other, y.x, angle) : rotated(y.x, other, angle);
        }
        if (is_there(j)) put(d, from_float<T>(d < ROPE && is_second ? y.y : y.x));
      }
    }
  }

  static __device__ float2 rotated(float a, float b, float angle) {
    float2 sc = sincos_of(angle);
    return {a * sc.y - b * sc.x, b * sc.y + a * sc.x};
  }

  // Element d of a row that the warp's lanes hold, lane by lane; every lane must ask.
  template <int N>
  static __device__ T at_element(const T (&e)[N], int d) {
    float found = 0.f;
#pragma unroll
    for (int j = 0; j < N; j++) {
      float x = __shfl_sync(0xffffffff, to_float(e[j]), d & 31);
      if (d >> 5 == j) found = x;
    }
    return from_float<T>(found);
  }

  static __device__ uint4 q_load(const T* q, int row, int d) {
    uint4 v = {0, 0, 0, 0};
    if (d < D) {
      unsigned at = static_cast<unsigned>(__cvta_generic_to_shared(q + row * QPAD + d));
      asm volatile("ld.shared.v4.u32 {%0,%1,%2,%3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "r"(at));
    }
    return v;
  }

  static __device__ float score(float s, const Params& a) {  // in units of log2
    s *= a.scale;
    if (a.cap > 0.f) s = a.cap * tanhf(s / a.cap);
    return s * 1.44269504089f;
  }

  static __device__ void add(float* to, float x, bool is_first) { *to = is_first ? x : *to + x; }

  // Is the key at position p seen by query row m of this part? `start + row` is the query's position.
  static __device__ bool sees(int m, int p, int start, int last, const Params& a) {
    int position = start + m / G;
    return p < last && p <= position && (a.window == 0 || position - p < a.window);
  }

  // A tile: 16 keys and values from position p on, of which those below `last` exist, as a warp's lanes hold them.
  struct Tile {
    uint4 k[2][CH], v[4][VC];
  };

  template <typename K>
  static __device__ void load_keys(Tile& x, int p, int last, K key) {
    const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
#pragma unroll
    for (int n = 0; n < 2; n++) {
      const T* row = key(min(p + n * 8 + g, last - 1));
#pragma unroll
      for (int c = 0; c < CH; c++) {
        x.k[n][c] = uint4{0, 0, 0, 0};
        if (D % 32 == 0 || c * 32 + t * 8 < D) x.k[n][c] = *reinterpret_cast<const uint4*>(row + c * 32 + t * 8);
      }
    }
  }

  template <typename V>
  static __device__ void load_values(Tile& x, int p, int last, V value) {
    const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
#pragma unroll
    for (int i = 0; i < 4; i++) {
      int at = p + (i / 2) * 8 + 2 * t + i % 2;
      const T* row = value(min(at, last - 1));
#pragma unroll
      for (int c = 0; c < VC; c++) {
        x.v[i][c] = uint4{0, 0, 0, 0};
        if (at < last && (D % 64 == 0 || c * 64 + g * 8 < D)) {
          x.v[i][c] = *reinterpret_cast<const uint4*>(row + c * 64 + g * 8);
        }
      }
    }
  }

  // Attends to a tile. Once its keys have been used `next_keys` may load others in their place, which then come while
  // the rest is computed, and so may `next_values` at the end.
  template <typename NK, typename NV>
  static __device__ void tile(State& st, Tile& x, const T* qs, const uint4 (*qf)[CH], int part, int p, int start,
                              int last, const Params& a, NK next_keys, NV next_values) {
    const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    float s[MT][2][4] = {};
#pragma unroll
    for (int mt = 0; mt < MT; mt++) {
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
          mma(s[mt][n], a0, x.k[n][c].x, x.k[n][c].y, T());
          mma(s[mt][n], a1, x.k[n][c].z, x.k[n][c].w, T());
        }
      }
    }
    next_keys();
    float alpha[MT][2];
    bool is_rescaled = false;
#pragma unroll
    for (int mt = 0; mt < MT; mt++) {
      float top[2] = {NOTHING, NOTHING}, base[2], sum[2] = {};
#pragma unroll
      for (int i = 0; i < 8; i++) {
        int m = (part * MT + mt) * 16 + g + (i / 2 % 2) * 8, at = p + (i / 4) * 8 + 2 * t + i % 2;
        float& y = s[mt][i / 4][i % 4];
        y = sees(m, at, start, last, a) ? score(y, a) : NOTHING;
        top[i / 2 % 2] = fmaxf(top[i / 2 % 2], y);
      }
#pragma unroll
      for (int i = 0; i < 2; i++) {
        float& m = st.m[mt * 2 + i];
        top[i] = fmaxf(top[i], __shfl_xor_sync(0xffffffff, top[i], 1));
        top[i] = fmaxf(fmaxf(top[i], __shfl_xor_sync(0xffffffff, top[i], 2)), m);
        base[i] = top[i] == NOTHING ? 0.f : top[i];  // nothing seen yet: all weights are 0
        alpha[mt][i] = exp2f(m - base[i]);
        is_rescaled |= alpha[mt][i] != 1.f;
        m = top[i];
      }
#pragma unroll
      for (int i = 0; i < 8; i++) {
        float& y = s[mt][i / 4][i % 4];
        y = exp2f(y - base[i / 2 % 2]);
        sum[i / 2 % 2] += y;
      }
#pragma unroll
      for (int i = 0; i < 2; i++) st.l[mt * 2 + i] = st.l[mt * 2 + i] * alpha[mt][i] + sum[i];
    }
    if (__any_sync(0xffffffff, is_rescaled)) {
#pragma unroll
      for (int mt = 0; mt < MT; mt++) {
#pragma unroll
        for (int i = 0; i < NO; i++) st.o[mt][i] *= alpha[mt][i / 2 % 2];
      }
    }
#pragma unroll
    for (int mt = 0; mt < MT; mt++) {
      unsigned w[4] = {pack(s[mt][0][0], s[mt][0][1], T()), pack(s[mt][0][2], s[mt][0][3], T()),
                       pack(s[mt][1][0], s[mt][1][1], T()), pack(s[mt][1][2], s[mt][1][3], T())};
#pragma unroll
      for (int c = 0; c < VC; c++) {
#pragma unroll
        for (int j = 0; j < 8; j++) {
          const unsigned *x0 = &x.v[0][c].x, *x1 = &x.v[1][c].x, *x2 = &x.v[2][c].x, *x3 = &x.v[3][c].x;
          const unsigned pick = j % 2 ? 0x7632 : 0x5410;
          mma(&st.o[mt][(c * 8 + j) * 4], w, __byte_perm(x0[j / 2], x1[j / 2], pick),
              __byte_perm(x2[j / 2], x3[j / 2], pick), T());
        }
      }
    }
    next_values();
  }

  template <typename K, typename V>
  static __device__ void load(Tile& x, int p, int last, K key, V value) {
    if (p >= last) return;
    load_keys(x, p, last, key);
    load_values(x, p, last, value);
  }

  // Attends to every `step`th tile from position p on, of keys and values below `last`; with AHEAD x is the first one.
  // key(i), value(i): pointers to the row of position i.
  template <typename K, typename V>
  static __device__ void walk(State& st, Tile& x, const T* qs, const uint4 (*qf)[CH], int part, int p, int step,
                              int start, int last, const Params& a, K key, V value) {
    const int lane = threadIdx.x % 32;
    if constexpr (MMA) {
#pragma unroll 1
      for (; p < last; p += step) {
        const int next = AHEAD ? p + step : last;
        if constexpr (!AHEAD) load(x, p, last, key, value);
        tile(st, x, qs, qf, part, p, start, last, a, [&] { if (next < last) load_keys(x, next, last, key); },
             [&] { if (next < last) load_values(x, next, last, value); });
      }
    } else {
      constexpr int N = (D + 31) / 32;
#pragma unroll 1
      for (; p < last; p += step) {
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
            for (int i = 0; i < N; i++) s += k[i] * (i * 32 + lane < D ? to_float(qs[r * QPAD + i * 32 + lane]) : 0.f);
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

    auto key = [&](int i) { return pool_k + row_of<SHIFT>(i, table, a, heads_kv, h) * D; };
    auto value = [&](int i) { return pool_v + row_of<SHIFT>(i, table, a, heads_kv, h) * D; };
    const int mine = first + (NW - 1 - warp) * 16;
    Tile x;
    if constexpr (AHEAD) load(x, mine, last, key, value);

#pragma unroll 2
    for (int i = warp; i < ROWS; i += NW) {
      int m = part * ROWS + i;
      if (m < M) {
        stage(q + b * qs[0] + (h * G + m % G) * qs[1] + m / G * qs[2], qs[3], start + m / G, inv_freq, q_norm, a.eps,
              lane, [&](int d, T x) { sh.q[i * QPAD + d] = x; });
      } else {
        for (int d = lane; d < D; d += 32) sh.q[i * QPAD + d] = from_float<T>(0.f);
      }
    }
    if (owns_new) {
#pragma unroll 1
      for (int i = warp; i < R; i += NW) {
        T *to_k = const_cast<T*>(pool_k), *to_v = const_cast<T*>(pool_v);
        const long at = row_of<SHIFT>(start + i, table, a, heads_kv, h) * D;
        T e[(D + 31) / 32];
#pragma unroll
        for (int j = 0; j < (D + 31) / 32; j++) {
          int d = j * 32 + lane;
          e[j] = d < D ? v[b * vs[0] + h * vs[1] + i * vs[2] + d * vs[3]] : from_float<T>(0.f);
        }
        stage(k + b * ks[0] + h * ks[1] + i * ks[2], ks[3], start + i, inv_freq, k_norm, a.eps, lane, [&](int d, T x) {
          sh.k[i * PAD + d] = x;
          if (part == 0) to_k[at + d] = x;
        });
#pragma unroll
        for (int j = 0; j < (D + 31) / 32; j++) {
          int d = j * 32 + lane;
          if (d >= D) continue;
          sh.v[i * PAD + d] = e[j];
          if (part == 0) to_v[at + d] = e[j];
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
    walk(st, x, sh.q, qf, part, mine, NW * 16, start, last, a, key, value);
    if (owns_new && warp == 0) {
      auto new_key = [&](int p) { return sh.k + (p - start) * PAD; };
      auto new_value = [&](int p) { return sh.v + (p - start) * PAD; };
      if constexpr (AHEAD) load(x, start, start + R, new_key, new_value);
      walk(st, x, sh.q, qf, part, start, 16, start, start + R, a, new_key, new_value);
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
    auto share = [&](int w, int row) {  // what the warp's sums are multiplied with
      float top = NOTHING;
#pragma unroll
      for (int j = 0; j < NW; j++) top = fmaxf(top, sh.m[j * ROWS + row]);
      return top == NOTHING ? 0.f : exp2f(sh.m[w * ROWS + row] - top);
    };
    // Each warp adds to another part of the sums at a time: 8 rows, or half of their columns.
#pragma unroll 1
    for (int turn = 0; turn < NW; turn++) {
      const int unit = (warp + turn) % NW;
      if constexpr (MMA) {
        static_assert(NW % (MT * 2) == 0, "as many units as warps");
        constexpr int GROUPS = MT * 2, COLUMNS = VC * 8 / (NW / GROUPS);  // 8 rows each; columns of a unit
#pragma unroll
        for (int i = 0; i < GROUPS; i++) {
#pragma unroll
          for (int part_of = 0; part_of < NW / GROUPS; part_of++) {
            if (unit != part_of * GROUPS + i) continue;
            int row = i / 2 * 16 + i % 2 * 8 + g;
            float f = part * ROWS + row < M ? share(warp, row) : 0.f;
#pragma unroll
            for (int j = part_of * COLUMNS; j < (part_of + 1) * COLUMNS; j++) {
              int d = j / 8 * 64 + t * 16 + j % 8;
              if (D % 64 == 0 || d < D) {
                add(&sh.out[row * OPAD + d], f * st.o[i / 2][j * 4 + i % 2 * 2], turn == 0);
                add(&sh.out[row * OPAD + d + 8], f * st.o[i / 2][j * 4 + i % 2 * 2 + 1], turn == 0);
              }
            }
          }
        }
      } else {
        constexpr int N = (D + 31) / 32, EACH = 16 / NW;
#pragma unroll
        for (int r = 0; r < 16; r++) {
          if (unit != r / EACH) continue;
          float f = part * 16 + r < M ? share(warp, r) : 0.f;
#pragma unroll
          for (int i = 0; i < N; i++) {
            if (i * 32 + lane < D) add(&sh.out[r * OPAD + i * 32 + lane], f * st.o[0][r * N + i], turn == 0);
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
        for (int d = lane; d < D; d += 32) to[d] = sh.out[i * OPAD + d];
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
        for (int d = lane; d < D; d += 32) to[d] = from_float<T>(sh.out[i * OPAD + d] * f);
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
