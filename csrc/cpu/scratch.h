// Memory for a call's intermediate numbers, kept by its thread: at M = 1 asking the system for it
// would take as long as the work.
#pragma once

#include <cstddef>
#include <new>

namespace prunelm {

class Scratch {
 public:
  ~Scratch() { release(); }

  // At least `bytes`, aligned to a cache line; what an earlier call wrote may still be there.
  void* reserve(size_t bytes) {
    if (bytes > size_) {
      release();
      data_ = ::operator new(bytes, std::align_val_t{64});
      size_ = bytes;
    }
    return data_;
  }

 private:
  void release() {
    if (data_) ::operator delete(data_, std::align_val_t{64});
    data_ = nullptr;
    size_ = 0;
  }
  void* data_ = nullptr;
  size_t size_ = 0;
};

}  // namespace prunelm
