// Low-rank linear on CUDA; contract in prunelm/ops/low_rank_linear.py.
//
// In three ways. All take the weights as the 16 rows of a matrix instruction and rows of x as its 8
// columns, split K in parts that depend on K, R and N alone, and sum the parts in order.
// 1. Clusters (sm_90, R <= 256): each cluster computes all of the middle z = x down^T, a part of K
//    in each block, sums the parts through distributed shared memory, and computes its share of y.
// 2. Two launches: parts of z in global memory; then each block sums what it needs of them.
// 3. General: one row of y a block; where R is beyond the shared memory of 2.
#include <algorithm>
#include <bit>
#include <cmath>
#include <type_traits>

#include "cuda/cluster.cuh"
#include "cuda/low_rank_linear.cuh"

namespace prunelm::cuda {
namespace {

constexpr int64_t kClusterRank = 256;
[[maybe_unused]] constexpr int kOwnSum = 256;  // elements of z that a block sums for itself

struct Plan {
  int tokens;                  // 8 times as many rows of x at once
  int rank_rows;               // R, rounded up
  int64_t part;                // of K, for each block of a cluster
  int cluster;                 // blocks of one
  int64_t clusters;            // for the same rows of x
  int64_t columns;             // of y, for each block
  int batch;                   // columns whose rows of up lie in shared memory at once
  int64_t z, up, bias, bytes;  // where they lie in shared memory, behind the parts of z; all of it
};

// Sums z over the cluster's parts. Each block sums a share of it and gives that to all; or all of
// it for itself, where that is little: one wait for the others less.
template <typename T, int kCols>
__device__ void sum_parts(float* parts, T* z, int groups, int rank_rows, int rows,
                          bool for_itself) {
  const int quads = rank_rows / 4, blocks = int(cluster_size());
  const int share = for_itself ? rows * quads : (rows * quads + blocks - 1) / blocks;
  const int first = for_itself ? 0 : int(cluster_rank()) * share;
  const int end = first + share < rows * quads ? first + share : rows * quads;
  for (int i = first + threadIdx.x; i < end; i += kThreads) {
    const int m = i / quads, r = i % quads * 4;
    Quad<float> sum{};
    for (int group = 0; group < groups; ++group) {
      float* part = parts + (group * 8 * kCols + m) * part_stride(rank_rows) + r;
#pragma unroll 8
      for (int block = 0; block < blocks; ++block) {
        const auto one = *reinterpret_cast<const Quad<float>*>(map_shared(part, block));
        for (int e = 0; e < 4; ++e) sum.value[e] += one.value[e];
      }
    }
    Quad<T> rounded;
    for (int e = 0; e < 4; ++e) store(&rounded.value[e], sum.value[e]);
    auto* to = reinterpret_cast<Quad<T>*>(z + m * row_stride<T>(rank_rows) + r);
    if (for_itself) {
      *to = rounded;
    } else {
      for (int block = 0; block < blocks; ++block) *map_shared(to, block) = rounded;
    }
  }
}

// A cluster computes 8 kCols rows of y and `plan.columns` columns for each of its blocks.
template <typename T, int kTiles, int kCols>
__global__ void __launch_bounds__(kThreads, 1)
    cluster_kernel(LowRankLinear op, Activation activation, Plan plan) {
#if PRUNELM_CLUSTERS
  wait_for_kernel_ahead();
  let_kernel_behind_begin();
  const int64_t cluster = blockIdx.x / plan.cluster;
  const int rank_rows = plan.rank_rows, rank = int(cluster_rank());
  const Slice slice{cluster / plan.clusters * 8 * kCols, 0, rank * plan.part, plan.part, rank_rows};
  unsigned char* memory = dynamic_shared();
  T* z = reinterpret_cast<T*>(memory + plan.z);
  T* up = reinterpret_cast<T*>(memory + plan.up);
  float* bias = reinterpret_cast<float*>(memory + plan.bias);

  int64_t n = (cluster % plan.clusters * plan.cluster + rank) * plan.columns;
  const int64_t end = n + plan.columns < op.N ? n + plan.columns : op.N;
  shrink<T, kTiles, kCols>(op, slice, memory, [&] {
    if (n < end) copy_up(op, up, bias, n, plan.batch, rank_rows);
  });
  cluster_sync();
  const int rows = op.M - slice.m0 < 8 * kCols ? int(op.M - slice.m0) : 8 * kCols;
  const bool for_itself = rows * rank_rows <= kOwnSum;
  sum_parts<T, kCols>(reinterpret_cast<float*>(memory), z, warp_groups(rank_rows, kTiles),
                      rank_rows, rows, for_itself);
  if (for_itself) {
    cluster_arrive_relaxed();
    __syncthreads();
  } else {
    cluster_sync();
  }
  while (n < end) {
    const int64_t here = n + plan.batch < end ? n + plan.batch : end;
    expand<T, kCols>(op, activation, z, up, bias, slice.m0, n, here, plan.batch, rank_rows);
    n = here;
    if (n >= end) break;
    __syncthreads();
    copy_up(op, up, bias, n, plan.batch, rank_rows);
    cp_async_commit();
    cp_async_wait<0>();
    __syncthreads();
  }
  if (for_itself) cluster_wait();  // others may still read this block's parts
#endif
}

struct Pair {
  int64_t parts, part;  // of K
  int columns;          // of y, for each block of the second launch
  int tokens;           // 8 times as many rows of x at once
};

// A block computes one part of [8 kCols, 16] of z.
template <typename T, int kCols>
__global__ void __launch_bounds__(kThreads, 1) shrink_kernel(LowRankLinear op, Pair pair) {
  wait_for_kernel_ahead();
  let_kernel_behind_begin();
  const int64_t tiles = (op.R + kTile - 1) / kTile, i = blockIdx.x / tiles;
  const int64_t part = i % pair.parts;
  const Slice slice{i / pair.parts * 8 * kCols, blockIdx.x % tiles * kTile, part * pair.part,
                    pair.part, kTile};
  unsigned char* memory = dynamic_shared();
  shrink<T, 1, kCols>(op, slice, memory, [] {});
  __syncthreads();
  const float* parts = reinterpret_cast<const float*>(memory);
  for (int at = threadIdx.x; at < 8 * kCols * kTile; at += kThreads) {
    const int64_t m = slice.m0 + at / kTile, r = slice.first_rank + at % kTile;
    if (m >= op.M || r >= op.R) continue;
    float sum = 0;
    for (int group = 0; group < kWarps; ++group) {
      sum += parts[(group * 8 * kCols + at / kTile) * part_stride(kTile) + at % kTile];
    }
    op.workspace[(part * op.M + m) * op.R + r] = sum;
  }
}

// A block sums the parts of z for 8 kCols rows, and computes `pair.columns` columns of y for them.
template <typename T, int kCols>
__global__ void __launch_bounds__(kThreads, 1)
    expand_kernel(LowRankLinear op, Activation activation, Pair pair) {
  const int64_t blocks = (op.N + pair.columns - 1) / pair.columns;
  const int64_t m0 = blockIdx.x / blocks * 8 * kCols, n0 = blockIdx.x % blocks * pair.columns;
  const int rank_rows = int((op.R + kTile - 1) / kTile * kTile);
  T* z = reinterpret_cast<T*>(dynamic_shared());
  T* up = z + 8 * kCols * row_stride<T>(rank_rows);
  float* bias = reinterpret_cast<float*>(up + pair.columns * row_stride<T>(rank_rows));
  copy_up(op, up, bias, n0, pair.columns, rank_rows);
  cp_async_commit();
  wait_for_kernel_ahead();
  let_kernel_behind_begin();
  const int rows = op.M - m0 < 8 * kCols ? int(op.M - m0) : 8 * kCols;
  for (int i = threadIdx.x; i < rows * rank_rows; i += kThreads) {
    const int m = i / rank_rows, r = i % rank_rows;
    float sum = 0;
    if (r < op.R) {
#pragma unroll 4
      for (int64_t part = 0; part < pair.parts; ++part) {
        sum += op.workspace[(part * op.M + m0 + m) * op.R + r];
      }
    }
    store(z + m * row_stride<T>(rank_rows) + r, sum);
  }
  cp_async_wait<0>();
  __syncthreads();
  const int64_t end = n0 + pair.columns < op.N ? n0 + pair.columns : op.N;
  expand<T, kCols>(op, activation, z, up, bias, m0, n0, end, pair.columns, rank_rows);
}

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
__global__ void general_kernel(LowRankLinear op, Activation activation) {
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

int64_t round_up(int64_t size, int64_t to) { return ceil_div(size, to) * to; }

// run(std::integral_constant<int, kCols>), for 8 kCols rows of x at once.
template <typename Run>
const char* with_tokens(int tokens, Run run) {
  switch (tokens) {
    case 1:
      return run(std::integral_constant<int, 1>{});
    case 2:
      return run(std::integral_constant<int, 2>{});
    case 4:
      return run(std::integral_constant<int, 4>{});
    default:
      return run(std::integral_constant<int, 8>{});
  }
}
int tokens_for(int64_t M) { return M <= 8 ? 1 : M <= 16 ? 2 : M <= 32 ? 4 : 8; }

// What of the current device decides.
struct Device {
  int64_t shared = 0;    // bytes that a block may have
  int clusters[5] = {};  // how many of 1, 2, 4, 8 and 16 blocks with all of it run at once
  int at_once(int blocks) const { return clusters[std::bit_width(unsigned(blocks)) - 1]; }
  int widest() const {
    int blocks = 16;
    while (blocks > 0 && at_once(blocks) == 0) blocks /= 2;
    return blocks;
  }
};

Device current_device() {
  return once_a_device([] {
    Device device;
    device.shared = most_shared();
    for (int i = 0; i < 5; ++i) {
      const Grid grid{1 << i, dim3{kThreads}, device.shared, 1 << i};
      device.clusters[i] = clusters_at_once(cluster_kernel<__nv_bfloat16, 2, 8>, grid);
    }
    return device;
  });
}

// What an H100 does in a microsecond: bytes from L2 to one block and to all, bytes of other blocks'
// shared memory, multiplications of one block (float32 ones: a sixteenth). And what it waits for
// the first of a batch of loads.
constexpr double kLink = 110e3, kL2 = 5.5e6, kNeighbour = 60e3, kMultiplies = 2.2e6;
constexpr double kLatency = 0.8;

int tiles_for(int64_t R) { return R <= kWarps * kTile ? 1 : 2; }  // of a warp

// Where things lie in shared memory; all but up and bias take the place of the chunks.
void lay_out(Plan& plan, int64_t size, int tiles, int depth) {
  const int64_t unit = 16 / size, rows = 8 * plan.tokens, row = (plan.rank_rows + unit) * size;
  const int64_t ring = kStages * (plan.rank_rows + rows) * (depth + unit) * size;
  plan.z = warp_groups(plan.rank_rows, tiles) * rows * part_stride(plan.rank_rows) *
           int64_t{sizeof(float)};
  plan.up = std::max(ring, plan.z + rows * row);
  plan.bias = plan.up + plan.batch * row;
  plan.bytes = plan.bias + plan.batch * int64_t{sizeof(float)};
}

// Shares out the columns of y: how many clusters weighs what each loads against what all load.
// There is room for so many columns at once. Returns the predicted microseconds.
double share_out(Plan& plan, const LowRankLinear& op, const Device& device, int64_t size,
                 int64_t room) {
  const int64_t at_once = device.at_once(plan.cluster), rows = 8 * plan.tokens;
  const int64_t slices = ceil_div(op.M, rows);
  double best = INFINITY;
  for (int64_t clusters = 1; clusters == 1 || clusters <= at_once; ++clusters) {
    const int64_t columns = round_up(ceil_div(op.N, clusters * plan.cluster), kTile);
    const int64_t z_loads = (plan.rank_rows + rows) * plan.part, y_loads = columns * plan.rank_rows;
    const double bytes = double(size * (z_loads + y_loads));
    const double multiplies = double(plan.rank_rows * rows) * double(plan.part + columns);
    const double own =
        std::max(bytes / kLink, multiplies / (size == 2 ? kMultiplies : kMultiplies / 16)) +
        double(rows * plan.rank_rows * 4) / kNeighbour +
        double(ceil_div(columns, room) - 1) * kLatency;
    const int64_t all = slices * clusters;
    const double time =
        std::max(double(ceil_div(all, at_once)) * own, double(all * plan.cluster) * bytes / kL2);
    if (time >= best) continue;
    best = time;
    plan.clusters = clusters;
    plan.columns = columns;
  }
  return best;
}

// Whether clusters can compute it, and then how. The split of K is the finest there is, so that
// each block loads little; it depends on neither M nor N.
bool plan_clusters(const LowRankLinear& op, int64_t size, const Device& device, Plan& best) {
  if (op.R > kClusterRank || op.R == 0 || op.K == 0 || device.widest() == 0) return false;
  const int tiles = tiles_for(op.R);
  const int depth = int((tiles == 1 ? 256 : 128) / size);
  Plan plan{};
  plan.rank_rows = int(round_up(op.R, tiles * kTile));
  plan.cluster = device.widest();
  const auto part = [&] { return round_up(ceil_div(op.K, plan.cluster), depth); };
  while (plan.cluster > 1 && (plan.cluster - 1) * part() >= op.K) plan.cluster /= 2;
  plan.part = part();
  double best_time = INFINITY;
  for (plan.tokens = tokens_for(op.M); plan.tokens >= 1; plan.tokens /= 2) {
    plan.batch = 0;
    lay_out(plan, size, tiles, depth);
    const int64_t row = (plan.rank_rows + 16 / size) * size + int64_t{sizeof(float)};
    const int64_t room = (device.shared - plan.bytes) / row / kTile * kTile;
    if (room <= 0) continue;
    const double time = share_out(plan, op, device, size, room);
    if (time >= best_time) continue;
    plan.batch = int(std::min(room, plan.columns));
    lay_out(plan, size, tiles, depth);
    best_time = time;
    best = plan;
  }
  return best_time < INFINITY;
}

constexpr int64_t kPairShared = 99 * 1024;  // what every device since sm_80 can give a block

int64_t expand_bytes(int64_t R, int64_t size, int columns, int tokens) {
  const int64_t row = (round_up(R, kTile) + 16 / size) * size;
  return (8 * tokens + columns) * row + columns * int64_t{sizeof(float)};
}

// Whether two launches can compute it, and how. The more parts of K, the more there is to sum.
bool plan_pair(const LowRankLinear& op, int64_t size, Pair& pair) {
  if (op.R == 0 || op.K == 0) return false;
  const int64_t depth = 256 / size;
  pair.parts = std::clamp<int64_t>(std::min(1024 / op.R, op.K / (4 * depth)), 1, 16);
  pair.part = round_up(ceil_div(op.K, pair.parts), depth);
  pair.parts = ceil_div(op.K, pair.part);
  for (pair.tokens = tokens_for(op.M); pair.tokens >= 1; pair.tokens /= 2) {
    for (pair.columns = 2 * kTile; pair.columns >= kTile; pair.columns /= 2) {
      if (expand_bytes(op.R, size, pair.columns, pair.tokens) <= kPairShared) return true;
    }
  }
  return false;
}

template <typename T>
const char* launch_pair(const LowRankLinear& op, Activation activation, const Pair& pair,
                        void* stream) {
  return with_tokens(pair.tokens, [&](auto tokens) {
    constexpr int kCols = decltype(tokens)::value;
    const int64_t slices = ceil_div(op.M, 8 * kCols);
    const int64_t parts = int64_t{kWarps} * 8 * kCols * part_stride(kTile) * sizeof(float);
    const int64_t ring =
        kStages * (kTile + 8 * kCols) * row_stride<T>(kDepth<T, 1>) * int64_t{sizeof(T)};
    Grid first{slices * ceil_div(op.R, kTile) * pair.parts, dim3{kThreads}, std::max(ring, parts)};
    first.early = true;
    const char* error = launch(shrink_kernel<T, kCols>, first, stream, op, pair);
    if (error) return error;
    Grid second{slices * ceil_div(op.N, pair.columns), dim3{kThreads},
                expand_bytes(op.R, sizeof(T), pair.columns, kCols)};
    second.early = true;
    return launch(expand_kernel<T, kCols>, second, stream, op, activation, pair);
  });
}

template <typename T>
const char* launch_clusters(const LowRankLinear& op, Activation activation, const Plan& plan,
                            void* stream) {
  return with_tokens(plan.tokens, [&](auto tokens) {
    constexpr int kCols = decltype(tokens)::value;
    Grid grid{ceil_div(op.M, 8 * kCols) * plan.clusters * plan.cluster, dim3{kThreads}, plan.bytes,
              plan.cluster};
    grid.early = true;
    return tiles_for(op.R) == 1
               ? launch(cluster_kernel<T, 1, kCols>, grid, stream, op, activation, plan)
               : launch(cluster_kernel<T, 2, kCols>, grid, stream, op, activation, plan);
  });
}

}  // namespace

int64_t low_rank_linear_workspace(const LowRankLinear& op, DType dtype) {
  const int64_t size = dtype == DType::float32 ? 4 : 2;
  Plan plan;
  Pair pair;
  if (op.M == 0 || op.N == 0 || plan_clusters(op, size, current_device(), plan)) return 0;
  return plan_pair(op, size, pair) ? pair.parts * op.M * op.R : 0;
}

const char* launch_low_rank_linear(const LowRankLinear& op, DType dtype, Activation activation,
                                   void* stream) {
  if (op.M == 0 || op.N == 0) return nullptr;
  const Device device = current_device();
  return with_dtype(dtype, [&](auto zero) -> const char* {
    using T = decltype(zero);
    Plan plan;
    Pair pair;
    if (op.workspace && plan_pair(op, sizeof(T), pair)) {
      return launch_pair<T>(op, activation, pair, stream);
    }
    if (plan_clusters(op, sizeof(T), device, plan)) {
      return launch_clusters<T>(op, activation, plan, stream);
    }
    const Grid grid{op.M, dim3{kWarp, kWarps}, op.R * int64_t{sizeof(float)}};
    return launch(general_kernel<T>, grid, stream, op, activation);
  });
}

}  // namespace prunelm::cuda
