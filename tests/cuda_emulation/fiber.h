// A stack for each CUDA thread and the switch between two of them. On x86-64 a switch is a dozen
// instructions; swapcontext makes two system calls.
#pragma once

#include <cstdint>
#include <memory>

#ifdef CUDA_EMULATION_MEMCHECK
#include <valgrind/valgrind.h>
#endif

#ifdef __x86_64__

// What a function must leave as it was goes on the stack; floating-point modes never change here.
extern "C" void cuda_emulation_switch(void** from, void* to);
asm(R"(
  .pushsection .text
  .weak cuda_emulation_switch
  .type cuda_emulation_switch, @function
cuda_emulation_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
  .size cuda_emulation_switch, . - cuda_emulation_switch
  .popsection
)");

#else
#include <ucontext.h>
#endif

namespace cuda_emulation {

constexpr size_t kStack = 1 << 16;

class Context {
 public:
  // The next switch to this context calls `entry`, which must never return.
  void start(void (*entry)()) {
    if (!stack_) {
      stack_.reset(new unsigned char[kStack]);
#ifdef CUDA_EMULATION_MEMCHECK
      VALGRIND_STACK_REGISTER(stack_.get(), stack_.get() + kStack);
#endif
    }
#ifdef __x86_64__
    // Six registers, where to go, and a return address that is none; aligned as behind a call.
    auto top = reinterpret_cast<uintptr_t>(stack_.get() + kStack) & ~uintptr_t{15};
    void** words = reinterpret_cast<void**>(top) - 8;
    for (int i = 0; i < 8; ++i) words[i] = nullptr;
    words[6] = reinterpret_cast<void*>(entry);
    at_ = words;
#else
    getcontext(&at_);
    at_.uc_stack.ss_sp = stack_.get();
    at_.uc_stack.ss_size = kStack;
    at_.uc_link = nullptr;
    makecontext(&at_, entry, 0);
#endif
  }

  // Goes on where `to` stopped; returns when somebody switches back.
  void switch_to(Context& to) {
#ifdef __x86_64__
    cuda_emulation_switch(&at_, to.at_);
#else
    swapcontext(&at_, &to.at_);
#endif
  }

 private:
  std::unique_ptr<unsigned char[]> stack_;
#ifdef __x86_64__
  void* at_ = nullptr;
#else
  ucontext_t at_;
#endif
};

}  // namespace cuda_emulation
