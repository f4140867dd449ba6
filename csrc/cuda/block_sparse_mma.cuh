// Block-sparse linear with matrix instructions: 16-bit numbers, blocks of 16 x 16 and multiples.
//
// A warp computes 32 neighbouring outputs ("strips": two of 16 or one of 32, each within one block
// row) for kRows rows of x. It walks the stored blocks of its strips in steps of 16 columns.
// Weights come straight from memory into a ring of its own, several steps ahead, so that warps
// never wait for each other; rows of x come in chunks of columns that all warps share, fetched by
// one more warp. Weights are the instruction's 16-high operand and rows of x its 8-wide one, so
// that few rows waste little.
//
// Many rows are bound by what comes from the second-level cache, and with small blocks most of that
// is x: neighbours in a cluster, which compute other outputs for the same rows, multicast it.
//
// For few rows columns are cut into kSlices, each a thread block of a cluster (or, before sm_90,
// added up by a second kernel): the weights are what takes time, and all multiprocessors are needed
// to fetch them. Slices depend on K and the block alone and are added in order: a row's result does
// not depend on M.
#pragma once

#include "cuda/async_copy.cuh"
#include "cuda/cluster.cuh"
#include "cuda/device.cuh"
#include "cuda/matrix.cuh"

namespace prunelm::cuda::mma {

constexpr int kOutputs = 32;  // of a warp
constexpr int kStep = 16;     // columns of x multiplied at once
constexpr int kChunk = 64;    // columns of x fetched at once: blocks divide it or it divides them
constexpr int kPitch = 144;   // bytes between rows of a chunk: 16 more, to lie in other banks
constexpr int kRingBytes = 8192;  // weights on their way to a warp: 64 KB a block of 8
constexpr int kMaxStages = 16;
constexpr int kMaxWarps = 8;
constexpr int kEnd = INT32_MAX;
constexpr int kSlices = 8;   // the largest cluster that every device with clusters can run
constexpr int kSharers = 4;  // thread blocks of a cluster that read the same rows of x

enum class Mode {
  sliced,  // columns are cut over thread blocks, for few rows
  plain,   // a thread block walks all columns
  shared,  // so does each of a cluster, and they fetch the rows of x for one another (sm_90)
};

// What the launcher decided; equal for all thread blocks.
struct Tiles {
  int warps;      // of a thread block
  int stages;     // chunks in flight
  int64_t slice;  // columns of a slice; all of them where there is one
};

template <int kStrip>
struct Ring {
  static constexpr int kSlotBytes = kStep * kStrip * 2, kSlots = kRingBytes / kSlotBytes;
};

// Where a thread block keeps what in shared memory.
struct Layout {
  int columns;  // offset of the column of each ring's slot
  int rings;    // offset
  int x;        // offset
  int bytes;

  __host__ __device__ Layout(const Tiles& tiles, int rows, int slots, bool sliced) {
    columns = 2 * kMaxStages * int(sizeof(uint64_t));
    rings = columns + (tiles.warps * slots * 4 + 15) / 16 * 16;
    x = rings + tiles.warps * kRingBytes;
    bytes = x + tiles.stages * rows * kPitch;
    // The sums of a slice take the place of all but the barriers.
    const int sums = sliced ? columns + rows * sums_pitch(tiles) * 4 : 0;
    bytes = bytes > sums ? bytes : sums;
  }
  __host__ __device__ static int sums_pitch(const Tiles& tiles) {
    return tiles.warps * kOutputs + 4;  // rows 2t of a fragment fall into banks 8t
  }
};

// The first i in [begin, end) with col[i] >= bound, found by a warp together.
__device__ inline int first_at_least(const int32_t* col, int begin, int end, int64_t bound) {
  int count = 0;
  for (int i = begin + int(threadIdx.x % kWarp); i - int(threadIdx.x % kWarp) < end; i += kWarp) {
    count += __popc(__ballot_sync(kAllLanes, i < end && col[i] < bound));
  }
  return begin + count;
}

// A warp's way through the stored blocks of a strip, in ascending order: 16 columns a step.
struct Walk {
  int next, end;      // stored blocks; `next` is the one after the current one
  int base;           // of the window of columns
  int window, ahead;  // the columns of blocks base + lane and base + 32 + lane
  int inner;          // column within the current block
  int k;              // column of x; kEnd when there is none left

