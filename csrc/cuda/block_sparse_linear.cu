// Block-sparse linear on CUDA; contract in prunelm/ops/block_sparse_linear.py.
#include "cuda/device.cuh"

namespace prunelm::cuda {
namespace {

constexpr int kRows = 8;  // rows of x that a thread block takes

// A thread block computes y for 32 columns and kRows rows, a thread one element: it walks the
// stored blocks of its block row in order, so that the result does not depend on M. Neighbouring
// threads read neighbouring values.
template <typename T>
__global__ void block_sparse_linear_kernel(BlockSparseLinear op, Activation activation) {
  const int64_t n_tiles = (op.N + kWarp - 1) / kWarp;
  const int64_t n = blockIdx.x % n_tiles * kWarp + threadIdx.x;
  const int64_t m = blockIdx.x / n_tiles * kRows + threadIdx.y;
  if (n >= op.N || m >= op.M) return;

  const T* x = static_cast<const T*>(op.x) + m * op.K;
  const T* values = static_cast<const T*>(op.values) + n % op.bn;
  const int64_t row = n / op.bn;
  float sum = 0;
  for (int64_t block = op.crow[row]; block < op.crow[row + 1]; ++block) {
    const int64_t k0 = op.col[block] * op.bk;
    const int64_t width = min(op.bk, op.K - k0);  // the last block of a row may overhang K
    const T* column = values + block * op.bk * op.bn;
    for (int64_t k = 0; k < width; ++k) {
      sum += to_float(x[k0 + k]) * to_float(column[k * op.bn]);
    }
  }
  if (op.bias) sum += to_float(static_cast<const T*>(op.bias)[n]);
  store(static_cast<T*>(op.y) + m * op.N + n, activate(sum, activation));
}

}  // namespace

const char* launch_block_sparse_linear(const BlockSparseLinear& op, DType dtype,
                                       Activation activation, void* stream) {
  if (op.M == 0 || op.N == 0) return nullptr;
  const int64_t blocks = ceil_div(op.N, kWarp) * ceil_div(op.M, kRows);
  return with_dtype(dtype, [&](auto zero) {
    return launch(block_sparse_linear_kernel<decltype(zero)>, blocks, dim3{kWarp, kRows}, 0, stream,
                  op, activation);
  });
}

}  // namespace prunelm::cuda
