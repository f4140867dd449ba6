// Low-rank linear on the CPU; contract in prunelm/ops/low_rank_linear.py.
#include "cpu/low_rank_linear.h"

#include <pybind11/pybind11.h>
#include <torch/csrc/stable/library.h>

#include "cpu/block_sparse_linear.h"
#include "cpu/block_sparse_view.h"
#include "cpu/direct.h"
#include "cpu/linear.h"
#include "cpu/scratch.h"

namespace prunelm {
namespace {

const LowRankLoops& loops() { return PRUNELM_CHOSEN(low_rank_loops); }

Tensor dense(const Tensor& tensor) {
  return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
}

Tensor low_rank_linear_cpu(const Tensor& x_given, const Tensor& down_given, const Tensor& up_given,
                           const std::optional<Tensor>& bias, int64_t activation) {
  const LowRankShape s = check_low_rank_linear(x_given, down_given, up_given, bias, activation);
  const Tensor x = dense(x_given), down = dense(down_given), up = dense(up_given);
  Tensor y = torch::stable::new_empty(x, result_shape(x, s.N));
  if (y.numel() == 0) return y;
  const int64_t M = y.numel() / s.N;
  MatrixView rows = matrix_view("x", x, s.K);
  rows.rows = M;
  MatrixView wide = matrix_view("up", up, s.R), thin = matrix_view("down", down, s.K);
  wide.rows = s.N;
  thin.rows = s.R;
  check_weight_dtype("down", thin.number, "x", rows.number, down);
  const LinearResult result = linear_result(y, M, s.N, bias, activation);

  static thread_local Scratch scratch;
  const size_t bytes = compute_bytes(thin.number);
  const int64_t pass = pass_rows(M, s.K, kLowRankRows);
  for (int64_t m = 0; m < M; m += pass) {
    const int64_t count = std::min(pass, M - m);
    const MatrixView part = rows_of(rows, m, count);
    const LinearResult part_of_y = rows_of(result, m, count);
    const size_t packed_bytes = (loops().pack_size(count, s.K) * bytes + 63) / 64 * 64;
    char* const packed =
        static_cast<char*>(scratch.reserve(packed_bytes + loops().pack_size(count, s.R) * bytes));
    char* const z = packed + packed_bytes;
    torch::stable::parallel_for(
        0, loops().pack_groups(count), grain(64.0 * s.K),
        [&](int64_t begin, int64_t end) { loops().pack(part, begin, end, packed); });
    torch::stable::parallel_for(
        0, (s.R + 15) / 16, grain(16.0 * s.K * count),
        [&](int64_t begin, int64_t end) { loops().down(thin, packed, count, begin, end, z); });
    torch::stable::parallel_for(
        0, (s.N + 15) / 16, grain(16.0 * s.R * count),
        [&](int64_t begin, int64_t end) { loops().up(wide, z, begin, end, part_of_y); });
  }
  return y;
}

void forward(const BlockSparseView& down, const BlockSparseView& up, const MatrixView& x,
             const LinearResult& y) {
  static thread_local Scratch x_scratch, z_scratch;
  const size_t bytes = compute_bytes(down.number);
  const Number number = bytes == 8 ? Number::f64 : Number::f32;
  const int64_t rank = down.N, pass = pass_rows(x.rows, down.K, kLowRankRows);
  for (int64_t m = 0; m < x.rows; m += pass) {
    const int64_t count = std::min(pass, x.rows - m);
    void* const z = z_scratch.reserve(count * rank * bytes);
    const LinearResult middle{z, number, count, rank, nullptr, number, Activation::none};
    block_sparse_pass(down, rows_of(x, m, count), middle, x_scratch);
    const MatrixView z_rows{z, number, count, rank, rank};
    block_sparse_pass(up, z_rows, rows_of(y, m, count), x_scratch);
  }
}

// The same with factors that were laid out before the call: in blocks, in practice all of them.
Tensor low_rank_linear_blocks_cpu(const Tensor& x_given, const Tensor& down_values,
                                  const Tensor& down_crow, const Tensor& down_col,
                                  const Tensor& up_values, const Tensor& up_crow,
                                  const Tensor& up_col, const std::optional<Tensor>& bias,
                                  int64_t rank, int64_t out_features, int64_t activation) {
  const BlockSparseShape thin =
      check_block_sparse_linear(x_given, down_values, down_crow, down_col, std::nullopt, rank, 0);
  const BlockSparseShape wide =
      check_low_rank_up(x_given, up_values, up_crow, up_col, bias, out_features, rank, activation);
  check_dtype_of("up_values", up_values, "down_values", down_values);
  const Tensor x = dense(x_given);
  Tensor y = torch::stable::new_empty(x, result_shape(x, wide.N));
  if (y.numel() == 0) return y;
  const Tensor down_blocks = bn_fastest(down_values), up_blocks = bn_fastest(up_values);
  const BlockSparseView down = block_sparse_view(down_blocks, thin, down_crow, down_col);
  const BlockSparseView up = block_sparse_view(up_blocks, wide, up_crow, up_col);
  const int64_t M = y.numel() / wide.N;
  MatrixView rows = matrix_view("x", x, thin.K);
  rows.rows = M;
  check_weight_dtype("down_values", down.number, "x", rows.number, down_values);
  forward(down, up, rows, linear_result(y, M, wide.N, bias, activation));
  return y;
}

// x, then values, crow, col and (N, K) of down and of up, bias, activation.
PyObject* low_rank_linear_direct(PyObject*, PyObject* const* given, Py_ssize_t count) {
  return direct(11, count, [&]() -> PyObject* {
    DirectWeight down, up;
    DirectRows x;
    DirectResult y;
    if (!unwatched({given[0], given[1], given[5], given[9]}) || !down.read(given + 1) ||
        !up.read(given + 5) || up.view.number != down.view.number || up.view.K != down.view.N ||
        !x.read(given[0], down.view.K, down.view.number) ||
        !y.prepare(x, up.view.N, up.view.number, given[9], given[10])) {
      return nullptr;
    }
    check_pattern(down.view, down.nnz);
    check_pattern(up.view, up.nnz);
    const double stored = double(down.nnz) * double(down.view.bn * down.view.bk) +
                          double(up.nnz) * double(up.view.bn * up.view.bk);
    {
      const OthersRun others(stored * double(x.view.rows));
      forward(down.view, up.view, x.view, y.view());
    }
    return std::move(y).tensor();
  });
}

}  // namespace

void bind_low_rank_linear(pybind11::module_& m) {
  bind_direct(m, "low_rank_linear", &low_rank_linear_direct);
}

}  // namespace prunelm

STABLE_TORCH_LIBRARY_IMPL(prunelm, CPU, m) {
  m.impl("low_rank_linear", TORCH_BOX(&prunelm::low_rank_linear_cpu));
  m.impl("low_rank_linear_blocks", TORCH_BOX(&prunelm::low_rank_linear_blocks_cpu));
}
