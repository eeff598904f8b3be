// The decode and verify kernel of attention.cuh for Metal: the same rows, pages and masks, with plain dot products in a
// simdgroup of 32 in place of tensor-core fragments. Nobody has run it yet: it serves only where the check at start
// finds its values right and its time better (workers/kernels/prove.py). It does not write: the pool's rows are stored
// by a stock operation before, and read from it. Layers that share another's keys and values therefore run it as it is.
//
// One threadgroup of NW simdgroups takes one sequence, one key-value head, QT query vectors and one part of the key axis.
// Inputs: q (B, H, R, D) row-contiguous and rotated, pools (N, KV, S, D), table (B, W), starts (B), params as in
// `Params` of attention.cuh. Outputs: partial (B, KV, M, splits, D) and stats (B, KV, M, splits, 2), joined by `combine`.

constexpr int M = G * R, PARTS = (M + QT - 1) / QT, N = (D + 31) / 32;
const int lane = thread_index_in_simdgroup, warp = simdgroup_index_in_threadgroup;
const int part = threadgroup_position_in_grid.x % PARTS, h = threadgroup_position_in_grid.x / PARTS;
const int b = threadgroup_position_in_grid.y, split = threadgroup_position_in_grid.z;
const int splits = threadgroups_per_grid.z;
const float scale = as_type<float>(params[0]), cap = as_type<float>(params[1]);
const int window = params[2], S = params[3], W = params[4];
const int start = starts[b], end = start + R;
const int lo = window == 0 ? 0 : max(0, start - window + 1);
const int chunk = (end - lo + splits - 1) / splits;
const int first = lo + split * chunk, last = min(end, first + chunk);

float query[QT][N], out[QT][N], top[QT], sum[QT];
for (int j = 0; j < QT; j++) {
  const int m = part * QT + j;
  top[j] = -INFINITY;
  sum[j] = 0;
  for (int i = 0; i < N; i++) {
    const int d = i * 32 + lane;
    out[j][i] = 0;
    query[j][i] = m < M && d < D ? float(q[((long(b) * KV + h) * G + m % G) * R * D + m / G * D + d]) : 0;
  }
}
for (int p = first + warp; p < last; p += NW) {
  const int block = table[b * W + (p / S) % W];
  const long at = ((long(block) * KV + h) * S + p % S) * D;
  float key[N], value[N];
  for (int i = 0; i < N; i++) {
    const int d = i * 32 + lane;
    key[i] = d < D ? float(pool_k[at + d]) : 0;
    value[i] = d < D ? float(pool_v[at + d]) : 0;
  }
  for (int j = 0; j < QT; j++) {
    const int m = part * QT + j, position = start + m / G;
    if (m >= M || p > position || (window != 0 && position - p >= window)) continue;
    float score = 0;
    for (int i = 0; i < N; i++) score += query[j][i] * key[i];
    score = simd_sum(score) * scale;
    if (cap > 0) score = cap * precise::tanh(score / cap);
    const float before = top[j];
    top[j] = max(before, score);
    const float fade = exp(before - top[j]), weight = exp(score - top[j]);
    sum[j] = sum[j] * fade + weight;
    for (int i = 0; i < N; i++) out[j][i] = out[j][i] * fade + weight * value[i];
  }
}

threadgroup float tops[NW][QT], sums[NW][QT], joined[QT][N * 32];
if (lane == 0) {
  for (int j = 0; j < QT; j++) {
    tops[warp][j] = top[j];
    sums[warp][j] = sum[j];
  }
}
threadgroup_barrier(mem_flags::mem_threadgroup);
for (int w = 0; w < NW; w++) {
  if (w == warp) {
    for (int j = 0; j < QT; j++) {
      float best = -INFINITY;
      for (int x = 0; x < NW; x++) best = max(best, tops[x][j]);
      const float share = best == -INFINITY ? 0 : exp(top[j] - best);
      for (int i = 0; i < N; i++) {
        const float mine = share * out[j][i];
        joined[j][i * 32 + lane] = w == 0 ? mine : joined[j][i * 32 + lane] + mine;
      }
    }
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
}
for (int j = warp; j < QT; j += NW) {
  const int m = part * QT + j;
  if (m >= M) continue;
  float best = -INFINITY, total = 0;
  for (int x = 0; x < NW; x++) best = max(best, tops[x][j]);
  for (int x = 0; x < NW; x++) total += best == -INFINITY ? 0 : exp(tops[x][j] - best) * sums[x][j];
  const long row = ((long(b) * KV + h) * M + m) * splits + split;
  for (int d = lane; d < D; d += 32) partial[row * D + d] = joined[j][d];
  if (lane == 0) {
    stats[row * 2] = best;
    stats[row * 2 + 1] = total;
  }
}
