// The loops over V that beam_step is made of, once per instruction set.
#pragma once

#include <cstdint>

#include "cpu/instruction_set.h"

namespace prunelm {

// sum of exp(x - high); the log of it is taken in double.
template <typename T>
struct SoftmaxStatistics {
  T high;
  double sum;
  bool nan;
};

template <typename T>
struct BeamLoops {
  SoftmaxStatistics<T> (*statistics)(const T* x, int64_t V);
  // out = x - high - log_sum
  void (*log_softmax)(const T* x, T high, T log_sum, int64_t V, T* out);
  // out += weight * row
  void (*add)(const T* row, T weight, int64_t V, T* out);
  // The first v >= begin whose x[v] is above bound or NaN; V if none.
  int64_t (*next_above)(const T* x, int64_t begin, int64_t V, T bound);
};

PRUNELM_PER_INSTRUCTION_SET(extern const BeamLoops<float> beam_loops_float;
                            extern const BeamLoops<double> beam_loops_double;)

}  // namespace prunelm