  __device__ int load(const int32_t* col, int i) const {
    i += int(threadIdx.x % kWarp);
    return i < end ? col[i] : 0;
  }

  __device__ void begin(const BlockSparseLinear& op, int first, int last) {
    next = base = first;
    end = last;
    window = load(op.col, base);
    ahead = load(op.col, base + kWarp);
    enter(op);
  }

  // Goes to the next stored block.
  __device__ void enter(const BlockSparseLinear& op) {
    if (next >= end) {
      k = kEnd;
      return;
    }
    if (next - base == kWarp) {
      base = next;
      window = ahead;
      ahead = load(op.col, base + kWarp);  // its latency passes while the window is walked
    }
    inner = 0;
    k = __shfl_sync(kAllLanes, window, next - base) * int(op.bk);
    ++next;
  }

  __device__ void step(const BlockSparseLinear& op) {
    inner += kStep;
    k += kStep;
    // What a last block holds past K is nobody's.
    if (inner >= int(op.bk) || k >= op.K) enter(op);
  }
};

template <typename T, int kStrip, int kRows, Mode kMode>
struct Kernel {
  static constexpr bool kSliced = kMode == Mode::sliced;
  static constexpr int kStrips = kOutputs / kStrip, kHalves = kStrip / 16, kTiles = kRows / 8;
  static constexpr int kSlots = Ring<kStrip>::kSlots, kSlotBytes = Ring<kStrip>::kSlotBytes;

  const BlockSparseLinear& op;
  const Tiles& tiles;
  const Layout layout;
  unsigned char* const shared;
  const int warp, lane;
  int rank;        // of the slice
  int64_t m0, n0;  // of the thread block
  int64_t k0, k1;  // of the slice
  int chunks;

  __device__ Kernel(const BlockSparseLinear& op, const Tiles& tiles)
      : op(op),
        tiles(tiles),
        layout(tiles, kRows, kSlots, kSliced),
        shared(dynamic_shared()),
        warp(int(threadIdx.x) / kWarp),
        lane(int(threadIdx.x) % kWarp) {
    const int64_t outputs = tiles.warps * kOutputs;
    int64_t groups = (op.N + outputs - 1) / outputs;
    // A cluster's blocks have the same rows: the last of them may have no outputs.
    if constexpr (kMode == Mode::shared) {
      const int64_t sharers = cluster_size();
      groups = (groups + sharers - 1) / sharers * sharers;
    }
    const int64_t tile = kSliced ? blockIdx.x / kSlices : blockIdx.x;
    rank = kSliced ? int(blockIdx.x % kSlices) : 0;
    n0 = tile % groups * outputs;
    m0 = tile / groups * kRows;
    k0 = min(rank * tiles.slice, op.K);
    k1 = min(k0 + tiles.slice, op.K);
    chunks = int((k1 - k0 + kChunk - 1) / kChunk);
  }

  __device__ uint64_t* full(int stage) const { return reinterpret_cast<uint64_t*>(shared) + stage; }
  __device__ uint64_t* empty(int stage) const { return full(kMaxStages + stage); }
  __device__ unsigned char* x_stage(int stage) const {
    return shared + layout.x + stage * kRows * kPitch;
  }
  __device__ unsigned char* slot(int i) const {
    return shared + layout.rings + warp * kRingBytes + i % kSlots * kSlotBytes;
  }
  __device__ int& slot_column(int i) const {
    return reinterpret_cast<int*>(shared + layout.columns)[warp * kSlots + i % kSlots];
  }

