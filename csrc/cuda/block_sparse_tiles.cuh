// Block-sparse linear for blocks of at least 16 outputs by 16 columns (8 for float32), in tiles.
//
// A warp computes 32 neighbouring outputs ("strips": two of 16 or one of 32, each within one block
// row) for kRows rows of x. It walks the stored blocks of its strips a step of columns at a time.
// Weights come straight from memory into a ring of its own, several steps ahead; rows of x come in
// chunks of columns that all warps share and fetch together. Chunks are handed over by mbarriers,
// so that a warp with many stored blocks in one chunk may be some chunks behind the others.
//
// Many rows are bound by what comes from the second-level cache, and with small blocks most of that
// is x: neighbours in a cluster, which compute other outputs for the same rows, multicast it.
//
// For few rows columns are cut into kSlices, each a thread block of a cluster (or, where no such
// cluster fits, added up by a second kernel): the weights are what takes time, and all
// multiprocessors are needed to fetch them. Slices depend on K and the block alone and are added in
// order: among few rows, a row's result does not depend on M.
#pragma once

#include "cuda/async_copy.cuh"
#include "cuda/block_sparse_sums.cuh"
#include "cuda/block_sparse_walk.cuh"
#include "cuda/cluster.cuh"
#include "cuda/device.cuh"

namespace prunelm::cuda::tiles {

template <typename T, int kStrip, int kRows, Mode kMode>
struct Kernel {
  static constexpr bool kSliced = kMode == Mode::sliced;
  static constexpr int kStrips = kOutputs / kStrip;
  static constexpr int kStep = Walk<T>::kStep, kChunk = kChunkBytes / int(sizeof(T));
  static constexpr int kPiece = 16 / int(sizeof(T));  // numbers that are copied at once
  using WarpSums = Sums<T, kStrip, kRows>;
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
      cluster_arrive_relaxed();
      cluster_wait();
    } else {
      __syncthreads();
    }
    wait_for_kernel_ahead();
    let_kernel_behind_begin();
    WarpSums sums;
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
  __device__ void fetch_x(int chunk, int stage) const {
    if constexpr (kMode == Mode::shared) {
      fetch_x_for_all(chunk, stage);
    } else {
      fetch_own_x(chunk, stage);
    }
  }

