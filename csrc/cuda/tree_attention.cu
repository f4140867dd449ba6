// Self-attention of new nodes of a token tree; contract in prunelm/ops/tree_attention.py.
#include <cmath>
#include <type_traits>

#include "cuda/device.cuh"

namespace prunelm::cuda {
namespace {

constexpr int kThreads = 128, kWarps = kThreads / kWarp;
// Up to so many rows, one thread each, a block finds those among its row's ancestors, takes their
// keys from qkv, and nothing waits for the pool to be written. More are stored by a launch before.
constexpr int64_t kMostAtOnce = kThreads;

enum Part { kQuery, kKey, kValue };

__device__ inline float from_bits(uint32_t bits, float) { return __uint_as_float(bits); }
__device__ inline float from_bits(uint32_t bits, __half) {
  return __half2float(__ushort_as_half(uint16_t(bits)));
}
__device__ inline float from_bits(uint32_t bits, __nv_bfloat16) {
  return __bfloat162float(__ushort_as_bfloat16(uint16_t(bits)));
}

// Numbers that one load brings, kept as it brings them: each in a register of its own would be too
// many registers.
template <typename T, int kNumbers>
struct Piece {
  using Word = std::conditional_t<(sizeof(T) * kNumbers < 4), uint16_t, uint32_t>;
  static constexpr int kBits = 8 * sizeof(T), kWords = sizeof(T) * kNumbers / sizeof(Word);
  static constexpr int kOfWord = kNumbers / kWords;
  struct alignas(sizeof(Word) * kWords) Words {
    Word at[kWords];
  } words{};

  __device__ void read(const T* from) { words = *reinterpret_cast<const Words*>(from); }
  __device__ float at(int i) const {
    return from_bits(words.at[i / kOfWord] >> (i % kOfWord * kBits), T{});
  }
};

template <typename T>
__device__ const T* part_of(const TreeAttention& op, Part part, int r, int h) {
  return static_cast<const T*>(op.qkv) + ((int64_t{3} * r + part) * op.H + h) * op.D;
}

// Number e of a row's query or key, turned. The rounding is fixed, so that a key has the same bits
// wherever it is computed.
template <typename T>
__device__ float turned(const TreeAttention& op, Part part, int r, int h, int e) {
  const int half = int(op.D) / 2;
  const bool first = e < half;
  const int64_t angle = int64_t{r} * half + (first ? e : e - half);
  const T* const x = part_of<T>(op, part, r, h);
  const float across =
      to_float(x[first ? e + half : e - half]) * to_float(static_cast<const T*>(op.sin)[angle]);
  return fmaf(to_float(x[e]), to_float(static_cast<const T*>(op.cos)[angle]),
              first ? -across : across);
}

// The slot that a row's key and value go to, or -1 where its length or slot is out of range.
__device__ inline int64_t slot_of(const TreeAttention& op, int r, int64_t length) {
  if (length < 1 || length > op.P) return -1;
  const int64_t slot = op.path[r * op.P + length - 1];
  return slot >= 0 && slot < op.C ? slot : -1;
}

// One block stores the key and value of a row's head.
template <typename T>
__global__ __launch_bounds__(kThreads) void tree_attention_store_kernel(const TreeAttention op) {
  const int r = int(blockIdx.x) / int(op.H), h = int(blockIdx.x) % int(op.H);
  const int64_t slot = slot_of(op, r, op.length[r]);
  if (slot < 0) return;
  const int64_t to = (slot * op.H + h) * op.D;
  for (int e = threadIdx.x; e < op.D; e += kThreads) {
    store(static_cast<T*>(op.key) + to + e, turned<T>(op, kKey, r, h, e));
    static_cast<T*>(op.value)[to + e] = part_of<T>(op, kValue, r, h)[e];
  }
}

// What scores are held against: their maximum, or anything finite where no key has any weight.
__device__ inline float base_of(float high) { return high == -INFINITY ? 0 : high; }

// A softmax to the base 2 over some keys: of exp2(score - high) the sum, and the values' sum.
template <int kNumbers>
struct Softmax {
  float high = -INFINITY, sum = 0, mixed[kNumbers] = {};

