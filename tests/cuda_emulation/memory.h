// What the memory_<op>.cpp share: each runs an op's kernels on small odd shapes, every tensor in a
// heap block of its exact size and every launcher called through `launched`, for the checkers of
// emulated.py: ThreadSanitizer finds races, AddressSanitizer what is out of bounds, memcheck also
// what depends on unwritten shared memory. Built by nvcc they run on a GPU, under compute-sanitizer
// (benchmarks/gpu_check.py).
#pragma once

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

inline bool ok = true;

// Says what went wrong; an element that nobody wrote, or that came from such a one, is NaN.
inline void report(const char* name, const char* error, const std::vector<float>& out) {
  for (const float x : out) {
    if (x != x && !error) error = "an element is NaN";
  }
  if (error) std::fprintf(stderr, "%s: %s\n", name, error);
  ok = ok && !error;
}
