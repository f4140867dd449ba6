// The loops of block_sparse_linear, once per instruction set. They work on one pass of at most
// kPassRows rows of x, laid out by pack_*; the caller divides groups, lines and blocks over
// threads.
#pragma once

#include <cstdint>

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

// The blocks of each column: which row of blocks, and which place in values.
struct ColumnsView {
  const int32_t* start;  // [columns of blocks + 1]
  const int32_t* row;    // [nnz], ascending in a column
  const int32_t* place;  // [nnz]
};

struct BlockSparseLoops {
  // Forward: x's rows in groups; pack_size numbers of the compute type in all.
  int64_t (*pack_groups)(const BlockSparseView& weight, int64_t M);
  int64_t (*pack_size)(const BlockSparseView& weight, int64_t M);
  void (*pack)(const BlockSparseView& weight, const MatrixView& x, int64_t begin, int64_t end,
               void* packed);
  // Rows of blocks [begin, end) of the result.
  void (*forward)(const BlockSparseView& weight, const void* packed, int64_t begin, int64_t end,
                  const LinearResult& y);

  // Gradient of x: float32 and float64 only. grad's rows in groups of 16, 16 * N numbers each.
  void (*pack_grad)(const MatrixView& grad, int64_t begin, int64_t end, void* packed);
  // Columns of blocks [begin, end) of the result.
  void (*grad_x)(const BlockSparseView& weight, const ColumnsView& columns, const void* packed,
                 int64_t begin, int64_t end, const LinearResult& grad_x);

  // Gradient of blocks [begin, end), which are in rows of blocks row[begin:end]; float32 and
  // float64. grad has rows of bn * block_rows() + 16 columns and x of bk * block_columns().
  void (*grad_values)(const BlockSparseView& weight, const int32_t* row, const MatrixView& grad,
                      const MatrixView& x, int64_t begin, int64_t end, void* grad_values);
};

namespace portable {
extern const BlockSparseLoops block_sparse_loops;
}
#if defined(__x86_64__)
namespace avx2 {
extern const BlockSparseLoops block_sparse_loops;
}
#endif

}  // namespace prunelm
