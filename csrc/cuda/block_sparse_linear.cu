// Block-sparse linear on CUDA; contract in prunelm/ops/block_sparse_linear.py.
#include <algorithm>
#include <type_traits>

#include "cuda/block_sparse_tiles.cuh"
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

namespace {

// More rows than this are not sliced: there is work enough for all multiprocessors without.
constexpr int64_t kMostSlicedRows = 512;
constexpr int kUnslicedRows = 128;  // of a thread block

bool aligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

// Whether the kernel in tiles takes it: steps lie within a block and within a chunk of x's columns,
// and all of it can be copied 16 bytes at a time.
bool takes_tiles(const BlockSparseLinear& op, DType dtype) {
  const int64_t size = dtype == DType::float32 ? 4 : 2;
  const int64_t step = tiles::kStepBytes / size, chunk = tiles::kChunkBytes / size;
  return op.bn % 16 == 0 && op.bk % step == 0 && (chunk % op.bk == 0 || op.bk % chunk == 0) &&
         op.K * size % 16 == 0 && op.K < INT32_MAX - 2 * op.bk && aligned(op.x) && aligned(op.y) &&
         aligned(op.values) && compute_capability() >= 80;
}

int multiprocessors() {
  return once_a_device([] {
    int device = 0, count = 0;
    cudaGetDevice(&device);
    cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
    return count;
  });
}

// Warps of a thread block, each for 32 outputs, where there are `times` blocks for the same
// outputs. Little work: less for each, until most multiprocessors have some. M counts here, but no
// result depends on how outputs are shared out.
int warps_of(const BlockSparseLinear& op, int64_t times) {
  const int64_t enough = multiprocessors() * 3 / 4;
  int warps = tiles::kMaxWarps;
  while (warps > 1 && times * ceil_div(op.N, warps * tiles::kOutputs) < enough) warps /= 2;
  return warps;
}

// The most thread blocks, 8, 4, 2 or 1, that run as a cluster with all the shared memory of their
// multiprocessors.
int widest_cluster() {
  return once_a_device([] {
    const auto kernel = tiles::block_sparse_tiles_kernel<__half, 16, 64, tiles::Mode::sliced>;
    int blocks = tiles::kSlices;
    while (blocks > 1 && clusters_at_once(kernel, {blocks, dim3{tiles::kMaxWarps * kWarp},
                                                   most_shared(), blocks}) == 0) {
      blocks /= 2;
    }
    return blocks;
  });
}

tiles::Mode mode_of(const BlockSparseLinear& op, int64_t size) {
  // float32 is bound by its multiply-adds: it stays sliced however many rows there are.
  if (size == 4 || op.M <= kMostSlicedRows) return tiles::Mode::sliced;
  if (compute_capability() < 90) return tiles::Mode::plain;
  const int warps = warps_of(op, ceil_div(op.M, kUnslicedRows));
  const bool several = op.N > warps * tiles::kOutputs,
             whole_steps = op.K * size % tiles::kStepBytes == 0;
  return several && whole_steps && widest_cluster() > 1 ? tiles::Mode::shared : tiles::Mode::sliced;
}

template <typename T, int kStrip, int kRows, tiles::Mode kMode>
const char* launch_tiles(const BlockSparseLinear& op, Activation activation, void* stream) {
  constexpr bool kSliced = kMode == tiles::Mode::sliced;
  const int slots = tiles::Ring<kStrip>::kSlots, slices = kSliced ? tiles::kSlices : 1;
  tiles::Tiles plan{tiles::kMaxWarps, 0, op.K};
  if (kSliced) plan.slice = ceil_div(ceil_div(op.K, op.bk), slices) * op.bk;
  const int64_t row_tiles = ceil_div(op.M, kRows);
  plan.warps = warps_of(op, row_tiles * slices);
  const int64_t groups = ceil_div(op.N, plan.warps * tiles::kOutputs);

  const auto bytes = [&] { return tiles::Layout(plan, kRows, slots, kSliced).bytes; };
  const int64_t chunks = ceil_div(plan.slice * int64_t{sizeof(T)}, tiles::kChunkBytes);
  plan.stages = int(std::min<int64_t>(std::max<int64_t>(chunks, 1), tiles::kMaxStages));
  while (plan.stages > 1 && bytes() > most_shared()) --plan.stages;

  Grid grid{row_tiles * groups * slices, dim3{unsigned(plan.warps) * kWarp}, bytes()};
  grid.early = true;
  if (kSliced && !op.workspace) grid.cluster = slices;
  if (kMode == tiles::Mode::shared) {
    grid.cluster = int(std::min<int64_t>(groups, std::min(tiles::kSharers, widest_cluster())));
    grid.blocks = row_tiles * ceil_div(groups, grid.cluster) * grid.cluster;
  }
  const char* error = launch(tiles::block_sparse_tiles_kernel<T, kStrip, kRows, kMode>, grid,
                             stream, op, plan, activation);
  if (error || !op.workspace) return error;
  return launch(tiles::add_slices_kernel<T>, {ceil_div(op.M * op.N, kThreads), dim3{kThreads}},
                stream, op, activation);
}

template <typename T, int kStrip>
const char* launch_tiles(const BlockSparseLinear& op, Activation activation, void* stream) {
  constexpr tiles::Mode kSliced = tiles::Mode::sliced;
  const tiles::Mode mode = mode_of(op, sizeof(T));
  if constexpr (sizeof(T) == 2) {
    if (mode == tiles::Mode::shared) {
      return launch_tiles<T, kStrip, kUnslicedRows, tiles::Mode::shared>(op, activation, stream);
    }
    if (mode == tiles::Mode::plain) {
      return launch_tiles<T, kStrip, kUnslicedRows, tiles::Mode::plain>(op, activation, stream);
    }
    if (op.M > 32) return launch_tiles<T, kStrip, 64, kSliced>(op, activation, stream);
  }
  if (op.M > 8) return launch_tiles<T, kStrip, 32, kSliced>(op, activation, stream);
  return launch_tiles<T, kStrip, 8, kSliced>(op, activation, stream);
}

}  // namespace

int64_t block_sparse_linear_workspace(const BlockSparseLinear& op, DType dtype) {
  const int64_t size = dtype == DType::float32 ? 4 : 2;
  if (!takes_tiles(op, dtype) || widest_cluster() == tiles::kSlices) return 0;
  if (mode_of(op, size) != tiles::Mode::sliced) return 0;
  return tiles::kSlices * op.M * op.N;
}

const char* launch_block_sparse_linear(const BlockSparseLinear& op, DType dtype,
                                       Activation activation, void* stream) {
  if (op.M == 0 || op.N == 0) return nullptr;
  return with_dtype(dtype, [&](auto zero) {
    using T = decltype(zero);
    if (takes_tiles(op, dtype)) {
      return op.bn % 32 == 0 ? launch_tiles<T, 32>(op, activation, stream)
                             : launch_tiles<T, 16>(op, activation, stream);
    }
    const int64_t blocks = ceil_div(op.N, kWarp) * ceil_div(op.M, kRows);
    return launch(block_sparse_linear_kernel<T>, {blocks, dim3{kWarp, kRows}}, stream, op,
                  activation);
  });
}

}  // namespace prunelm::cuda
