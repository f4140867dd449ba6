// The inner loops of tree_attention, once per instruction set.
#pragma once

#include <cstdint>

#include "cpu/instruction_set.h"

namespace prunelm {

template <typename T>
struct TreeShape {
  int64_t heads, head_dim;
  T scale;
};

template <typename T>
struct TreeLoops {
  // Turns the pairs (x[i], x[i + head_dim / 2]) of every head; cos, sin [head_dim / 2].
  void (*rotate)(const T* x, const T* cos, const T* sin, const TreeShape<T>& shape, T* out);
  // out [heads, head_dim] of one query over the cache rows path[0 .. length); scratch holds
  // heads * length.
  void (*attend)(const T* query, const T* key, const T* value, const int64_t* path, int64_t length,
                 const TreeShape<T>& shape, T* scratch, T* out);
};

PRUNELM_PER_INSTRUCTION_SET(extern const TreeLoops<float> tree_loops_float;
                            extern const TreeLoops<double> tree_loops_double;)

}  // namespace prunelm