  __device__ void run(Activation activation) {
    if (threadIdx.x == 0) {
      const uint32_t warps = uint32_t(tiles.warps);
      for (int stage = 0; stage < tiles.stages; ++stage) {
        mbarrier_init(full(stage), kMode == Mode::shared ? 1 : warps * kWarp);
        mbarrier_init(empty(stage), kMode == Mode::shared ? warps * cluster_size() : warps);
      }
      if constexpr (kMode == Mode::shared) mbarrier_publish();
    }
    if constexpr (kMode == Mode::shared) {
      cluster_sync();
    } else {
      __syncthreads();
    }
    float sums[kStrips][kHalves][kTiles][4]{};
    multiply(sums);
    if constexpr (kSliced) {
      __syncthreads();  // nobody reads weights or x any more
      keep(sums);
      if (op.workspace) {
        hand_over();
      } else {
        finish(activation);
      }
    } else {
      if constexpr (kMode == Mode::shared) cluster_arrive();
      write(sums, activation);
      if constexpr (kMode == Mode::shared) cluster_wait();  // others may still arrive here
    }
  }

  // This warp's share of a chunk of x's columns.
  __device__ void fetch_x(int chunk) const {
    if constexpr (kMode == Mode::shared) {
      fetch_x_for_all(chunk);
    } else {
      fetch_own_x(chunk);
    }
  }

  // A lane fetches a row for the whole cluster. Rows and columns past the end stay as they are:
  // what they are multiplied to is not stored, or they are not multiplied.
  __device__ void fetch_x_for_all(int chunk) const {
    const int stage = chunk % tiles.stages, sharers = int(cluster_size());
    const int64_t k = k0 + int64_t{chunk} * kChunk;
    const uint32_t bytes = uint32_t(min(int64_t{kChunk}, op.K - k)) * 2;
    const int rows = int(min(int64_t{kRows}, op.M - m0));
    if (warp == 0 && lane == 0) mbarrier_arrive_expecting(full(stage), bytes * uint32_t(rows));
    const T* x = static_cast<const T*>(op.x) + m0 * op.K + k;
    const int mine = int(cluster_rank()) * tiles.warps + warp;
    for (int row = mine + lane * sharers * tiles.warps; row < rows;
         row += kWarp * sharers * tiles.warps) {
      copy_to_cluster(x_stage(stage) + row * kPitch, x + row * op.K, bytes, full(stage),
                      uint16_t((1 << sharers) - 1));
    }
  }

  __device__ void fetch_own_x(int chunk) const {
    constexpr int kPieces = kChunk / 8,
                  kLines = kWarp / kPieces;  // rows that a warp fetches at once
    const T* x = static_cast<const T*>(op.x);
    const int piece = lane % kPieces;
    const int64_t k = k0 + int64_t{chunk} * kChunk + piece * 8;
    unsigned char* to = x_stage(chunk % tiles.stages) + piece * 16;
    for (int first = warp * kLines; first < kRows; first += tiles.warps * kLines) {
      const int row = first + lane / kPieces;
      const bool valid = m0 + row < op.M && k < op.K;
      if (kRows % kLines == 0 || row < kRows) {
        cp_async<16>(to + row * kPitch, valid ? x + (m0 + row) * op.K + k : x, valid);
      }
    }
    mbarrier_arrive_after_copies(full(chunk % tiles.stages));
  }

  // Waits for a chunk; all warps enter all chunks, in order. The place of a chunk that was left a
  // while ago, as far as all have left it, takes the next one.
  __device__ void enter(int chunk) const {
    const int left = chunk - (tiles.stages + 1) / 2;
    if (left >= 0 && left + tiles.stages < chunks) {
      uint64_t* barrier = empty(left % tiles.stages);
      if constexpr (kMode == Mode::shared) {
        mbarrier_wait_cluster(barrier, uint32_t(left / tiles.stages));
      } else {
        mbarrier_wait(barrier, uint32_t(left / tiles.stages));
      }
      fetch_x(left + tiles.stages);
    }
    mbarrier_wait(full(chunk % tiles.stages), uint32_t(chunk / tiles.stages));
  }

