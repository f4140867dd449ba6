// What the memory_<op>.cpp share: each runs an op's kernels on small odd shapes, every tensor in a
// heap block of its exact size and every launcher called through `launched`, for the checkers of
// emulated.py: ThreadSanitizer finds races, AddressSanitizer what is out of bounds, memcheck also
// what depends on unwritten shared memory. Built by nvcc they run on a GPU, under compute-sanitizer
// (benchmarks/gpu_check.py).
#pragma once

#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <memory>
#include <random>
#include <vector>

#include "cuda/launch.h"
#ifdef ON_DEVICE
#include "on_device.h"
#else
// The launcher's error text or nullptr.
template <typename... Parameters, typename... Arguments>
const char* launched(const char* (*launcher)(Parameters...), const Arguments&... arguments) {
  return launcher(arguments...);
}
#endif

using namespace prunelm::cuda;

inline std::vector<float> random(int64_t size) {
  static std::mt19937 generator(0);
  std::normal_distribution<float> normal;
  std::vector<float> out(size);
  for (float& x : out) x = normal(generator);
  return out;
}

inline void convert(__nv_bfloat16& to, float from) { to = __float2bfloat16_rn(from); }
inline void convert(float& to, float from) { to = from; }
inline float widen(__nv_bfloat16 from) { return __bfloat162float(from); }
inline float widen(float from) { return from; }

template <typename T>
std::vector<T> as(const std::vector<float>& wide) {
  std::vector<T> out(wide.size());  // its exact size, as all tensors here
  for (size_t i = 0; i < wide.size(); ++i) convert(out[i], wide[i]);
  return out;
}

inline bool ok = true;

// Says what went wrong; an element that nobody wrote, or that came from such a one, is NaN.
inline void report(const char* name, const char* error, const std::vector<float>& out) {
  for (const float x : out) {
    if (x != x && !error) error = "an element is NaN";
  }
  if (error) std::fprintf(stderr, "%s: %s\n", name, error);
  ok = ok && !error;
}
