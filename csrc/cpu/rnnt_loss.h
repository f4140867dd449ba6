// The loops over V that rnnt_loss is made of, once per instruction set.
#pragma once

#include <cstdint>

#include "cpu/instruction_set.h"

namespace prunelm {

struct Normaliser {
  double log_sum;  // log of the sum of exp(x)
  double sum;      // of exp(x - high)
};

template <typename T>
struct RnntLoops {
  // out = exp(x - high), where high is the largest x; NaN if an x is NaN or high is infinite.
  Normaliser (*exponentials)(const T* x, int64_t V, T* out);
  // x *= factor
  void (*scale)(T* x, T factor, int64_t V);
};

PRUNELM_PER_INSTRUCTION_SET(extern const RnntLoops<float> rnnt_loops_float;
                            extern const RnntLoops<double> rnnt_loops_double;)

}  // namespace prunelm
