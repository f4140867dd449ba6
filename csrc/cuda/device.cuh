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

// How a kernel is launched; sizes are fixed by the caller before anything runs.
struct Grid {
  int64_t blocks;
  dim3 threads;
  int64_t shared_bytes = 0;  // dynamic
  int cluster = 1;           // blocks a cluster (sm_90)
  // The launch may begin before the kernel ahead of it in the stream has ended, where code for
  // sm_90 runs: the kernel
  // calls wait_for_kernel_ahead before it reads what that one wrote, or writes what it reads.
  bool early = false;
};

__device__ inline void wait_for_kernel_ahead() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
// From here on the kernel behind may begin, if it is launched `early`.
__device__ inline void let_kernel_behind_begin() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

template <int = 0>
__global__ void nothing_kernel() {}

// What the current device's code of these kernels was compiled for, as 80 for 8.0: a device may run
// what an older one's PTX became, which knows nothing of clusters and early launches. 0: unknown.
inline int compute_capability() {
  cudaFuncAttributes attributes{};
  if (cudaFuncGetAttributes(&attributes, nothing_kernel<>) == cudaSuccess) {
    return attributes.ptxVersion;
  }
  cudaGetLastError();
  return 0;
}

// nullptr, or why the kernel was not launched.
template <typename... Parameters, typename... Arguments>
const char* launch(void (*kernel)(Parameters...), const Grid& grid, void* stream,
                   const Arguments&... arguments) {
  if (grid.blocks > INT32_MAX) return "more than 2^31 - 1 thread blocks";
  cudaError_t error = cudaSuccess;
  // What a kernel may have without asking; more, up to the device's limit, must be asked for.
  if (grid.shared_bytes > 48 * 1024) {
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                 int(grid.shared_bytes));
  }
  if (error == cudaSuccess && grid.cluster > 8) {  // what every device with clusters can do
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
  }
  if (error != cudaSuccess) {
    cudaGetLastError();
    return cudaGetErrorString(error);
  }
  cudaLaunchAttribute attributes[2]{};
  cudaLaunchConfig_t config{};
  config.gridDim = dim3{unsigned(grid.blocks)};
  config.blockDim = grid.threads;
  config.dynamicSmemBytes = size_t(grid.shared_bytes);
  config.stream = static_cast<cudaStream_t>(stream);
  config.attrs = attributes;
  if (grid.cluster > 1) {
    cudaLaunchAttribute& attribute = attributes[config.numAttrs++];
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim.x = unsigned(grid.cluster);
    attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
  }
  if (grid.early && compute_capability() >= 90) {
    cudaLaunchAttribute& attribute = attributes[config.numAttrs++];
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = 1;
  }
  error = cudaLaunchKernelEx(&config, kernel, arguments...);
  if (error == cudaSuccess) return nullptr;
  cudaGetLastError();  // or torch would find it, and blame a kernel of its own
  return cudaGetErrorString(error);
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
