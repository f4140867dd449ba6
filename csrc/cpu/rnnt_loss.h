// The loops over V that rnnt_loss is made of, once per instruction set.
#pragma once

#include <cstdint>

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

namespace portable {
extern const RnntLoops<float> rnnt_loops_float;
extern const RnntLoops<double> rnnt_loops_double;
}  // namespace portable

#if defined(__x86_64__)
namespace avx2 {
extern const RnntLoops<float> rnnt_loops_float;
extern const RnntLoops<double> rnnt_loops_double;
}  // namespace avx2
#endif

}  // namespace prunelm