  __device__ void leave(int chunk) const {
    __syncwarp();
    uint64_t* barrier = empty(chunk % tiles.stages);
    if constexpr (kMode == Mode::shared) {
      if (lane < int(cluster_size())) mbarrier_arrive_at(barrier, uint32_t(lane));
    } else {
      if (lane == 0) mbarrier_arrive(barrier);
    }
  }

  // The stored blocks of strip s of this warp, within the slice.
  __device__ Walk walk(int s) const {
    const int64_t n = n0 + warp * kOutputs + s * kStrip;
    int first = 0, last = 0;
    if (n < op.N) {
      const int64_t row = n / op.bn;
      if (kSliced && op.cut) {
        first = op.cut[row * (kSlices + 1) + rank];
        last = op.cut[row * (kSlices + 1) + rank + 1];
      } else {
        first = op.crow[row];
        last = op.crow[row + 1];
        if constexpr (kSliced) {
          const int64_t width = tiles.slice / op.bk;
          last = first_at_least(op.col, first, last, (rank + 1) * width);
          first = first_at_least(op.col, first, last, rank * width);
        }
      }
    }
    Walk walk;
    walk.begin(op, first, last);
    return walk;
  }

  // Asks for the weights of the next step, 16 columns by kStrip outputs, if there is one.
  __device__ bool fetch_weights(Walk (&walks)[kStrips], int i) const {
    int s = 0;
    if constexpr (kStrips == 2) s = walks[1].k < walks[0].k;
    Walk current = walks[0];
    if constexpr (kStrips == 2) {
      if (s) current = walks[1];
    }
    if (current.k == kEnd) return false;
    const int64_t n = n0 + warp * kOutputs + s * kStrip;
    const T* from = static_cast<const T*>(op.values) +
                    (int64_t{current.next - 1} * op.bk + current.inner) * op.bn + n % op.bn;
    constexpr int kPieces = kStrip / 8, kLines = kWarp / kPieces;
    const int piece = lane % kPieces;
#pragma unroll
    for (int first = 0; first < kStep; first += kLines) {
      const int line = first + lane / kPieces;
      const bool valid = current.k + line < op.K;
      cp_async<16>(slot(i) + weight_offset(line, piece), from + line * op.bn + piece * 8, valid);
    }
    if (lane == 0) slot_column(i) = s ? ~current.k : current.k;
    current.step(op);
    if constexpr (kStrips == 2) {
      if (s) {
        walks[1] = current;
      } else {
        walks[0] = current;
      }
    } else {
      walks[0] = current;
    }
    return true;
  }

  // Where 8 outputs of a column lie in a slot: the 8 columns that are read at once, in all banks.
  __device__ static int weight_offset(int line, int piece) {
    const int turned = kStrip == 32 ? piece ^ (line >> 1 & 3) : piece ^ (line >> 2 & 1);
    return line * kStrip * 2 + turned * 16;
  }