  // Makes the maximum at least `other`; returns what scores are held against from now on.
  __device__ float raise(float other) {
    const float highest = fmaxf(high, other), base = base_of(highest), scale = exp2f(high - base);
    high = highest;
    sum *= scale;
    for (float& x : mixed) x *= scale;
    return base;
  }
};

// What a block shares; numbers past D are zeros.
template <typename T, int kWidth, int kNumbers>
struct Shared {
  alignas(16) float query[kWidth];           // turned and scaled
  alignas(16) T key[kWidth], value[kWidth];  // the row's own
  unsigned ancestors[kWarps];                // a bit for each row that is an ancestor of this one
  int depth[kThreads];                       // of those rows: where in the path
  struct {
    alignas(16) T key[kNumbers], value[kNumbers];
  } made[kThreads];  // what a thread needs of such a row
  float high[kWarps], sum[kWarps], mixed[kWarps][kWidth];
};

// How lanes share a key: kLanes of them hold kPieces times kVector of its numbers each, and so many
// keys are on their way to a lane at once.
template <typename T, int kLanes, int kVector, int kPieces>
struct Keys {
  static constexpr int kNumbers = kVector * kPieces, kWidth = kLanes * kNumbers;
  static constexpr int kTeams = kThreads / kLanes, kAtOnce = kPieces == 1 ? 4 : 1;
  using Mine = Piece<T, kVector>;

  const TreeAttention& op;
  Shared<T, kWidth, kNumbers>& shared;
  const int h, lane, D = int(op.D);
  float query[kNumbers];

  // The first of piece i's numbers.
  __device__ int begin(int i) const { return (i * kLanes + lane) * kVector; }

  __device__ float dot(const Mine (&key)[kPieces]) const {
    float sum = 0;
#pragma unroll
    for (int i = 0; i < kNumbers; ++i) {
      sum = fmaf(query[i], key[i / kVector].at(i % kVector), sum);
    }
#pragma unroll
    for (int lanes = kLanes / 2; lanes > 0; lanes /= 2) {
      sum += __shfl_xor_sync(kAllLanes, sum, lanes);
    }
    return sum;
  }

  // The path's last key, the row's own, if this is the team that takes it.
  __device__ void begin_with_own(bool mine, Softmax<kNumbers>& softmax) {
    Mine key[kPieces], value[kPieces];
#pragma unroll
    for (int i = 0; i < kPieces; ++i) {
      key[i].read(shared.key + begin(i));
      value[i].read(shared.value + begin(i));
#pragma unroll
      for (int j = 0; j < kVector; ++j) query[i * kVector + j] = shared.query[begin(i) + j];
    }
    const float score = dot(key);
    if (!mine) return;
    softmax.high = score;
    softmax.sum = 1;
#pragma unroll
    for (int i = 0; i < kNumbers; ++i) softmax.mixed[i] = value[i / kVector].at(i % kVector);
  }

  __device__ void read(const void* pool, int64_t slot, Mine (&to)[kPieces]) const {
    const T* const from = static_cast<const T*>(pool) + (slot * op.H + h) * D;
#pragma unroll
    for (int i = 0; i < kPieces; ++i) {
      if (begin(i) < D) to[i].read(from + begin(i));
    }
  }

  // A row's key as it will be in the pool, and its value; by way of shared memory, since a loop
  // that is rolled up cannot write to registers.
  __device__ void make(int r, Mine (&key)[kPieces], Mine (&value)[kPieces]) const {
    auto& made = shared.made[threadIdx.x];
#pragma unroll 1
    for (int i = 0; i < kNumbers; ++i) {
      const int e = begin(i / kVector) + i % kVector;
      if (e >= D) continue;
      store(&made.key[i], turned<T>(op, kKey, r, h, e));
      made.value[i] = part_of<T>(op, kValue, r, h)[e];
    }
#pragma unroll
    for (int i = 0; i < kPieces; ++i) {
      if (begin(i) >= D) continue;
      key[i].read(made.key + i * kVector);
      value[i].read(made.value + i * kVector);
    }
  }

  // The row of this call that stands at p of the path, or -1.
  __device__ int row_at(int p) const {
#pragma unroll 1
    for (int warp = 0; warp < kWarps; ++warp) {
#pragma unroll 1
      for (unsigned left = shared.ancestors[warp]; left; left &= left - 1) {
        const int r = warp * kWarp + __ffs(int(left)) - 1;
        if (shared.depth[r] == p) return r;
      }
    }
    return -1;
  }

  // The slots at p, p + kTeams and so on, where before `last`; so early that they are there in
  // time.
  __device__ void look_ahead(const int64_t* path, int p, int last, int64_t (&slot)[kAtOnce]) const {
#pragma unroll
    for (int k = 0; k < kAtOnce; ++k) slot[k] = p + k * kTeams < last ? path[p + k * kTeams] : -1;
  }

