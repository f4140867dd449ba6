// With ON_DEVICE, which a build by nvcc sets, the memory_<op>.cpp run on a GPU: `launched` moves
// every heap block that an op points to into a device allocation of its exact size, calls the
// launcher, and moves all back.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdlib>
#include <cstring>
#include <iterator>
#include <map>
#include <mutex>
#include <new>
#include <type_traits>

#ifndef CUDA_EMULATION
// What the drivers ask of an emulated GPU; a real one is as it is.
namespace cuda_emulation {
inline int compute_capability, multiprocessors, largest_cluster;
inline size_t most_shared;
}  // namespace cuda_emulation
#endif

namespace on_device {

struct Block {
  unsigned char* at;
  size_t size;
};
inline Block blocks[4096];  // all that live; plain memory, since it is filled by operator new
inline size_t block_count = 0;
inline std::mutex lock;

inline const Block* find(const void* pointer) {
  const auto* at = static_cast<const unsigned char*>(pointer);
  for (size_t i = 0; i < block_count; ++i) {
    if (at >= blocks[i].at && at < blocks[i].at + blocks[i].size) return &blocks[i];
  }
  return nullptr;
}

inline void check(cudaError_t error) {
  if (error == cudaSuccess) return;
  std::fprintf(stderr, "CUDA: %s\n", cudaGetErrorString(error));
  std::exit(1);
}

// Host blocks and where they are on the device.
struct Moved {
  std::map<unsigned char*, unsigned char*> device;
  std::map<unsigned char*, size_t> size;

  void* there(const Block& block) {
    unsigned char*& to = device[block.at];
    if (!to) {
      check(cudaMalloc(reinterpret_cast<void**>(&to), block.size));
      check(cudaMemcpy(to, block.at, block.size, cudaMemcpyHostToDevice));
      size[block.at] = block.size;
    }
    return to;
  }

  // The argument with every pointer to a host block in it as one to the device.
  template <typename T>
  T moved(T argument) {
    static_assert(std::is_trivially_copyable_v<T>);
    unsigned char bytes[sizeof(T)];
    std::memcpy(bytes, &argument, sizeof(T));
    for (size_t i = 0; i + sizeof(void*) <= sizeof(T); i += sizeof(void*)) {
      unsigned char* host;
      std::memcpy(&host, bytes + i, sizeof(host));
      const Block* const found = find(host);
      if (!found) continue;
      const Block block = *found;  // a map's own memory moves the list's entries
      unsigned char* const to = static_cast<unsigned char*>(there(block)) + (host - block.at);
      std::memcpy(bytes + i, &to, sizeof(to));
    }
    std::memcpy(&argument, bytes, sizeof(T));
    return argument;
  }

  void back() {
    for (const auto& [host, to] : device) {
      check(cudaMemcpy(host, to, size[host], cudaMemcpyDeviceToHost));
      check(cudaFree(to));
    }
  }
};

}  // namespace on_device

inline void* allocate(size_t size) {
  void* const at = std::malloc(size ? size : 1);
  const std::lock_guard guard(on_device::lock);
  if (!at || on_device::block_count == std::size(on_device::blocks)) std::abort();
  on_device::blocks[on_device::block_count++] = {static_cast<unsigned char*>(at), size};
  return at;
}

inline void let_go(void* at) {
  const std::lock_guard guard(on_device::lock);
  for (size_t i = 0; at && i < on_device::block_count; ++i) {
    if (on_device::blocks[i].at != at) continue;
    on_device::blocks[i] = on_device::blocks[--on_device::block_count];
    break;
  }
  std::free(at);
}

void* operator new(size_t size) { return allocate(size); }
void operator delete(void* at) noexcept { let_go(at); }
void operator delete(void* at, size_t) noexcept { let_go(at); }

// The launcher's error text, the device's, or nullptr.
template <typename... Parameters, typename... Arguments>
const char* launched(const char* (*launcher)(Parameters...), const Arguments&... arguments) {
  on_device::Moved moved;
  const char* const refused = launcher(moved.moved(std::remove_cvref_t<Parameters>(arguments))...);
  const cudaError_t error = cudaDeviceSynchronize();
  if (error != cudaSuccess) return cudaGetErrorString(error);
  moved.back();
  return refused;
}