  // A lane fetches a row for the whole cluster. Rows and columns past the end stay as they are:
  // what they are multiplied to is not stored, or they are not multiplied.
  __device__ void fetch_x_for_all(int chunk, int stage) const {
    const int sharers = int(cluster_size());
    const int64_t k = k0 + int64_t{chunk} * kChunk;
    const uint32_t bytes = uint32_t(min(int64_t{kChunk}, op.K - k)) * uint32_t(sizeof(T));
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

  __device__ void fetch_own_x(int chunk, int stage) const {
    constexpr int kPieces = kChunkBytes / 16,
                  kLines = kWarp / kPieces;  // rows that a warp fetches at once
    const T* x = static_cast<const T*>(op.x);
    const int piece = lane % kPieces;
    const int64_t k = k0 + int64_t{chunk} * kChunk + piece * kPiece;
    unsigned char* to = x_stage(stage) + piece * 16;
    for (int first = warp * kLines; first < kRows; first += tiles.warps * kLines) {
      const int row = first + lane / kPieces;
      const bool valid = m0 + row < op.M && k < op.K;
      if (kRows % kLines == 0 || row < kRows) {
        cp_async<16>(to + row * kPitch, valid ? x + (m0 + row) * op.K + k : x, valid);
      }
    }
    mbarrier_arrive_after_copies(full(stage));
  }

  // Goes on to the next chunk, which all warps do for all chunks, in order. The place of a chunk
  // that was left a while ago is filled anew as soon as all have left it.
  __device__ void enter(Place& here, Place& left) const {
    here.next(tiles.stages);
    if (here.chunk >= (tiles.stages + 1) / 2) {
      left.next(tiles.stages);
      if (left.chunk + tiles.stages < chunks) {
        mbarrier_wait(empty(left.stage), left.turn);
        fetch_x(left.chunk + tiles.stages, left.stage);
      }
    }
    mbarrier_wait(full(here.stage), here.turn);
  }

  // All lanes have read what they need: a step ends with a __syncwarp.
  __device__ void leave(const Place& here) const {
    uint64_t* barrier = empty(here.stage);
    if constexpr (kMode == Mode::shared) {
      if (lane < int(cluster_size())) mbarrier_arrive_at(barrier, uint32_t(lane));
    } else {
      if (lane == 0) mbarrier_arrive(barrier);
    }
  }

  // The stored blocks of strip s of this warp, within the slice.
  __device__ Walk<T> walk(int s) const {
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
    Walk<T> walk;
    walk.begin(op, n, first, last);
    return walk;
  }

  // Asks for the weights of the next step, if there is one.
  __device__ bool fetch_weights(Walk<T> (&walks)[kStrips], int i) const {
    int s = 0;
    if constexpr (kStrips == 2) s = walks[1].k < walks[0].k;
    Walk<T> current = walks[0];
    if constexpr (kStrips == 2) {
      if (s) current = walks[1];
    }
    if (current.k == kEnd) return false;
    constexpr int kPieces = kStrip / kPiece, kLines = kWarp / kPieces;
    const int piece = lane % kPieces;
#pragma unroll
    for (int first = 0; first < kStep; first += kLines) {
      const int line = first + lane / kPieces;
      const bool valid = current.k + line < op.K;
      cp_async<16>(slot(i) + WarpSums::offset(line, piece),
                   current.weights + line * int(op.bn) + piece * kPiece, valid);
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

  __device__ void multiply(WarpSums& sums) const {
    for (int i = 0; i < min(chunks, tiles.stages); ++i) fetch_x(i, i);
    Walk<T> walks[kStrips];
#pragma unroll
    for (int s = 0; s < kStrips; ++s) walks[s] = walk(s);
    int asked = 0;
#pragma unroll 1
    for (int i = 0; i < kSlots - 1; ++i) {
      asked += fetch_weights(walks, i);
      cp_async_commit();
    }
    Place here, left;
    int chunk_end = int(k0);  // column
    for (int i = 0; i < asked; ++i) {
      asked += fetch_weights(walks, i + kSlots - 1);
      cp_async_commit();
      cp_async_wait<kSlots - 1>();
      __syncwarp();
      const int found = slot_column(i), k = found < 0 ? ~found : found;
      while (k >= chunk_end) {
        if (here.chunk >= 0) leave(here);
        enter(here, left);
        chunk_end += kChunk;
      }
      const unsigned char* x = x_stage(here.stage) + (k - (chunk_end - kChunk)) * int(sizeof(T));
      if (kStrips == 1 || found >= 0) {
        sums.template multiply<0>(slot(i), x);
      } else {
        sums.template multiply<kStrips - 1>(slot(i), x);
      }
      __syncwarp();
    }
    // Chunks that nobody here needs are entered all the same: the others count on it.
    if (here.chunk >= 0) leave(here);
    while (here.chunk + 1 < chunks) {
      enter(here, left);
      leave(here);
    }
  }

  __device__ float* kept() const { return reinterpret_cast<float*>(shared + layout.columns); }

  // The slice's sums, [kRows, outputs], in shared memory.
  __device__ void keep(const WarpSums& sums) const {
    float* to = kept() + warp * kOutputs;
    const int pitch = Layout::sums_pitch(tiles);
    sums.each([&](int n, int m, float sum) { to[m * pitch + n] = sum; });
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
      put<4>(m, n, all, activation);
    }
    cluster_arrive_relaxed();
    cluster_wait();  // others may still read here
  }

  // Finishes neighbours in a row of y from their sums, those before N; n is a multiple of kCount.
  template <int kCount>
  __device__ void put(int64_t m, int64_t n, const float* sums, Activation activation) const {
    struct alignas(kCount * sizeof(T)) Piece {
      T at[kCount];
    } out;
#pragma unroll
    for (int j = 0; j < kCount; ++j) {
      float sum = sums[j];
      if (op.bias && n + j < op.N) sum += to_float(static_cast<const T*>(op.bias)[n + j]);
      store(&out.at[j], activate(sum, activation));
    }
    T* const to = static_cast<T*>(op.y) + m * op.N + n;
    if (op.N % kCount == 0) {
      *reinterpret_cast<Piece*>(to) = out;
    } else {
#pragma unroll
      for (int j = 0; j < kCount; ++j) {
        if (n + j < op.N) to[j] = out.at[j];
      }
    }
  }

  // The warp's [kRows, 32] of y, in two halves.
  __device__ void write(const WarpSums& sums, Activation activation) const {
    write_rows<0>(sums, activation);
    __syncwarp();
    write_rows<kRows / 2>(sums, activation);
  }

  // Half of the rows, turned over in the warp's ring: neighbours in memory go together, and the
  // activation is compiled for 8 sums, not for all of a thread's, which no instruction cache holds.
  template <int kFrom>
  __device__ void write_rows(const WarpSums& sums, Activation activation) const {
    constexpr int kHalf = kRows / 2;
    static_assert(kHalf * kOutputs * int(sizeof(float)) <= kRingBytes);
    float* const turned = reinterpret_cast<float*>(slot(0));
    const auto at = [turned](int row, int eighth) {
      return turned + row * kOutputs + (eighth ^ row / 2 % 4) * 8;
    };
    sums.template each<kFrom, kFrom + kHalf>(
        [&](int n, int m, float sum) { at(m - kFrom, n / 8)[n % 8] = sum; });
    __syncwarp();
#pragma unroll 1
    for (int i = lane; i < kHalf * 4; i += kWarp) {
      const int64_t m = m0 + kFrom + i / 4, n = n0 + warp * kOutputs + i % 4 * 8;
      if (m >= op.M || n >= op.N) continue;
      put<8>(m, n, at(i / 4, i % 4), activation);
    }
  }
};

template <typename T, int kStrip, int kRows, Mode kMode>
__global__ void __launch_bounds__(kMaxWarps* kWarp, kRows == 128 || sizeof(T) == 4 ? 1 : 2)
    block_sparse_tiles_kernel(BlockSparseLinear op, Tiles tiles, Activation activation) {
#ifdef __CUDA_ARCH__
  // The launcher takes one of the two, and compiling them takes longest.
  constexpr bool used = kMode == Mode::sliced || (kMode == Mode::shared) == (__CUDA_ARCH__ >= 900);
#else
  constexpr bool used = true;
#endif
  if constexpr (used) Kernel<T, kStrip, kRows, kMode>(op, tiles).run(activation);
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

}  // namespace prunelm::cuda::tiles
