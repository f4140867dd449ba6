// What crow and col may hold, looked at before every product: in vectors, so that it costs little
// beside the smallest, and a copy of col is near when the product begins. Included by
// block_sparse_linear_simd.cpp only.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cpu/block_sparse_linear.h"

namespace prunelm::PRUNELM_ISA {
namespace {

bool good_rows(const BlockSparseView& w, int64_t nnz) {
  const int64_t rows = w.block_rows();
  int32_t falls = 0;
  for (int64_t r = 0; r < rows; ++r) falls += w.crow[r] > w.crow[r + 1];
  return w.crow[0] == 0 && w.crow[rows] == nnz && falls == 0;
}

// Columns rise but where a row begins: all are counted, then those that may not.
bool good_columns(const BlockSparseView& w, int64_t nnz) {
  if (nnz == 0) return true;
  int32_t high = w.col[0], low = w.col[0], falls = 0, allowed = 0;
  for (int64_t j = 1; j < nnz; ++j) {
    high = std::max(high, w.col[j]);
    low = std::min(low, w.col[j]);
    falls += w.col[j] <= w.col[j - 1];
  }
  for (int64_t r = 1; r < w.block_rows(); ++r) {
    const int64_t j = w.crow[r];
    if (j > 0 && j < w.crow[r + 1]) allowed += w.col[j] <= w.col[j - 1];
  }
  return low >= 0 && high < w.block_columns() && falls == allowed;
}

}  // namespace
}  // namespace prunelm::PRUNELM_ISA
