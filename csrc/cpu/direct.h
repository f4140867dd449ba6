// What the modules' direct entries share: kernels called from Python past torch's dispatcher, with
// addresses of memory that prunelm/ops/direct.py has checked.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <optional>

#include "cpu/block_sparse_linear.h"
#include "cpu/number.h"

namespace prunelm {

using Address = uintptr_t;

inline void* pointer(Address address) { return reinterpret_cast<void*>(address); }

inline BlockSparseView direct_view(Address values, Address crow, Address col, int number, int64_t N,
                                   int64_t K, int64_t bn, int64_t bk) {
  return {pointer(values),
          Number(number),
          static_cast<const int32_t*>(pointer(crow)),
          static_cast<const int32_t*>(pointer(col)),
          N,
          K,
          bn,
          bk};
}

// Lets other Python threads run beside a product that takes longer than handing over does.
class OthersRun {
 public:
  explicit OthersRun(double multiply_adds) {
    if (multiply_adds > 300e3) released_.emplace();
  }

 private:
  std::optional<pybind11::gil_scoped_release> released_;
};

}  // namespace prunelm
