// The loops of block_sparse_linear, once per instruction set. They work on one pass of at most
// kPassRows rows of x, laid out by pack_*; the caller divides groups, lines and blocks over
// threads.
#pragma once

#include <cstdint>

#include "cpu/instruction_set.h"
#include "cpu/number.h"

namespace prunelm {

constexpr int64_t kPassRows = 96;

struct BlockSparseView {
  const void* values;  // [nnz][bk][bn]
  Number number;
  const int32_t* crow;  // [rows of blocks + 1]
  const int32_t* col;   // [nnz], ascending in a row
  int64_t N, K, bn, bk;

  int64_t block_rows() const { return (N + bn - 1) / bn; }
  int64_t block_columns() const { return (K + bk - 1) / bk; }
};

struct BlockSparseLoops {
  // Whether crow rises from 0 to nnz; and if so, whether each row's columns rise in their range.
  bool (*good_rows)(const BlockSparseView& weight, int64_t nnz);
  bool (*good_columns)(const BlockSparseView& weight, int64_t nnz);
  // Whether x must be packed; if not, forward reads it as it is.
  bool (*packs)(const BlockSparseView& weight, const MatrixView& x);
  // Forward: x's rows in groups; pack_size numbers of the compute type in all.
  int64_t (*pack_groups)(const BlockSparseView& weight, int64_t M);
  int64_t (*pack_size)(const BlockSparseView& weight, int64_t M);
  void (*pack)(const BlockSparseView& weight, const MatrixView& x, int64_t begin, int64_t end,
               void* packed);
  // Rows of blocks [begin, end) of the result.
  void (*forward)(const BlockSparseView& weight, const void* packed, int64_t begin, int64_t end,
                  const LinearResult& y);

  // Gradient of x, for blocks of whole panels: of as many rows at a time as grad_x_rows says, with
  // grad_x_size numbers of scratch; float32 and float64 only. Other blocks are turned over first,
  // and forward does it.
  bool (*has_panels)(const BlockSparseView& weight);
  int64_t (*grad_x_rows)(const BlockSparseView& weight);
  int64_t (*grad_x_size)(const BlockSparseView& weight, int64_t rows);
  void (*grad_x)(const BlockSparseView& weight, const MatrixView& grad, void* scratch,
                 const LinearResult& grad_x);

  // Gradient of the blocks, for `rows` rows of x and grad at a time, turned over into turned_size
  // numbers; float32 and float64 only. x by columns of blocks [begin, end), grad by rows of blocks.
  int64_t (*turned_size)(const BlockSparseView& weight, int64_t rows);
  void (*turn_x)(const BlockSparseView& weight, const MatrixView& x, int64_t begin, int64_t end,
                 void* turned);
  void (*turn_grad)(const BlockSparseView& weight, const MatrixView& grad, int64_t begin,
                    int64_t end, void* turned);
  // Rows of blocks [begin, end) of it; `first`: written, not added to.
  void (*grad_values)(const BlockSparseView& weight, int64_t rows, void* turned, bool first,
                      int64_t begin, int64_t end, void* values);
};

PRUNELM_PER_INSTRUCTION_SET(extern const BlockSparseLoops block_sparse_loops;)

}  // namespace prunelm