  __device__ void multiply(float (&sums)[kStrips][kHalves][kTiles][4]) const {
    for (int i = 0; i < min(chunks, tiles.stages); ++i) fetch_x(i);
    Walk walks[kStrips];
#pragma unroll
    for (int s = 0; s < kStrips; ++s) walks[s] = walk(s);
    int asked = 0;
#pragma unroll 1
    for (int i = 0; i < kSlots - 1; ++i) {
      asked += fetch_weights(walks, i);
      cp_async_commit();
    }
    int chunk = -1;
    int64_t chunk_end = k0;  // column
    for (int i = 0; i < asked; ++i) {
      asked += fetch_weights(walks, i + kSlots - 1);
      cp_async_commit();
      cp_async_wait<kSlots - 1>();
      __syncwarp();
      const int found = slot_column(i), k = found < 0 ? ~found : found;
      while (k >= chunk_end) {
        if (chunk >= 0) leave(chunk);
        enter(++chunk);
        chunk_end += kChunk;
      }
      const unsigned char* x = x_stage(chunk % tiles.stages) + (k - (chunk_end - kChunk)) * 2;
      if (kStrips == 1 || found >= 0) {
        multiply_step(sums[0], slot(i), x);
      } else {
        multiply_step(sums[kStrips - 1], slot(i), x);
      }
      __syncwarp();
    }
    // Chunks that nobody here needs are entered all the same: the others count on it.
    if (chunk >= 0) leave(chunk);
    while (++chunk < chunks) {
      enter(chunk);
      leave(chunk);
    }
    cp_async_wait<0>();
  }

  // 16 columns of kStrip outputs by kRows rows.
  __device__ void multiply_step(float (&sums)[kHalves][kTiles][4], const unsigned char* weights,
                                const unsigned char* x) const {
    const int matrix = lane / 8, line = lane % 8;
    uint32_t a[kHalves][4];
#pragma unroll
    for (int half = 0; half < kHalves; ++half) {
      ldmatrix_x4_trans(a[half],
                        weights + weight_offset(line + matrix / 2 * 8, half * 2 + matrix % 2));
    }
    if constexpr (kTiles == 1) {
      uint32_t b[2];
      ldmatrix_x2(b, x + line * kPitch + matrix % 2 * 16);
#pragma unroll
      for (int half = 0; half < kHalves; ++half) mma_16x8x16<T>(sums[half][0], a[half], b);
    } else {
#pragma unroll
      for (int pair = 0; pair < kTiles / 2; ++pair) {
        uint32_t b[4];
        ldmatrix_x4(b, x + (pair * 16 + matrix / 2 * 8 + line) * kPitch + matrix % 2 * 16);
        const uint32_t low[2] = {b[0], b[1]}, high[2] = {b[2], b[3]};
#pragma unroll
        for (int half = 0; half < kHalves; ++half) {
          mma_16x8x16<T>(sums[half][2 * pair], a[half], low);
          mma_16x8x16<T>(sums[half][2 * pair + 1], a[half], high);
        }
      }
    }
  }

