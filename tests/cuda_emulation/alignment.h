// A misaligned address ends the thread with an error, as on a GPU; where built with
// -fsanitize=alignment, which calls this. (Threads get the sanitizer's own report.)
#pragma once

#include <cstdio>
#include <cstdlib>

#include "threads.h"

#ifndef CUDA_EMULATION_THREADS

namespace cuda_emulation {

struct SourceLocation {
  const char* file;
  unsigned line, column;
};

}  // namespace cuda_emulation

extern "C" __attribute__((weak)) void __ubsan_handle_type_mismatch_v1(void* data, void*) {
  const auto& at = *static_cast<cuda_emulation::SourceLocation*>(data);
  const std::string why =
      "a misaligned address, " + std::string(at.file) + ":" + std::to_string(at.line);
  if (!cuda_emulation::running) {
    std::fprintf(stderr, "%s\n", why.c_str());
    std::abort();
  }
  cuda_emulation::fail(why);
  cuda_emulation::end_thread();
  cuda_emulation::end_fiber();
}

#endif
