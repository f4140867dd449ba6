// Low-rank linear on the CPU; contract in prunelm/ops/low_rank_linear.py.
#include "cpu/low_rank_linear.h"

#include <torch/csrc/stable/library.h>

#include "cpu/instruction_set.h"
#include "cpu/linear.h"
#include "cpu/scratch.h"

namespace prunelm {
namespace {

const LowRankLoops& loops() {
#if defined(__x86_64__)
  if (instruction_set() == InstructionSet::avx2) return avx2::low_rank_loops;
#endif
  return portable::low_rank_loops;
}

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

}  // namespace
}  // namespace prunelm

STABLE_TORCH_LIBRARY_IMPL(prunelm, CPU, m) {
  m.impl("low_rank_linear", TORCH_BOX(&prunelm::low_rank_linear_cpu));
}
