#include "cpu/block_sparse_gradient.h"
#include "cpu/block_sparse_linear.h"
#include "cpu/block_sparse_lines.h"
#include "cpu/block_sparse_panels.h"
#include "cpu/block_sparse_pattern.h"

namespace prunelm::PRUNELM_ISA {
namespace {

// Blocks of whole panels are read 16 outputs at a time; others have their outputs broadcast to 16
// rows of x.
bool has_panels(const BlockSparseView& w) { return w.bn % kWidth == 0; }

bool packs(const BlockSparseView& w, const MatrixView& x) {
  const bool computed_in = x.number == (w.number == Number::f64 ? Number::f64 : Number::f32);
  return !(has_panels(w) && x.rows == 1 && computed_in);
}

int64_t pack_groups(const BlockSparseView& w, int64_t M) {
  return has_panels(w) ? Tiles(M).count() : lane_groups(M);
}

// Panels: one tile more, which is fetched ahead and never read.
int64_t pack_size(const BlockSparseView& w, int64_t M) {
  return w.K * (has_panels(w) ? M + kTileRows : row_lanes(M));
}

void pack(const BlockSparseView& w, const MatrixView& x, int64_t begin, int64_t end, void* packed) {
  if (has_panels(w)) return pack_tiles(x, begin, end, packed);
  pack_lanes(x, begin, end, packed);
}

void forward(const BlockSparseView& w, const void* packed, int64_t begin, int64_t end,
             const LinearResult& y) {
  with_number(w.number, [&](auto zero) {
    using W = decltype(zero);
    const auto* x = static_cast<const Compute<W>*>(packed);
    if (!has_panels(w)) return forward_lines<W>(w, x, begin, end, y);
#if defined(__AVX2__)  // elsewhere what the compiler knows of blocks saves little
    if constexpr (__is_same(W, float) || __is_same(W, Bf16)) {
      if (w.bn == kWidth && w.bk == 1) return forward_panels<1, kWidth, W>(w, x, begin, end, y);
      if (w.bn == kWidth && w.bk == 4) return forward_panels<4, kWidth, W>(w, x, begin, end, y);
    }
    if constexpr (__is_same(W, float)) {
      if (w.bn == kWidth && w.bk % 16 == 0) {
        return forward_panels<16, kWidth, W>(w, x, begin, end, y);
      }
    }
    if constexpr (__is_same(W, float) || __is_same(W, Bf16)) {
      if (w.bk % 16 == 0) return forward_panels<16, 0, W>(w, x, begin, end, y);
    }
#endif
    forward_panels<0, 0, W>(w, x, begin, end, y);
  });
}

void grad_x(const BlockSparseView& w, const MatrixView& grad, void* scratch,
            const LinearResult& out) {
  if (w.number == Number::f64) return grad_x_of_panels<double>(w, grad, scratch, out);
  grad_x_of_panels<float>(w, grad, scratch, out);
}

int64_t turned_size(const BlockSparseView& w, int64_t rows) {
  const int64_t x = w.block_columns() * w.bk, grad = w.block_rows() * w.bn;
  return (x + grad) * in_eights(rows);
}

// run(C{}) for float32 or float64.
template <typename Run>
void with_wide(Number number, Run run) {
  if (number == Number::f64) return run(double{});
  run(float{});
}

template <typename C>
C* turned_grad(const BlockSparseView& w, int64_t rows, void* turned) {
  return static_cast<C*>(turned) + w.block_columns() * w.bk * in_eights(rows);
}

void turn_x(const BlockSparseView& w, const MatrixView& x, int64_t begin, int64_t end,
            void* turned) {
  with_wide(x.number, [&](auto zero) {
    turn_columns(x, begin * w.bk, end * w.bk, static_cast<decltype(zero)*>(turned));
  });
}

void turn_grad(const BlockSparseView& w, const MatrixView& grad, int64_t begin, int64_t end,
               void* turned) {
  with_wide(grad.number, [&](auto zero) {
    auto* const out = turned_grad<decltype(zero)>(w, grad.rows, turned);
    if (!has_panels(w)) return turn_columns(grad, begin * w.bn, end * w.bn, out);
    cut_panels(grad, begin * w.bn / kWidth, end * w.bn / kWidth, out);
  });
}

void grad_values(const BlockSparseView& w, int64_t rows, void* turned, bool first, int64_t begin,
                 int64_t end, void* out) {
  with_wide(w.number, [&](auto zero) {
    using C = decltype(zero);
    const C* const x = static_cast<C*>(turned);
    const C* const grad = turned_grad<C>(w, rows, turned);
    const auto run = has_panels(w) ? grad_of_panels<C> : grad_of_lines<C>;
    run(w, rows, x, grad, first, begin, end, static_cast<C*>(out));
  });
}

}  // namespace

const BlockSparseLoops block_sparse_loops{
    good_rows,   good_columns, packs,  pack_groups, pack_size, pack,      forward,    has_panels,
    grad_x_rows, grad_x_size,  grad_x, turned_size, turn_x,    turn_grad, grad_values};

}  // namespace prunelm::PRUNELM_ISA
