// A small kernel for each primitive that the emulation plays; tests compare what they say with what
// CUDA's guide says. nvcc compiles it too, so that names and types are CUDA's.
#include <cstring>

#include "cuda/device.cuh"

using namespace prunelm::cuda;

namespace {

// [threads] in; what comes out is [blocks * threads] unless said otherwise.
struct Task {
  const int64_t* in;
  int64_t* out;
  int64_t a, b;
};

__device__ inline int64_t number() {
  const int64_t block = blockIdx.x + gridDim.x * (blockIdx.y + int64_t{gridDim.y} * blockIdx.z);
  return block * blockDim.x * blockDim.y + threadIdx.x + blockDim.x * threadIdx.y;
}

__global__ void shuffle(Task task) {
  const int value = int(task.in[threadIdx.x]), by = int(task.a), width = int(task.b);
  int64_t* out = task.out + 4 * threadIdx.x;
  out[0] = __shfl_sync(kAllLanes, value, by + int(threadIdx.x), width);
  out[1] = __shfl_up_sync(kAllLanes, value, unsigned(by), width);
  out[2] = __shfl_down_sync(kAllLanes, value, unsigned(by), width);
  out[3] = __shfl_xor_sync(kAllLanes, value, by, width);
}

// Each half of the warp goes its own way, as often as it likes.
__global__ void halves(Task task) {
  const double value = double(task.in[threadIdx.x]);
  double sum = value;
  if (threadIdx.x < 16) {
    for (int lanes = 1; lanes < 16; lanes *= 2) sum += __shfl_xor_sync(0xFFFFu, sum, lanes);
  } else {
    __syncwarp(0xFFFF0000u);
    sum -= __shfl_sync(0xFFFF0000u, value, 31);
  }
  __syncwarp();
  task.out[threadIdx.x] = int64_t(sum) + __shfl_sync(kAllLanes, int(threadIdx.x), 0);
}

// The last warp is broken, and every third thread returns first.
__global__ void votes(Task task) {
  const int lane = int(threadIdx.x) % kWarp, left = int(blockDim.x) - int(threadIdx.x) + lane;
  if (threadIdx.x % 3 == 0) return;
  unsigned mask = 0;
  for (int i = 0; i < kWarp && i < left; ++i) {
    if ((threadIdx.x - lane + i) % 3) mask |= 1u << i;
  }
  const int value = int(task.in[threadIdx.x]);
  int64_t* out = task.out + 4 * threadIdx.x;
  out[0] = __ballot_sync(mask, value > 0);
  out[1] = __any_sync(mask, value > 0);
  out[2] = __all_sync(mask, value > 0);
  out[3] = __match_any_sync(mask, value);
}

__global__ void reductions(Task task) {
  const int value = int(task.in[threadIdx.x]);
  const unsigned bits = unsigned(value);
  const unsigned mask = threadIdx.x < 8 ? 0xFFu : 0xFFFFFF00u;
  int64_t* out = task.out + 8 * threadIdx.x;
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
  out[0] = __reduce_add_sync(mask, value);
  out[1] = __reduce_min_sync(mask, value);
  out[2] = __reduce_max_sync(mask, value);
  out[3] = __reduce_min_sync(mask, bits);
  out[4] = __reduce_max_sync(mask, bits);
  out[5] = __reduce_and_sync(mask, bits);
  out[6] = __reduce_or_sync(mask, bits);
  out[7] = __reduce_xor_sync(mask, bits);
#endif
}

__global__ void block_votes(Task task) {
  if (threadIdx.x == 5) return;
  const int vote = int(task.in[threadIdx.x]);
  int64_t* out = task.out + 4 * threadIdx.x;
  out[0] = __syncthreads_count(vote);
  out[1] = __syncthreads_or(vote);
  out[2] = __syncthreads_and(vote);
  out[3] = __syncthreads_count(vote == 0);
}

// All threads of all blocks on the words of `out` [8].
__global__ void atomics(Task task) {
  const int64_t value = task.in[threadIdx.x];
  auto* out = reinterpret_cast<unsigned long long*>(task.out);
  atomicAdd(&out[0], static_cast<unsigned long long>(value));
  atomicMax(reinterpret_cast<long long*>(out) + 1, static_cast<long long>(value));
  atomicMin(reinterpret_cast<int*>(out + 2), int(value));
  atomicOr(reinterpret_cast<unsigned*>(out + 3), 1u << threadIdx.x);
  atomicAnd(reinterpret_cast<unsigned*>(out + 4), ~(1u << threadIdx.x));
  atomicInc(reinterpret_cast<unsigned*>(out + 5), 6);
  auto* sum = reinterpret_cast<float*>(out + 6);  // by compare and swap, behind a fence
  auto* word = reinterpret_cast<unsigned*>(sum);
  __threadfence();
  for (unsigned old = *word, found;; old = found) {
    found = atomicCAS(word, old, __float_as_uint(__uint_as_float(old) + float(value)));
    if (found == old) break;
  }
  if (threadIdx.x == 0) atomicExch(reinterpret_cast<int*>(out + 7), int(blockIdx.x));
}

// What a block finds in shared memory, once before it writes and once after: [blocks * threads, 4].
__global__ void shared_memory(Task task) {
  __shared__ int fixed[32];
  int* dynamic = reinterpret_cast<int*>(dynamic_shared());
  int64_t* out = task.out + 4 * number();
  out[0] = fixed[threadIdx.x];
  out[1] = dynamic[threadIdx.x];
  __syncthreads();
  fixed[threadIdx.x] = dynamic[threadIdx.x] = int(number());
  __syncthreads();
  out[2] = fixed[blockDim.x - 1 - threadIdx.x];
  out[3] = dynamic[blockDim.x - 1 - threadIdx.x];
}

__global__ void indices(Task task) {
  task.out[number()] = ((blockIdx.z * 10 + blockIdx.y) * 10 + blockIdx.x) * 100 +
                       threadIdx.y * blockDim.x + threadIdx.x;
}

// [threads, 8] out.
__global__ void numbers(Task task) {
  const int value = int(task.in[threadIdx.x]);
  int64_t* out = task.out + 8 * threadIdx.x;
  out[0] = __popc(unsigned(value));
  out[1] = __clz(value);
  out[2] = __ffs(value);
  out[3] = __brev(unsigned(value));
  const float2 two = __half22float2(__floats2half2_rn(float(value), 0.5f));
  const float2 wide = __bfloat1622float2(__floats2bfloat162_rn(0.25f, float(value)));
  out[4] = int64_t(two.x * two.y * 2);
  out[5] = int64_t(wide.x * wide.y * 4);
  // Two numbers a word, the first in the low half.
  const __half2 pair = __floats2half2_rn(1, 2);
  uint32_t word;
  memcpy(&word, &pair, sizeof(word));
  out[6] = word;
  const int4 four = *(reinterpret_cast<const int4*>(task.in) + threadIdx.x / 2);
  out[7] = threadIdx.x % 2 ? four.z : four.x;
}

// The block that comes last adds up what all have written: [1].
__global__ void last_block(Task task) {
  __shared__ bool last;
  task.out[1 + number()] = task.in[threadIdx.x] + blockIdx.x;
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) {
    auto* done = reinterpret_cast<unsigned long long*>(task.out);
    last = atomicAdd(done, 1ull) == gridDim.x - 1;
  }
  __syncthreads();
  if (!last || threadIdx.x != 0) return;
  __threadfence();
  int64_t sum = 0;
  for (unsigned i = 0; i < gridDim.x * blockDim.x; ++i) sum += task.out[1 + i];
  task.out[0] = sum;
}

struct {
  const char* name;
  void (*kernel)(Task);
} const kernels[] = {
    {"shuffle", shuffle},
    {"halves", halves},
    {"votes", votes},
    {"reductions", reductions},
    {"block_votes", block_votes},
    {"atomics", atomics},
    {"shared_memory", shared_memory},
    {"indices", indices},
    {"numbers", numbers},
    {"last_block", last_block},
};

}  // namespace

// nullptr, or why there was no result. `sizes`: the grid's x, y, z, the block's x, y.
extern "C" const char* primitive(const char* name, const int64_t* in, int64_t* out, int64_t a,
                                 int64_t b, const int32_t* sizes) {
  for (const auto& entry : kernels) {
    if (std::strcmp(entry.name, name) != 0) continue;
    cudaLaunchConfig_t config{};
    config.gridDim = dim3{unsigned(sizes[0]), unsigned(sizes[1]), unsigned(sizes[2])};
    config.blockDim = dim3{unsigned(sizes[3]), unsigned(sizes[4])};
    config.dynamicSmemBytes = 4 * size_t(sizes[3]);
    const cudaError_t error = cudaLaunchKernelEx(&config, entry.kernel, Task{in, out, a, b});
    return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
  }
  return "no such kernel";
}
