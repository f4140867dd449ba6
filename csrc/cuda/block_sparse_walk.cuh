// How the tiles of block_sparse_tiles.cuh are laid out, and a warp's way through its stored blocks.
#pragma once

#include "cuda/block_sparse_sums.cuh"
#include "cuda/device.cuh"

namespace prunelm::cuda::tiles {

constexpr int kStepBytes = 32;    // of a row of x, multiplied at once
constexpr int kChunkBytes = 128;  // of a row of x, fetched at once
constexpr int kRingBytes = 8192;  // weights on their way to a warp: 64 KB a block of 8
constexpr int kMaxStages = 16;
constexpr int kMaxWarps = 8;
constexpr int kEnd = INT32_MAX;
constexpr int kSlices = 8;   // the largest cluster that runs without asking
constexpr int kSharers = 4;  // thread blocks of a cluster that read the same rows of x

enum class Mode {
  sliced,  // columns are cut over thread blocks, for few rows
  plain,   // a thread block walks all columns (before sm_90)
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
  static constexpr int kSlotBytes = kStepBytes * kStrip, kSlots = kRingBytes / kSlotBytes;
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

// A warp's way through the stored blocks of a strip, in ascending order: 16 columns a step. In
// memory one step follows the other.
template <typename T>
struct Walk {
  static constexpr int kStep = kStepBytes / int(sizeof(T));

  const T* weights;   // of the step: column by column, outputs beside each other
  int next, end;      // stored blocks; `next` is the one after the current one
  int base;           // of the window of columns
  int window, ahead;  // the columns of blocks base + lane and base + 32 + lane
  int inner;          // column within the current block
  int k;              // column of x; kEnd when there is none left

  __device__ int load(const int32_t* col, int i) const {
    i += int(threadIdx.x % kWarp);
    return i < end ? col[i] : 0;
  }

  __device__ void begin(const BlockSparseLinear& op, int64_t n, int first, int last) {
    weights = static_cast<const T*>(op.values) + first * op.bk * op.bn + n % op.bn;
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
    weights += kStep * op.bn;
    inner += kStep;
    k += kStep;
    // What a last block holds past K is nobody's.
    if (inner >= int(op.bk) || k >= op.K) enter(op);
  }
};

// A chunk of x and the place where it lies; it takes that of the chunk `stages` before it.
struct Place {
  int chunk = -1, stage = -1;
  uint32_t turn = 0;  // how many chunks have lain there before

  __device__ void next(int stages) {
    ++chunk;
    if (++stage == stages) {
      stage = 0;
      ++turn;
    }
  }
};

}  // namespace prunelm::cuda::tiles
