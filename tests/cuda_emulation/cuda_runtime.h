// CUDA kernels on the CPU, for tests only: with this folder first on the include path, g++ builds a
// .cu file as it stands. Clusters of blocks run one after another; inside one each CUDA thread is a
// fiber (fast, and always in the same order, so that a missing barrier gives the same wrong result
// every time), or with CUDA_EMULATION_THREADS a std::thread (so that ThreadSanitizer reports it).
// Shared memory starts as 0xFF bytes, which are NaN. What a GPU refuses is refused: launches past
// its limits, and with -fsanitize=alignment misaligned addresses. Not emulated: speed, streams.
#pragma once

#include <math.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <map>
#include <string>
#include <utility>
#include <vector>

#include "alignment.h"
#include "atomics.h"
#include "device_functions.h"
#include "symbols.h"
#include "threads.h"
#include "warp.h"

#define CUDA_EMULATION 1
#define __global__
#define __device__
#define __host__
#define __constant__ static
#define __shared__ static __attribute__((abi_tag("cuda_shared")))
#define __forceinline__ inline
#define __noinline__ __attribute__((noinline))
#define __align__(bytes) alignas(bytes)
#define __grid_constant__
#define __launch_bounds__(...)

enum cudaError_t { cudaSuccess, cudaErrorInvalidValue, cudaErrorLaunchFailure };
enum cudaFuncAttribute {
  cudaFuncAttributeMaxDynamicSharedMemorySize,
  cudaFuncAttributeNonPortableClusterSizeAllowed
};
enum cudaDeviceAttr {
  cudaDevAttrComputeCapabilityMajor,
  cudaDevAttrComputeCapabilityMinor,
  cudaDevAttrMultiProcessorCount,
  cudaDevAttrMaxSharedMemoryPerBlockOptin
};
using cudaStream_t = void*;

namespace cuda_emulation {

// The device that is played; tests choose.
inline int compute_capability = 90;
inline int multiprocessors = 132;
inline int largest_cluster = 16;
inline size_t most_shared = 227 * 1024;  // dynamic, of a block

// Kernels may keep what they know of a device: each one that is played has a number of its own.
inline int device_number() {
  static std::vector<std::array<size_t, 4>> seen;
  const std::array device{size_t(compute_capability), size_t(multiprocessors),
                          size_t(largest_cluster), most_shared};
  const auto at = std::find(seen.begin(), seen.end(), device);
  if (at != seen.end()) return int(at - seen.begin());
  seen.push_back(device);
  return int(seen.size()) - 1;
}

// What may be had without asking.
constexpr size_t kPlainShared = 48 * 1024;
constexpr unsigned kPlainCluster = 8;

struct Allowed {
  size_t shared = kPlainShared;
  bool wide_cluster = false;
  size_t used = 0;  // the most shared memory of a launch
};
// Of a kernel on the device that is played.
inline Allowed& allowed(const void* kernel) {
  static std::map<std::pair<const void*, int>, Allowed> of;
  return of[{kernel, device_number()}];
}

// The largest launches of each kernel, by compute capability.
struct Launch {
  unsigned threads = 0;
  size_t shared = 0;
  unsigned cluster = 0;
};
inline std::map<std::pair<const void*, int>, Launch> launches;

}  // namespace cuda_emulation

enum cudaLaunchAttributeID {
  cudaLaunchAttributeClusterDimension,
  cudaLaunchAttributeProgrammaticStreamSerialization
};
struct cudaLaunchAttributeValue {
  struct {
    unsigned x, y, z;
  } clusterDim;
  int programmaticStreamSerializationAllowed;
};
struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  cudaLaunchAttributeValue val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
  cudaLaunchAttribute* attrs = nullptr;
  unsigned numAttrs = 0;
};

