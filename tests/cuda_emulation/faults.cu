// Small kernels, each with one fault and without it: what a checker must find, and what it must not
// take for one. `faults <name> 1` runs the faulty one, `faults <name> 0` the other. A kernel is one
// block of 64 threads that copies in [64] to out [64], backwards or not.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>

#include "cuda/async_copy.cuh"

using namespace prunelm::cuda;

namespace {

constexpr int kThreads = 64;

__device__ inline float* dynamic() { return reinterpret_cast<float*>(dynamic_shared()); }

template <bool kFault>
__global__ void no_barrier(const float* in, float* out) {
  dynamic()[threadIdx.x] = in[threadIdx.x];
  if (!kFault) __syncthreads();
  out[threadIdx.x] = dynamic()[kThreads - 1 - threadIdx.x];
}

// The next round's writes overtake this round's reads.
template <bool kFault>
__global__ void no_barrier_behind(const float* in, float* out) {
  for (int round = 0; round < 2; ++round) {
    dynamic()[threadIdx.x] = in[threadIdx.x];
    __syncthreads();
    out[threadIdx.x] = dynamic()[kThreads - 1 - threadIdx.x];
    if (!kFault) __syncthreads();
  }
}

// A shuffle makes lanes meet, but orders no memory.
template <bool kFault>
__global__ void shuffle_for_barrier(const float* in, float* out) {
  dynamic()[threadIdx.x] = in[threadIdx.x];
  if (kFault) {
    __shfl_sync(kAllLanes, 1, 0);
  } else {
    __syncwarp();
  }
  out[threadIdx.x] = dynamic()[threadIdx.x ^ 31];
}

template <bool kFault>
__global__ void too_few_lanes(const float* in, float* out) {
  dynamic()[threadIdx.x] = in[threadIdx.x];
  const unsigned half = threadIdx.x % kWarp < 16 ? 0xFFFFu : 0xFFFF0000u;
  __syncwarp(kFault ? half : kAllLanes);
  out[threadIdx.x] = dynamic()[threadIdx.x ^ 31];
}

// A flag without a fence publishes nothing but itself.
template <bool kFault>
__global__ void no_fence(const float* in, float* out) {
  __shared__ int flag;
  out[threadIdx.x] = in[threadIdx.x];
  if (threadIdx.x == 0) flag = 0;
  __syncthreads();
  if (threadIdx.x == 0) {
    dynamic()[0] = in[0];
    if (!kFault) __threadfence();
    atomicExch(&flag, 1);
  } else if (threadIdx.x == kWarp) {
    while (atomicAdd(&flag, 0) == 0) continue;
    if (!kFault) __threadfence();
    out[threadIdx.x] = in[threadIdx.x] + 0 * dynamic()[0];
  }
}

template <bool kFault>
__global__ void read_past_input(const float* in, float* out) {
  out[threadIdx.x] = in[threadIdx.x + kFault];
}

template <bool kFault>
__global__ void write_past_output(const float* in, float* out) {
  out[threadIdx.x] = in[threadIdx.x];
  out[threadIdx.x + kFault] = in[threadIdx.x];
}

template <bool kFault>
__global__ void read_past_dynamic(const float* in, float* out) {
  dynamic()[threadIdx.x] = in[threadIdx.x];
  out[threadIdx.x] = dynamic()[threadIdx.x] + 0 * dynamic()[threadIdx.x + kFault];
}

template <bool kFault>
__global__ void write_past_static(const float* in, float* out) {
  __shared__ float fixed[kThreads];
  fixed[threadIdx.x + kFault] = in[threadIdx.x];
  out[threadIdx.x] = in[threadIdx.x];
}

template <bool kFault>
__global__ void unwritten_static(const float* in, float* out) {
  __shared__ float fixed[kThreads];
  if (!kFault || threadIdx.x != 3) fixed[threadIdx.x] = in[threadIdx.x];
  out[threadIdx.x] = fixed[threadIdx.x];
}

template <bool kFault>
__global__ void unwritten_dynamic(const float* in, float* out) {
  if (!kFault || threadIdx.x != 3) dynamic()[threadIdx.x] = in[threadIdx.x];
  out[threadIdx.x] = dynamic()[threadIdx.x];
}

template <bool kFault>
__global__ void unwritten_output(const float* in, float* out) {
  if (!kFault || threadIdx.x != 3) out[threadIdx.x] = in[threadIdx.x];
}

// No NaN among integers: the result is right by luck.
template <bool kFault>
__global__ void unwritten_integer(const float* in, float* out) {
  int* count = reinterpret_cast<int*>(dynamic_shared());
  if (!kFault) count[threadIdx.x] = -1;
  if (count[threadIdx.x] < 0) out[threadIdx.x] = in[threadIdx.x];
}

template <bool kFault>
__global__ void copy_not_waited_for(const float* in, float* out) {
  cp_async<4>(dynamic() + threadIdx.x, in + threadIdx.x);
  cp_async_commit();
  cp_async_wait<kFault>();
  out[threadIdx.x] = dynamic()[threadIdx.x];
  cp_async_wait<0>();
}

template <bool kFault>
__global__ void misaligned(const float* in, float* out) {
  const float2 two = *reinterpret_cast<const float2*>(in + threadIdx.x / 2 * 2 - kFault);
  out[threadIdx.x] = threadIdx.x % 2 ? two.y : two.x;
}

template <bool kFault>
__global__ void stuck(const float* in, float* out) {
  out[threadIdx.x] = in[threadIdx.x];
  if (kFault && threadIdx.x == 0) __syncwarp();
  __syncthreads();
}

template <bool kFault>
__global__ void own_lane_missing(const float* in, float* out) {
  out[threadIdx.x] = __shfl_xor_sync(kFault ? 0xFFFFu : kAllLanes, in[threadIdx.x], 1);
}

template <bool kFault>
__global__ void two_masks(const float* in, float* out) {
  const unsigned mask = kFault && threadIdx.x % 2 ? kAllLanes - 2 : kAllLanes;
  out[threadIdx.x] = __shfl_xor_sync(mask | 1u << threadIdx.x % kWarp, in[threadIdx.x], 1);
}

template <bool kFault>
__global__ void static_in_cluster(const float* in, float* out) {
  __shared__ volatile int round;
  if (kFault && threadIdx.x == 0) round = 1;
  if (blockIdx.x == 0) out[threadIdx.x] = in[threadIdx.x];
}

template <bool kFault>
__global__ void too_many_threads(const float* in, float* out) {
  if (threadIdx.x < kThreads) out[threadIdx.x] = in[threadIdx.x];
}

template <bool kFault>
__global__ void too_much_shared(const float* in, float* out) {
  out[threadIdx.x] = in[threadIdx.x];
}

struct Fault {
  const char* name;
  void (*kernels[2])(const float*, float*);
};
#define FAULT(name)                    \
  {                                    \
    #name, { name<false>, name<true> } \
  }
const Fault faults[] = {
    FAULT(no_barrier),
    FAULT(no_barrier_behind),
    FAULT(shuffle_for_barrier),
    FAULT(too_few_lanes),
    FAULT(no_fence),
    FAULT(read_past_input),
    FAULT(write_past_output),
    FAULT(read_past_dynamic),
    FAULT(write_past_static),
    FAULT(unwritten_static),
    FAULT(unwritten_dynamic),
    FAULT(unwritten_output),
    FAULT(unwritten_integer),
    FAULT(misaligned),
    FAULT(copy_not_waited_for),
    FAULT(stuck),
    FAULT(own_lane_missing),
    FAULT(two_masks),
    FAULT(static_in_cluster),
    FAULT(too_many_threads),
    FAULT(too_much_shared),
};

// nullptr, or what is wrong with the copy.
const char* run(const Fault& fault, bool faulty) {
  const auto in = std::make_unique<float[]>(kThreads), out = std::make_unique<float[]>(kThreads);
  for (int i = 0; i < kThreads; ++i) {
    in[i] = float(i);
    out[i] = NAN;
  }
  Grid grid{1, dim3{kThreads}, kThreads * int64_t{sizeof(float)}};
  if (!std::strcmp(fault.name, "static_in_cluster")) grid.blocks = grid.cluster = 2;
  if (faulty && !std::strcmp(fault.name, "too_many_threads")) grid.threads.x = 1056;
  if (faulty && !std::strcmp(fault.name, "too_much_shared")) {
    grid.shared_bytes = 228 * 1024;
  }
  const char* error =
      launch(fault.kernels[faulty], grid, nullptr, static_cast<const float*>(in.get()), out.get());
  if (error) return error;
  float sum = 0;
  for (int i = 0; i < kThreads; ++i) {
    if (out[i] != out[i]) return "an element is NaN";
    sum += out[i];
  }
  return sum == kThreads * (kThreads - 1) / 2 ? nullptr : "a wrong result";
}

}  // namespace

int main(int count, char** words) {
  for (const Fault& fault : faults) {
    if (count != 3 || std::strcmp(fault.name, words[1]) != 0) continue;
    const char* error = run(fault, words[2][0] == '1');
    if (error) std::fprintf(stderr, "%s\n", error);
    return error != nullptr;
  }
  std::fprintf(stderr, "no such fault\n");
  return 2;
}
