// Low-rank linear on CUDA; contract in prunelm/ops/low_rank_linear.py.
#include "cuda/device.cuh"

namespace prunelm::cuda {
namespace {

constexpr int kWarps = 8;

// The sum over i of a[i] * b[i], in every lane; each lane adds every 32nd product.
template <typename A, typename B>
__device__ float dot(const A* a, const B* b, int64_t size) {
  float sum = 0;
  for (int64_t i = threadIdx.x; i < size; i += kWarp) sum += to_float(a[i]) * to_float(b[i]);
  return warp_sum(sum);
}

// A thread block computes one row of y, a warp every 8th element of the middle z and then of y.
// z [R] stays in shared memory, in float32.
template <typename T>
__global__ void low_rank_linear_kernel(LowRankLinear op, Activation activation) {
  float* z = reinterpret_cast<float*>(dynamic_shared());
  const int64_t m = blockIdx.x;
  const T* x = static_cast<const T*>(op.x) + m * op.K;
  for (int64_t r = threadIdx.y; r < op.R; r += kWarps) {
    const float sum = dot(x, static_cast<const T*>(op.down) + r * op.K, op.K);
    if (threadIdx.x == 0) z[r] = sum;
  }
  __syncthreads();

  for (int64_t n = threadIdx.y; n < op.N; n += kWarps) {
    float sum = dot(z, static_cast<const T*>(op.up) + n * op.R, op.R);
    if (op.bias) sum += to_float(static_cast<const T*>(op.bias)[n]);
    if (threadIdx.x == 0) store(static_cast<T*>(op.y) + m * op.N + n, activate(sum, activation));
  }
}

}  // namespace

const char* launch_low_rank_linear(const LowRankLinear& op, DType dtype, Activation activation,
                                   void* stream) {
  if (op.M == 0 || op.N == 0) return nullptr;
  return with_dtype(dtype, [&](auto zero) {
    return launch(low_rank_linear_kernel<decltype(zero)>,
                  {op.M, dim3{kWarp, kWarps}, op.R * int64_t{sizeof(float)}}, stream, op,
                  activation);
  });
}

}  // namespace prunelm::cuda
