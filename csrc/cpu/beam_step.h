// The loops over V that beam_step is made of, once per instruction set.
//
// Increments are what a token adds to a hypothesis' score. They lie in chunks; of each chunk the
// loops keep `tops`, a vector that holds the largest of every lane, so that a search for the best
// few reads a quarter of the numbers.
#pragma once

#include <cstdint>

#include "cpu/instruction_set.h"
#include "cpu/number.h"

namespace prunelm {

// The loops take no fewer numbers than this: shorter rows are filled with -inf (terms: 0).
constexpr int64_t kLeastRow = 16;
// Increments are followed by so many of -inf.
constexpr int64_t kIncrementPadding = 64;
// Numbers in the tops of V increments.
constexpr int64_t tops_size(int64_t V) { return V / 4 + kLeastRow; }

// sum of exp(x - high); the log of it is taken in double.
template <typename T>
struct SoftmaxStatistics {
  T high;
  double sum;
  bool nan;
};

// increment = ((x - high) - log_sum) + weight * row + extra, where x and out may be the same.
template <typename T>
struct Increments {
  const T* x;
  T high, log_sum;
  const void* row;  // null: none
  Number number;    // of row: T, or a 16-bit one
  T weight, extra;
};

template <typename T>
struct BeamLoops {
  SoftmaxStatistics<T> (*statistics)(const T* x, int64_t V);
  // Whether there may be a NaN or +inf among the increments; then tops are of no use.
  bool (*combine)(const Increments<T>& of, int64_t V, T* out, T* tops);
  // The tops of the chunks of [begin, end) again, after changes to their increments.
  void (*renew)(const T* increments, int64_t begin, int64_t end, T* tops);
  // A number that at least `count` increments reach; -inf where tops do not tell.
  T (*reached)(const T* tops, int64_t V, int64_t count);
  // The v whose increments are above the bound, in order; how many.
  int64_t (*above)(const T* increments, const T* tops, int64_t V, T bound, int64_t* found);
};

PRUNELM_PER_INSTRUCTION_SET(extern const BeamLoops<float> beam_loops_float;
                            extern const BeamLoops<double> beam_loops_double;)

}  // namespace prunelm