  // Adds the keys of those slots, and looks ahead.
  __device__ void add(const int64_t* path, int p, int last, bool any_rows,
                      int64_t (&slots)[kAtOnce], Softmax<kNumbers>& softmax) const {
    bool pooled[kAtOnce];
    int row[kAtOnce];
    Mine key[kAtOnce][kPieces], value[kAtOnce][kPieces];
    float score[kAtOnce], high = -INFINITY;
#pragma unroll
    for (int k = 0; k < kAtOnce; ++k) {
      pooled[k] = slots[k] >= 0 && slots[k] < op.C;
      row[k] = any_rows && pooled[k] ? row_at(p + k * kTeams) : -1;
    }
#pragma unroll
    for (int k = 0; k < kAtOnce; ++k) {
      if (!pooled[k] || row[k] >= 0) continue;
      read(op.key, slots[k], key[k]);
      read(op.value, slots[k], value[k]);
    }
    look_ahead(path, p + kAtOnce * kTeams, last, slots);
#pragma unroll
    for (int k = 0; k < kAtOnce; ++k) {
      if (row[k] >= 0) make(row[k], key[k], value[k]);
    }
#pragma unroll
    for (int k = 0; k < kAtOnce; ++k) {
      score[k] = dot(key[k]);
      if (!pooled[k]) score[k] = p + k * kTeams < last ? NAN : -INFINITY;
      high = fmaxf(high, score[k]);
    }
    const float base = softmax.raise(high);
#pragma unroll
    for (int k = 0; k < kAtOnce; ++k) {
      const float weight = exp2f(score[k] - base);
      softmax.sum += weight;
#pragma unroll
      for (int i = 0; i < kNumbers; ++i) {
        softmax.mixed[i] = fmaf(weight, value[k][i / kVector].at(i % kVector), softmax.mixed[i]);
      }
    }
  }

