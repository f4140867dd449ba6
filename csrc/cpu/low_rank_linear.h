// The loops of low_rank_linear, once per instruction set. They work on one pass of at most
// kLowRankRows rows of x, so that the middle z stays in the second-level cache.
#pragma once

#include <cstdint>

#include "cpu/instruction_set.h"
#include "cpu/number.h"

namespace prunelm {

constexpr int64_t kLowRankRows = 96;

struct LowRankLoops {
  // x's rows as tiles: pack_groups of them, pack_size numbers of the compute type in all.
  int64_t (*pack_groups)(int64_t M);
  int64_t (*pack_size)(int64_t M, int64_t columns);
  void (*pack)(const MatrixView& x, int64_t begin, int64_t end, void* packed);
  // Panels [begin, end) of 16 rows of down: z = x @ down.T, packed like x.
  void (*down)(const MatrixView& down, const void* packed, int64_t M, int64_t begin, int64_t end,
               void* z);
  // Panels [begin, end) of 16 rows of up: y = activation(z @ up.T + bias).
  void (*up)(const MatrixView& up, const void* z, int64_t begin, int64_t end,
             const LinearResult& y);
};

PRUNELM_PER_INSTRUCTION_SET(extern const LowRankLoops low_rank_loops;)

}  // namespace prunelm
