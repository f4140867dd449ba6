// Block-sparse linear on the CPU; contract in prunelm/ops/block_sparse_linear.py.
#include "cpu/block_sparse_linear.h"

#include <pybind11/pybind11.h>
#include <torch/csrc/stable/library.h>

#include <vector>

#include "cpu/block_sparse_view.h"
#include "cpu/direct.h"
#include "cpu/linear.h"
#include "cpu/scratch.h"

namespace prunelm {
namespace {

void forward(const BlockSparseView& weight, const MatrixView& x, const LinearResult& y) {
  static thread_local Scratch scratch;
  const int64_t pass = pass_rows(x.rows, weight.K, kPassRows);
  for (int64_t m = 0; m < x.rows; m += pass) {
    const int64_t count = std::min(pass, x.rows - m);
    block_sparse_pass(weight, rows_of(x, m, count), rows_of(y, m, count), scratch);
  }
}

Tensor block_sparse_linear_cpu(const Tensor& x_given, const Tensor& values, const Tensor& crow,
                               const Tensor& col, const std::optional<Tensor>& bias,
                               int64_t out_features, int64_t activation,
                               const std::optional<Tensor>& /*gpu_index*/) {
  const BlockSparseShape s =
      check_block_sparse_linear(x_given, values, crow, col, bias, out_features, activation);
  const Tensor x = x_given.is_contiguous() ? x_given : torch::stable::contiguous(x_given);
  Tensor y = torch::stable::new_empty(x, result_shape(x, s.N));
  if (y.numel() == 0) return y;
  const Tensor blocks = bn_fastest(values);
  const BlockSparseView weight = block_sparse_view(blocks, s, crow, col);
  const int64_t M = y.numel() / s.N;
  MatrixView rows = matrix_view("x", x, s.K);
  rows.rows = M;
  check_weight_dtype("values", weight.number, "x", rows.number, values);
  forward(weight, rows, linear_result(y, M, s.N, bias, activation));
  return y;
}

Tensor block_sparse_linear_empty_cpu(const Tensor& x, const Tensor&, const Tensor&, const Tensor&,
                                     const std::optional<Tensor>&, int64_t out_features, int64_t,
                                     const std::optional<Tensor>&) {
  return torch::stable::new_empty(x, result_shape(x, out_features));
}

// x, values, crow, col, (N, K), bias, activation.
PyObject* block_sparse_linear_direct(PyObject*, PyObject* const* given, Py_ssize_t count) {
  return direct(7, count, [&]() -> PyObject* {
    DirectWeight weight;
    DirectRows x;
    DirectResult y;
    const BlockSparseView& w = weight.view;
    if (!unwatched({given[0], given[1], given[5]}) || !weight.read(given + 1) ||
        !x.read(given[0], w.K, w.number) || !y.prepare(x, w.N, w.number, given[5], given[6])) {
      return nullptr;
    }
    check_pattern(w, weight.nnz);
    {
      const OthersRun others(double(weight.nnz) * double(w.bn * w.bk) * double(x.view.rows));
      forward(w, x.view, y.view());
    }
    return std::move(y).tensor();
  });
}

// The weight turned over, in memory of its own: O(its numbers), little beside the product that it
// is for.
class Transposed {
 public:
  explicit Transposed(const BlockSparseView& w)
      : start_(w.block_columns() + 1), row_(w.crow[w.block_rows()]) {
    for (size_t j = 0; j < row_.size(); ++j) ++start_[w.col[j] + 1];
    for (size_t c = 1; c < start_.size(); ++c) start_[c] += start_[c - 1];
    values_.resize(row_.size() * w.bn * w.bk * compute_bytes(w.number));
    if (w.number == Number::f64) {
      fill<double>(w);
    } else {
      fill<float>(w);
    }
    view_ = {values_.data(), w.number, start_.data(), row_.data(), w.K, w.N, w.bk, w.bn};
  }
  const BlockSparseView& view() const { return view_; }

 private:
  template <typename C>
  void fill(const BlockSparseView& w) {
    const auto* from = static_cast<const C*>(w.values);
    auto* to = reinterpret_cast<C*>(values_.data());
    std::vector<int32_t> next(start_.begin(), start_.end() - 1);
    for (int64_t r = 0; r < w.block_rows(); ++r) {
      for (int64_t j = w.crow[r]; j < w.crow[r + 1]; ++j) {
        const int64_t at = next[w.col[j]]++, size = w.bn * w.bk;
        row_[at] = int32_t(r);
        for (int64_t k = 0; k < w.bk; ++k) {
          for (int64_t n = 0; n < w.bn; ++n) {
            to[at * size + n * w.bk + k] = from[j * size + k * w.bn + n];
          }
        }
      }
    }
  }