  // Brings what the warp's teams have found together.
  __device__ void merge_teams(Softmax<kNumbers>& softmax) const {
#pragma unroll
    for (int lanes = kWarp / 2; lanes >= kLanes; lanes /= 2) {
      softmax.raise(__shfl_xor_sync(kAllLanes, softmax.high, lanes));
      softmax.sum += __shfl_xor_sync(kAllLanes, softmax.sum, lanes);
#pragma unroll
      for (float& x : softmax.mixed) x += __shfl_xor_sync(kAllLanes, x, lanes);
    }
  }
};

// The row's query, key and value of a head, which everything behind the next barrier may read.
template <typename T, int kWidth, int kNumbers>
__device__ void stage(const TreeAttention& op, float scale, int r, int h,
                      Shared<T, kWidth, kNumbers>& shared) {
#pragma unroll
  for (int first = 0; first < kWidth; first += kThreads) {
    const int e = first + int(threadIdx.x);
    if (e >= kWidth) break;
    float query = 0;
    T key{}, value{};
    if (e < op.D) {  // all loads at once
      query = turned<T>(op, kQuery, r, h, e) * scale;
      store(&key, turned<T>(op, kKey, r, h, e));
      value = part_of<T>(op, kValue, r, h)[e];
    }
    shared.query[e] = query;
    shared.key[e] = key;
    shared.value[e] = value;
  }
}
// A row's head from what its warps have found.
template <typename T, int kWidth, int kNumbers>
__device__ void write(const TreeAttention& op, const Shared<T, kWidth, kNumbers>& shared, T* out) {
  float high = shared.high[0], sum = 0, weight[kWarps];
#pragma unroll
  for (int warp = 1; warp < kWarps; ++warp) high = fmaxf(high, shared.high[warp]);
#pragma unroll
  for (int warp = 0; warp < kWarps; ++warp) {
    weight[warp] = exp2f(shared.high[warp] - base_of(high));
    sum = fmaf(weight[warp], shared.sum[warp], sum);
  }
  for (int e = int(threadIdx.x); e < op.D; e += kThreads) {
    float x = 0;
#pragma unroll
    for (int warp = 0; warp < kWarps; ++warp) x = fmaf(weight[warp], shared.mixed[warp][e], x);
    store(out + e, x / sum);
  }
}

// Whether thread t's row, t, is an ancestor of row r: a tree has it in one place of the path only.
template <typename T, int kWidth, int kNumbers>
__device__ void find_ancestors(const TreeAttention& op, int r, int last, int64_t other_length,
                               Shared<T, kWidth, kNumbers>& shared) {
  const int t = int(threadIdx.x);
  bool found = false;
  if (other_length >= 1 && other_length <= last) {
    const int64_t p = other_length - 1;
    found = op.path[t * op.P + p] == op.path[r * op.P + p];
    shared.depth[t] = int(p);
  }
  const unsigned ancestors = __ballot_sync(kAllLanes, found);
  if (t % kWarp == 0) shared.ancestors[t / kWarp] = ancestors;
}

// One block attends for a row's head, and stores its key and value where no launch before did. Its
// teams of kLanes lanes take the path's keys in turns, and what they find is brought together in an
// order that hangs on the path's length alone.
template <typename T, int kLanes, int kVector, int kPieces>
__global__ __launch_bounds__(kThreads, kPieces == 1 ? 4 : 2) void tree_attention_kernel(
    const TreeAttention op, const float scale) {
  using Team = Keys<T, kLanes, kVector, kPieces>;
  __shared__ Shared<T, Team::kWidth, Team::kNumbers> shared;
  const int r = int(blockIdx.x) / int(op.H), h = int(blockIdx.x) % int(op.H);
  const int thread = int(threadIdx.x), warp = thread / kWarp, team = thread / kLanes;
  const bool stores = op.R <= kMostAtOnce;
  // Loads that wait for nothing first, then those of the path, then those of the pool.
  const int64_t length = op.length[r];
  const int64_t other_length = stores && thread < op.R ? op.length[thread] : 0;
  stage(op, scale, r, h, shared);

  const int64_t slot = slot_of(op, r, length);
  const int64_t* const path = op.path + r * op.P;
  const int last = length >= 1 && length <= op.P ? int(length) - 1 : 0;  // the row's own place
  Team keys{op, shared, h, thread % kLanes};
  int64_t slots[Team::kAtOnce];
  keys.look_ahead(path, team, last, slots);
  find_ancestors(op, r, last, other_length, shared);
  T* const out = static_cast<T*>(op.out) + (int64_t{r} * op.H + h) * op.D;
  if (slot < 0) {
    for (int e = thread; e < op.D; e += kThreads) store(out + e, NAN);
    return;
  }
  __syncthreads();

  if (stores) {
    const int64_t to = (slot * op.H + h) * op.D;
    for (int e = thread; e < op.D; e += kThreads) {
      static_cast<T*>(op.key)[to + e] = shared.key[e];
      static_cast<T*>(op.value)[to + e] = shared.value[e];
    }
  }
  Softmax<Team::kNumbers> softmax;
  keys.begin_with_own(team == 0, softmax);
  unsigned any_rows = 0;
  for (const unsigned ancestors : shared.ancestors) any_rows |= ancestors;
#pragma unroll 1
  for (int p = 0; p < last; p += Team::kTeams * Team::kAtOnce) {
    keys.add(path, p + team, last, any_rows != 0, slots, softmax);
  }
  keys.merge_teams(softmax);
  if (thread % kWarp == 0) {
    shared.high[warp] = softmax.high;
    shared.sum[warp] = softmax.sum;
  }
  if (thread % kWarp < kLanes) {
    for (int i = 0; i < Team::kNumbers; ++i) {
      shared.mixed[warp][keys.begin(i / kVector) + i % kVector] = softmax.mixed[i];
    }
  }
  __syncthreads();
  write(op, shared, out);
}

template <typename T>
auto kernel_for(const TreeAttention& op) {
  constexpr int kVector = 16 / sizeof(T);
  const auto aligned = [](const void* pool) { return reinterpret_cast<uintptr_t>(pool) % 16 == 0; };
  if (op.D % kVector == 0 && op.D <= kWarp * kVector && aligned(op.key) && aligned(op.value)) {
    if (op.D <= 4 * kVector) return tree_attention_kernel<T, 4, kVector, 1>;
    if (op.D <= 8 * kVector) return tree_attention_kernel<T, 8, kVector, 1>;
    if (op.D <= 16 * kVector) return tree_attention_kernel<T, 16, kVector, 1>;
    return tree_attention_kernel<T, kWarp, kVector, 1>;
  }
  return tree_attention_kernel<T, kWarp, 1, kMostHeadDim / kWarp>;
}

}  // namespace

const char* launch_tree_attention(const TreeAttention& op, DType dtype, void* stream) {
  if (op.R == 0 || op.H == 0 || op.D == 0) return nullptr;
  if (op.D > kMostHeadDim) return "head_dim: expected at most 512";
  if (op.P > INT32_MAX) return "path: expected at most 2^31 - 1 columns";
  return with_dtype(dtype, [&](auto kind) {
    using T = decltype(kind);
    const Grid grid{op.R * op.H, dim3(kThreads)};
    if (op.R > kMostAtOnce) {
      const char* const error = launch(tree_attention_store_kernel<T>, grid, stream, op);
      if (error) return error;
    }
    // log2(e) since weights are powers of 2
    const float scale = float(1.4426950408889634 / std::sqrt(double(op.D)));
    return launch(kernel_for<T>(op), grid, stream, op, scale);
  });
}

}  // namespace prunelm::cuda