  // run(output within the warp's 32, row, sum) for each sum of this thread.
  template <typename Run>
  __device__ void each_sum(const float (&sums)[kStrips][kHalves][kTiles][4], Run run) const {
#pragma unroll
    for (int s = 0; s < kStrips; ++s) {
#pragma unroll
      for (int half = 0; half < kHalves; ++half) {
#pragma unroll
        for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            run(s * kStrip + half * 16 + lane / 4 + i / 2 * 8, tile * 8 + lane % 4 * 2 + i % 2,
                sums[s][half][tile][i]);
          }
        }
      }
    }
  }

  __device__ float* kept() const { return reinterpret_cast<float*>(shared + layout.columns); }

  // The slice's sums, [kRows, outputs], in shared memory.
  __device__ void keep(const float (&sums)[kStrips][kHalves][kTiles][4]) const {
    float* to = kept() + warp * kOutputs;
    const int pitch = Layout::sums_pitch(tiles);
    each_sum(sums, [&](int n, int m, float sum) { to[m * pitch + n] = sum; });
  }

  // The slice's sums for the kernel that adds slices up.
  __device__ void hand_over() const {
    __syncthreads();
    const int outputs = tiles.warps * kOutputs, pitch = Layout::sums_pitch(tiles);
    for (int i = int(threadIdx.x); i < kRows * outputs; i += int(blockDim.x)) {
      const int64_t m = m0 + i / outputs, n = n0 + i % outputs;
      if (m >= op.M || n >= op.N) continue;
      op.workspace[(rank * op.M + m) * op.N + n] = kept()[i / outputs * pitch + i % outputs];
    }
  }

  // Each block of the cluster adds an eighth of the outputs up over all slices, in order.
  __device__ void finish(Activation activation) const {
    const int outputs = tiles.warps * kOutputs, pitch = Layout::sums_pitch(tiles);
    cluster_sync();
    const int own = outputs / kSlices;
    for (int i = int(threadIdx.x) * 4; i < kRows * own; i += int(blockDim.x) * 4) {
      const int row = i / own, column = rank * own + i % own;
      const int64_t m = m0 + row, n = n0 + column;
      if (m >= op.M || n >= op.N) continue;
      float4 sum{0, 0, 0, 0};
#pragma unroll
      for (int slice = 0; slice < kSlices; ++slice) {
        const float4 more = *reinterpret_cast<const float4*>(map_shared(kept(), uint32_t(slice)) +
                                                             row * pitch + column);
        sum = {sum.x + more.x, sum.y + more.y, sum.z + more.z, sum.w + more.w};
      }
      const float all[4] = {sum.x, sum.y, sum.z, sum.w};
      for (int j = 0; j < 4 && n + j < op.N; ++j) put(m, n + j, all[j], activation);
    }
    cluster_sync();  // others may still read here
  }

  __device__ void put(int64_t m, int64_t n, float sum, Activation activation) const {
    if (op.bias) sum += to_float(static_cast<const T*>(op.bias)[n]);
    store(static_cast<T*>(op.y) + m * op.N + n, activate(sum, activation));
  }

  // The warp's [kRows, 32] of y, turned over in its ring so that neighbours in memory go together.
  __device__ void write(const float (&sums)[kStrips][kHalves][kTiles][4],
                        Activation activation) const {
    static_assert(kSliced || kRows * kOutputs * int(sizeof(T)) <= kRingBytes);
    T* turned = reinterpret_cast<T*>(slot(0));
    const int64_t n_warp = n0 + warp * kOutputs;
    const auto at = [](int m, int n) { return m * kOutputs + ((n / 8 ^ m / 2 % 4) * 8 + n % 8); };
    each_sum(sums, [&](int n, int m, float sum) {
      if (op.bias && n_warp + n < op.N) sum += to_float(static_cast<const T*>(op.bias)[n_warp + n]);
      store(turned + at(m, n), activate(sum, activation));
    });
    __syncwarp();
    for (int i = lane; i < kRows * 4; i += kWarp) {
      const int row = i / 4;
      const int64_t m = m0 + row, n = n_warp + i % 4 * 8;
      if (m >= op.M || n >= op.N) continue;
      const T* from = turned + at(row, i % 4 * 8);
      T* to = static_cast<T*>(op.y) + m * op.N + n;
      if (op.N % 8 == 0) {
        *reinterpret_cast<uint4*>(to) = *reinterpret_cast<const uint4*>(from);
      } else {
        for (int j = 0; j < 8 && n + j < op.N; ++j) to[j] = from[j];
      }
    }
  }
};

template <typename T, int kStrip, int kRows, Mode kMode>
__global__ void __launch_bounds__(kMaxWarps* kWarp, kRows == 128 ? 1 : 2)
    block_sparse_mma_kernel(BlockSparseLinear op, Tiles tiles, Activation activation) {
  Kernel<T, kStrip, kRows, kMode>(op, tiles).run(activation);
}

// A thread adds one element of y up over the slices in the workspace, in order.
template <typename T>
__global__ void add_slices_kernel(BlockSparseLinear op, Activation activation) {
  const int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x, size = op.M * op.N;
  if (i >= size) return;
  float sum = 0;
  for (int slice = 0; slice < kSlices; ++slice) sum += op.workspace[slice * size + i];
  if (op.bias) sum += to_float(static_cast<const T*>(op.bias)[i % op.N]);
  store(static_cast<T*>(op.y) + i, activate(sum, activation));
}

}  // namespace prunelm::cuda::mma