  std::vector<int32_t> start_, row_;
  std::vector<char> values_;
  BlockSparseView view_;
};

void check_wide(const char* name, Number number, const Tensor& found) {
  if (number == Number::f32 || number == Number::f64) return;
  refuse(name, "float32 or float64", torch::headeronly::toString(found.scalar_type()));
}

Tensor block_sparse_linear_grad_x_cpu(const Tensor& grad_given, const Tensor& values,
                                      const Tensor& crow, const Tensor& col, int64_t in_features) {
  const BlockSparseShape s = check_block_sparse_grad(grad_given, values, crow, col, in_features);
  const Tensor grad = torch::stable::contiguous(grad_given);
  Tensor out = torch::stable::new_empty(grad, result_shape(grad, s.K));
  if (out.numel() == 0) return out;
  const Tensor blocks = bn_fastest(values);
  const BlockSparseView weight = block_sparse_view(blocks, s, crow, col);
  const int64_t M = out.numel() / s.K;
  MatrixView rows = matrix_view("grad", grad, s.N);
  rows.rows = M;
  check_wide("values", weight.number, values);
  check_dtype("grad", grad, values.scalar_type());
  const LinearResult result = linear_result(out, M, s.K, std::nullopt, 0);
  const BlockSparseLoops& loops = block_sparse_loops();
  if (!loops.has_panels(weight)) {
    forward(Transposed(weight).view(), rows, result);
    return out;
  }
  // Threads share the rows out: each writes to all of K.
  constexpr int64_t kGroup = 16;
  const double stored = double(col.size(0)) * double(s.bn * s.bk);
  torch::stable::parallel_for(
      0, (M + kGroup - 1) / kGroup, grain(kGroup * stored), [&](int64_t begin, int64_t end) {
        static thread_local Scratch scratch;
        const int64_t last = std::min(end * kGroup, M), most = loops.grad_x_rows(weight);
        for (int64_t m = begin * kGroup; m < last; m += most) {
          const int64_t count = std::min(most, last - m);
          void* const own =
              scratch.reserve(loops.grad_x_size(weight, count) * compute_bytes(weight.number));
          loops.grad_x(weight, rows_of(rows, m, count), own, rows_of(result, m, count));
        }
      });
  return out;
}

// Rows of x and grad that are turned over together: whole runs, as many as the second-level cache
// holds.
int64_t turned_rows(const BlockSparseShape& s) {
  const int64_t rows = (int64_t{1} << 17) / (s.N + s.K + 1) / 64 * 64;
  return std::clamp<int64_t>(rows, 64, 512);
}

Tensor block_sparse_linear_grad_values_cpu(const Tensor& grad_given, const Tensor& x_given,
                                           const Tensor& crow, const Tensor& col, int64_t bn,
                                           int64_t bk) {
  const BlockSparseShape s = check_block_sparse_grad_values(grad_given, x_given, crow, col, bn, bk);
  const Tensor grad = torch::stable::contiguous(grad_given);
  const Tensor x = torch::stable::contiguous(x_given);
  const int64_t M = s.N ? grad.numel() / s.N : 0;
  const std::vector<int64_t> shape{col.size(0), bk, bn};
  if (col.size(0) == 0 || M == 0) {
    return torch::stable::transpose(torch::stable::new_zeros(grad, shape), 1, 2);
  }
  Tensor blocks = torch::stable::new_empty(grad, shape);
  const BlockSparseView weight = block_sparse_view(blocks, s, crow, col);
  check_wide("grad", weight.number, grad);
  check_dtype("x", x, grad.scalar_type());
  MatrixView grad_rows = matrix_view("grad", grad, s.N), x_rows = matrix_view("x", x, s.K);
  grad_rows.rows = x_rows.rows = M;
  const BlockSparseLoops& loops = block_sparse_loops();
  static thread_local Scratch scratch;
  const int64_t step = std::min(turned_rows(s), M);
  void* const turned =
      scratch.reserve(loops.turned_size(weight, step) * compute_bytes(weight.number));
  for (int64_t m = 0; m < M; m += step) {
    const int64_t count = std::min(step, M - m);
    const MatrixView x_part = rows_of(x_rows, m, count), grad_part = rows_of(grad_rows, m, count);
    torch::stable::parallel_for(
        0, weight.block_columns(), grain(8.0 * count * bk),
        [&](int64_t begin, int64_t end) { loops.turn_x(weight, x_part, begin, end, turned); });
    torch::stable::parallel_for(0, weight.block_rows(), grain(8.0 * count * bn),
                                [&](int64_t begin, int64_t end) {
                                  loops.turn_grad(weight, grad_part, begin, end, turned);
                                });
    over_lines(weight.crow, weight.block_rows(), double(bn * bk * count),
               [&](int64_t begin, int64_t end) {
                 loops.grad_values(weight, count, turned, m == 0, begin, end, blocks.data_ptr());
               });
  }
  return torch::stable::transpose(blocks, 1, 2);
}

}  // namespace

void bind_block_sparse_linear(pybind11::module_& m) {
  bind_direct(m, "block_sparse_linear", &block_sparse_linear_direct);
}

}  // namespace prunelm

STABLE_TORCH_LIBRARY_IMPL(prunelm, CPU, m) {
  m.impl("block_sparse_linear", TORCH_BOX(&prunelm::block_sparse_linear_cpu));
  m.impl("block_sparse_linear_empty", TORCH_BOX(&prunelm::block_sparse_linear_empty_cpu));
  m.impl("block_sparse_linear_grad_x", TORCH_BOX(&prunelm::block_sparse_linear_grad_x_cpu));
  m.impl("block_sparse_linear_grad_values",
         TORCH_BOX(&prunelm::block_sparse_linear_grad_values_cpu));
}