inline const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaSuccess ? "no error" : cuda_emulation::failure.c_str();
}
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline cudaError_t cudaGetDevice(int* device) {
  *device = cuda_emulation::device_number();
  return cudaSuccess;
}
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  const int capability = cuda_emulation::compute_capability;
  switch (attribute) {
    case cudaDevAttrComputeCapabilityMajor:
      *value = capability / 10;
      break;
    case cudaDevAttrComputeCapabilityMinor:
      *value = capability % 10;
      break;
    case cudaDevAttrMultiProcessorCount:
      *value = cuda_emulation::multiprocessors;
      break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      *value = int(cuda_emulation::most_shared);
  }
  return cudaSuccess;
}
struct cudaFuncAttributes {
  int ptxVersion;
};
template <typename Kernel>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, Kernel*) {
  attributes->ptxVersion = cuda_emulation::compute_capability;
  return cudaSuccess;
}
template <typename Kernel>
cudaError_t cudaFuncSetAttribute(Kernel* kernel, cudaFuncAttribute attribute, int value) {
  using namespace cuda_emulation;
  Allowed& grant = allowed(reinterpret_cast<const void*>(kernel));
  if (attribute == cudaFuncAttributeNonPortableClusterSizeAllowed) {
    grant.wide_cluster = value != 0;
    return cudaSuccess;
  }
  if (value < 0 || size_t(value) > most_shared) {
    failure = "more shared memory asked for than there is";
    return cudaErrorInvalidValue;
  }
  if (size_t(value) < grant.used) {
    failure = "less shared memory asked for than a launch has, which a graph may hold";
    return cudaErrorInvalidValue;
  }
  grant.shared = size_t(value);
  return cudaSuccess;
}

namespace cuda_emulation {

// Why a GPU would refuse the launch; empty if it would not.
inline std::string refusal(const cudaLaunchConfig_t& config, const void* kernel, unsigned cluster) {
  const dim3 grid = config.gridDim, size = config.blockDim;
  const unsigned threads = size.x * size.y * size.z;
  if (threads == 0 || threads > 1024 || size.z > 64) return "a block of no or too many threads";
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return "a grid without blocks";
  if (grid.x > INT32_MAX || grid.y > 65535 || grid.z > 65535) return "a grid of too many blocks";
  if (grid.x % cluster) return "a grid that is no whole number of clusters";
  const Allowed& grant = allowed(kernel);
  if (cluster > 1 && compute_capability < 90) return "a cluster below sm_90";
  if (cluster > (grant.wide_cluster ? 16 : kPlainCluster)) return "a cluster of too many blocks";
  if (cluster > 1 && int(cluster) > largest_cluster)
    return "a cluster of more blocks than the device has room for";
  if (config.dynamicSmemBytes > std::min(grant.shared, most_shared)) {
    return "more shared memory than was asked for";
  }
  return "";
}

}  // namespace cuda_emulation

template <typename Kernel>
cudaError_t cudaOccupancyMaxActiveClusters(int* count, Kernel*, const cudaLaunchConfig_t* config) {
  const int size = int(config->attrs[0].val.clusterDim.x);
  *count = size <= cuda_emulation::largest_cluster ? cuda_emulation::multiprocessors / size : 0;
  return cudaSuccess;
}

template <typename... Parameters, typename... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
  static_assert((sizeof(Parameters) + ... + 0) <= 4096, "more parameters than a launch can carry");
  using namespace cuda_emulation;
  const dim3 grid = config->gridDim, size = config->blockDim;
  const std::function<void()> call = [&] { kernel(arguments...); };
  unsigned together = 1;
  for (unsigned i = 0; i < config->numAttrs; ++i) {
    const cudaLaunchAttribute& attribute = config->attrs[i];
    if (attribute.id == cudaLaunchAttributeClusterDimension) together = attribute.val.clusterDim.x;
  }
  const void* address = reinterpret_cast<const void*>(kernel);
  failure = refusal(*config, address, together);
  if (!failure.empty()) return cudaErrorInvalidValue;
  Launch& launch = launches[{address, compute_capability}];
  allowed(address).used = std::max(allowed(address).used, config->dynamicSmemBytes);
  launch.threads = std::max(launch.threads, size.x * size.y * size.z);
  launch.shared = std::max(launch.shared, config->dynamicSmemBytes);
  launch.cluster = std::max(launch.cluster, together);

  const uint64_t blocks = uint64_t{grid.x} * grid.y * grid.z;
  for (uint64_t first = 0; first < blocks && failure.empty(); first += together) {
    Cluster cluster(int(together * size.x * size.y * size.z));
    for (uint64_t i = first; i < first + together; ++i) {
      const dim3 index{unsigned(i % grid.x), unsigned(i / grid.x % grid.y),
                       unsigned(i / grid.x / grid.y)};
      cluster.blocks.push_back(
          std::make_unique<Block>(grid, size, index, config->dynamicSmemBytes, cluster));
    }
    poison_static_shared();
    run_cluster(cluster, call);
    // Such an array is one for all blocks that run at once.
    if (together > 1 && !static_shared_is_poison()) fail("a static __shared__ array in a cluster");
  }
  return failure.empty() ? cudaSuccess : cudaErrorLaunchFailure;
}
