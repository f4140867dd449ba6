// What the kernels share: number types, activations, warp reductions, and a launch that is plain
// C++, so that the same source also builds for tests/cuda_emulation.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <map>
#include <mutex>

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
  // sm_90 runs: the kernel calls wait_for_kernel_ahead before it reads what that one wrote, or
  // writes what it reads.
  bool early = false;
};

__device__ inline void wait_for_kernel_ahead() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
// From here on the kernel behind may begin, if it is launched `early`. It comes after
// wait_for_kernel_ahead, so that all but this kernel have ended when that one begins.
__device__ inline void let_kernel_behind_begin() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

template <int = 0>
__global__ void nothing_kernel() {}

// What `find` says of the current device, which is asked once.
template <typename Find>
auto once_a_device(Find find) {
  static std::mutex mutex;
  static std::map<int, decltype(find())> known;
  int device = 0;
  cudaGetDevice(&device);
  const std::lock_guard lock(mutex);
  const auto at = known.find(device);
  return at != known.end() ? at->second : known[device] = find();
}

// What the current device's code of these kernels was compiled for, as 80 for 8.0: a device may run
// what an older one's PTX became, which knows nothing of clusters and early launches. 0: unknown.
inline int compute_capability() {
  return once_a_device([] {
    cudaFuncAttributes attributes{};
    if (cudaFuncGetAttributes(&attributes, nothing_kernel<>) == cudaSuccess) {
      return attributes.ptxVersion;
    }
    cudaGetLastError();
    return 0;
  });
}

// Bytes of dynamic shared memory that a thread block can have on the current device.
inline int most_shared() {
  return once_a_device([] {
    int device = 0, bytes = 0;
    cudaGetDevice(&device);
    cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
    return bytes;
  });
}

// Asks for what the grid has beyond what any kernel may have; nullptr, or why it cannot be had.
// Memory is always asked for up to the limit: with less, a launch would take back what another
// thread's, or one that a graph holds, counts on.
template <typename... Parameters>
const char* allow(void (*kernel)(Parameters...), const Grid& grid) {
  if (grid.shared_bytes > 48 * 1024 &&
      (grid.shared_bytes > most_shared() ||
       cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most_shared()) !=
           cudaSuccess)) {
    cudaGetLastError();
    return "more shared memory than a thread block of this device can have";
  }
  if (grid.cluster > 8 &&  // what every device with clusters can do, if it is large enough
      cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1) !=
          cudaSuccess) {
    cudaGetLastError();
    return "larger clusters of thread blocks than this device can have";
  }
  return nullptr;
}

inline cudaLaunchAttribute cluster_attribute(int blocks) {
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim.x = unsigned(blocks);
  attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
  return attribute;
}

inline cudaLaunchConfig_t configuration(const Grid& grid, cudaLaunchAttribute* attributes) {
  cudaLaunchConfig_t config{};
  config.gridDim = dim3{unsigned(grid.blocks)};
  config.blockDim = grid.threads;
  config.dynamicSmemBytes = size_t(grid.shared_bytes);
  config.attrs = attributes;
  return config;
}

// How many clusters of the grid run at once on the current device; 0: not even one, since it, or
// the part of it that this process has (MIG), is too small.
template <typename... Parameters>
int clusters_at_once(void (*kernel)(Parameters...), const Grid& grid) {
  if (compute_capability() < 90 || allow(kernel, grid)) return 0;
  cudaLaunchAttribute attribute = cluster_attribute(grid.cluster);
  cudaLaunchConfig_t config = configuration(grid, &attribute);
  config.numAttrs = 1;
  int count = 0;
  if (cudaOccupancyMaxActiveClusters(&count, kernel, &config) == cudaSuccess) return count;
  cudaGetLastError();
  return 0;
}

// nullptr, or why the kernel was not launched.
template <typename... Parameters, typename... Arguments>
const char* launch(void (*kernel)(Parameters...), const Grid& grid, void* stream,
                   const Arguments&... arguments) {
  if (grid.blocks > INT32_MAX) return "more than 2^31 - 1 thread blocks";
  if (const char* const error = allow(kernel, grid)) return error;
  cudaLaunchAttribute attributes[2]{};
  cudaLaunchConfig_t config = configuration(grid, attributes);
  config.stream = static_cast<cudaStream_t>(stream);
  if (grid.cluster > 1) attributes[config.numAttrs++] = cluster_attribute(grid.cluster);
  if (grid.early && compute_capability() >= 90) {
    cudaLaunchAttribute& attribute = attributes[config.numAttrs++];
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = 1;
  }
  const cudaError_t error = cudaLaunchKernelEx(&config, kernel, arguments...);
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
