// From the tensors of a block-sparse weight to a view that the loops take, and one pass over it.
#pragma once

#include <torch/csrc/stable/ops.h>

#include "check.h"
#include "cpu/block_sparse_linear.h"
#include "cpu/linear.h"
#include "cpu/scratch.h"

namespace prunelm {

inline const BlockSparseLoops& block_sparse_loops() { return PRUNELM_CHOSEN(block_sparse_loops); }

// Contents of crow and col; without these checks a damaged file would make the loops read anywhere.
inline void check_pattern(const BlockSparseView& weight, int64_t nnz) {
  const BlockSparseLoops& loops = block_sparse_loops();
  if (!loops.good_rows(weight, nnz)) refuse("crow", "0 to nnz, never falling", "something else");
  if (!loops.good_columns(weight, nnz)) {
    refuse("col",
           "columns in [0, " + std::to_string(weight.block_columns()) + "), ascending in each row",
           "something else");
  }
}

// The blocks themselves where bn is fastest in memory, else a copy in which it is.
inline Tensor bn_fastest(const Tensor& values) {
  const int64_t nnz = values.size(0), bn = values.size(1), bk = values.size(2);
  const bool as_read = (bn == 1 || values.stride(1) == 1) && (bk == 1 || values.stride(2) == bn) &&
                       (nnz <= 1 || values.stride(0) == bn * bk);
  return as_read ? values : torch::stable::contiguous(torch::stable::transpose(values, 1, 2));
}

inline BlockSparseView block_sparse_view(const Tensor& blocks, const BlockSparseShape& s,
                                         const Tensor& crow, const Tensor& col) {
  const BlockSparseView weight{blocks.data_ptr(),
                               number_of("values", blocks),
                               static_cast<const int32_t*>(crow.data_ptr()),
                               static_cast<const int32_t*>(col.data_ptr()),
                               s.N,
                               s.K,
                               s.bn,
                               s.bk};
  check_pattern(weight, col.size(0));
  return weight;
}

// run(begin, end) on lines of blocks, threads getting equal shares of the stored blocks. A line's
// own result counts as one more block, so that empty lines are shared out too.
template <typename Run>
void over_lines(const int32_t* start, int64_t count, double multiply_adds_per_block, Run run) {
  const auto first = [&](int64_t share) {
    int64_t low = 0, high = count;
    while (low < high) {
      const int64_t middle = (low + high) / 2;
      if (start[middle] + middle < share) {
        low = middle + 1;
      } else {
        high = middle;
      }
    }
    return low;
  };
  torch::stable::parallel_for(0, start[count] + count, grain(multiply_adds_per_block),
                              [&](int64_t begin, int64_t end) { run(first(begin), first(end)); });
}

// y = activation(x @ weight.T + bias) for at most kPassRows rows.
inline void block_sparse_pass(const BlockSparseView& weight, const MatrixView& x,
                              const LinearResult& y, Scratch& scratch) {
  const BlockSparseLoops& loops = block_sparse_loops();
  const void* rows = x.data;
  if (loops.packs(weight, x)) {
    void* const packed =
        scratch.reserve(loops.pack_size(weight, x.rows) * compute_bytes(weight.number));
    torch::stable::parallel_for(
        0, loops.pack_groups(weight, x.rows), grain(64.0 * weight.K),
        [&](int64_t begin, int64_t end) { loops.pack(weight, x, begin, end, packed); });
    rows = packed;
  }
  over_lines(weight.crow, weight.block_rows(), double(weight.bn * weight.bk * x.rows),
             [&](int64_t begin, int64_t end) { loops.forward(weight, rows, begin, end, y); });
}

}  // namespace prunelm
