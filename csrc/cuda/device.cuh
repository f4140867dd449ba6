// What the kernels share: number types, activations, warp reductions, and a launch that is plain
// C++, so that the same source also builds for tests/cuda_emulation.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/launch.h"

namespace prunelm::cuda {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xFFFFFFFFu;

__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(__half x) { return __half2float(x); }
__device__ inline float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }

__device__ inline void store(float* to, float x) { *to = x; }
__device__ inline void store(__half* to, float x) { *to = __float2half_rn(x); }
__device__ inline void store(__nv_bfloat16* to, float x) { *to = __float2bfloat16_rn(x); }

__device__ inline float activate(float x, Activation activation) {
  switch (activation) {
    case Activation::relu:
      return x > 0 || x != x ? x : 0;  // NaN stays NaN, as in torch
    case Activation::gelu:
      return 0.5f * x * (1 + erff(x * 0.70710678f));
    case Activation::silu:
      return x / (1 + expf(-x));
    default:
      return x;
  }
}

template <typename T>
__device__ T warp_sum(T x) {
  for (int lanes = kWarp / 2; lanes > 0; lanes /= 2) x += __shfl_xor_sync(kAllLanes, x, lanes);
  return x;
}

template <typename T>
__device__ T warp_max(T x) {
  for (int lanes = kWarp / 2; lanes > 0; lanes /= 2) {
    const T other = __shfl_xor_sync(kAllLanes, x, lanes);
    x = other > x ? other : x;
  }
  return x;
}

// The launch's dynamic shared memory.
__device__ inline unsigned char* dynamic_shared() {
#ifdef CUDA_EMULATION
  return cuda_emulation::dynamic_shared();
#else
  extern __shared__ __align__(16) unsigned char bytes[];
  return bytes;
#endif
}

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// nullptr, or why the kernel was not launched.
template <typename... Parameters, typename... Arguments>
const char* launch(void (*kernel)(Parameters...), int64_t blocks, dim3 threads,
                   int64_t shared_bytes, void* stream, const Arguments&... arguments) {
  if (blocks > INT32_MAX) return "more than 2^31 - 1 thread blocks";
  // What a kernel may have without asking; more, up to the device's limit, must be asked for.
  if (shared_bytes > 48 * 1024) {
    const cudaError_t error = cudaFuncSetAttribute(
        kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared_bytes));
    if (error != cudaSuccess) return cudaGetErrorString(error);
  }
  cudaLaunchConfig_t config{};
  config.gridDim = dim3{unsigned(blocks)};
  config.blockDim = threads;
  config.dynamicSmemBytes = size_t(shared_bytes);
  config.stream = static_cast<cudaStream_t>(stream);
  const cudaError_t error = cudaLaunchKernelEx(&config, kernel, arguments...);
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

// run(T{}) with the C++ type of a linear op's dtype.
template <typename Run>
const char* with_dtype(DType dtype, Run run) {
  switch (dtype) {
    case DType::float16:
      return run(__half{});
    case DType::bfloat16:
      return run(__nv_bfloat16{});
    case DType::float32:
      return run(float{});
    default:
      return "dtype: expected float32, bfloat16 or float16";
  }
}

}  // namespace prunelm::cuda
