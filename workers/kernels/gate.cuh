// silu(gate) * up of rows that hold both halves, (rows, 2 I) -> (rows, I): sixteen bytes a thread and half.
//
// Rounded to T after each step, as stock operations are, which few rows go by: the two differ in a last bit at most.

#ifndef TANDEM_GATE
#define TANDEM_GATE
namespace tandem_gate {

using tandem_numbers::from_float;
using tandem_numbers::to_float;

// `num_vectors`: of a half row. Grid: x covers rows * num_vectors.
template <typename T>
__device__ void silu(const T* joined, unsigned rows, unsigned num_vectors, T* out) {
  constexpr int N = 16 / sizeof(T);
  const unsigned at = blockIdx.x * blockDim.x + threadIdx.x;
  if (at >= rows * num_vectors) return;
  const unsigned row = at / num_vectors;
  const uint4* half = reinterpret_cast<const uint4*>(joined) + size_t(row) * num_vectors + at;
  const uint4 gates = half[0], ups = half[num_vectors];
  uint4 result;
  const T* gate = reinterpret_cast<const T*>(&gates);
  const T* up = reinterpret_cast<const T*>(&ups);
  T* to = reinterpret_cast<T*>(&result);
#pragma unroll
  for (int i = 0; i < N; ++i) {
    const float x = to_float(gate[i]);
    const float sigmoid = to_float(from_float<T>(1.f / (1.f + __expf(-x))));
    to[i] = from_float<T>(to_float(from_float<T>(x * sigmoid)) * to_float(up[i]));
  }
  reinterpret_cast<uint4*>(out)[at] = result;
}

}  // namespace tandem_gate
#endif
