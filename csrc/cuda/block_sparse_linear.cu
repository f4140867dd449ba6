// Block-sparse linear on CUDA; contract in prunelm/ops/block_sparse_linear.py.
#include "cuda/device.cuh"

namespace prunelm::cuda {
namespace {

constexpr int kRows = 8;  // rows of x that a thread block of the forward kernel takes
constexpr int kThreads = 256;

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

// The first i in [begin, end) with sorted[i] >= value; end if there is none.
__device__ int64_t lower_bound(const int32_t* sorted, int64_t begin, int64_t end, int64_t value) {
  while (begin < end) {
    const int64_t middle = (begin + end) / 2;
    if (sorted[middle] < value) {
      begin = middle + 1;
    } else {
      end = middle;
    }
  }
  return begin;
}

// A thread computes one element [m, k]: it looks k's column of blocks up in every row of blocks, in
// order, since the pattern by columns is not kept.
__global__ void grad_x_kernel(BlockSparseGradient op) {
  const int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (i >= op.M * op.K) return;
  const int64_t m = i / op.K, k = i % op.K;
  float sum = 0;
  for (int64_t row = 0; row * op.bn < op.N; ++row) {
    const int64_t end = op.crow[row + 1];
    const int64_t block = lower_bound(op.col, op.crow[row], end, k / op.bk);
    if (block == end || op.col[block] != k / op.bk) continue;
    const float* line = op.values + (block * op.bk + k % op.bk) * op.bn;
    const float* grad = op.grad + m * op.N + row * op.bn;
    const int64_t width = min(op.bn, op.N - row * op.bn);
    for (int64_t n = 0; n < width; ++n) sum += grad[n] * line[n];
  }
  op.out[i] = sum;
}

// A thread computes one element of one stored block, over all rows in order; 0 past N or K.
__global__ void grad_values_kernel(BlockSparseGradient op) {
  const int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (i >= op.nnz * op.bk * op.bn) return;
  const int64_t block = i / (op.bk * op.bn), rows = (op.N + op.bn - 1) / op.bn;
  // The row of blocks is the last one that begins at or before this block.
  const int64_t row = lower_bound(op.crow, 1, rows, block + 1) - 1;
  const int64_t n = row * op.bn + i % op.bn;
  const int64_t k = op.col[block] * op.bk + i / op.bn % op.bk;
  float sum = 0;
  if (n < op.N && k < op.K) {
    for (int64_t m = 0; m < op.M; ++m) sum += op.grad[m * op.N + n] * op.x[m * op.K + k];
  }
  op.out[i] = sum;
}

}  // namespace

const char* launch_block_sparse_linear_grad_x(const BlockSparseGradient& op, void* stream) {
  if (op.M * op.K == 0) return nullptr;
  return launch(grad_x_kernel, {ceil_div(op.M * op.K, kThreads), dim3{kThreads}}, stream, op);
}

const char* launch_block_sparse_linear_grad_values(const BlockSparseGradient& op, void* stream) {
  const int64_t count = op.nnz * op.bk * op.bn;
  if (count == 0) return nullptr;
  return launch(grad_values_kernel, {ceil_div(count, kThreads), dim3{kThreads}}, stream, op);
}

const char* launch_block_sparse_linear(const BlockSparseLinear& op, DType dtype,
                                       Activation activation, void* stream) {
  if (op.M == 0 || op.N == 0) return nullptr;
  const int64_t blocks = ceil_div(op.N, kWarp) * ceil_div(op.M, kRows);
  return with_dtype(dtype, [&](auto zero) {
    return launch(block_sparse_linear_kernel<decltype(zero)>, {blocks, dim3{kWarp, kRows}}, stream,
                  op, activation);
  });
}

}  // namespace prunelm::cuda
