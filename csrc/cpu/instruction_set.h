// Which of the compiled instruction sets this processor runs.
#pragma once

#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

namespace prunelm {

enum class InstructionSet { portable, avx2, avx512 };

inline const char* instruction_set_name(InstructionSet set) {
  switch (set) {
    case InstructionSet::avx512:
      return "avx512";
    case InstructionSet::avx2:
      return "avx2";
    default:
      return "portable";
  }
}

// The best one that the processor has.
inline InstructionSet best_instruction_set() {
#if defined(__x86_64__)
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("f16c");
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (avx2) return avx512 ? InstructionSet::avx512 : InstructionSet::avx2;
#endif
  return InstructionSet::portable;
}

constexpr InstructionSet kInstructionSets[] = {InstructionSet::portable, InstructionSet::avx2,
                                               InstructionSet::avx512};

// The best one, or the one that PRUNELM_ISA names (for tests); naming one that the processor lacks
// is an error, never an illegal instruction.
inline InstructionSet instruction_set() {
  static const InstructionSet chosen = [] {
    const InstructionSet best = best_instruction_set();
    const char* asked = std::getenv("PRUNELM_ISA");
    if (asked == nullptr || std::strcmp(asked, "") == 0) return best;
    for (const InstructionSet set : kInstructionSets) {
      if (std::strcmp(asked, instruction_set_name(set)) == 0 && set <= best) return set;
    }
    throw std::runtime_error(std::string("PRUNELM_ISA: expected portable to ") +
                             instruction_set_name(best) + " on this processor, got " + asked);
  }();
  return chosen;
}

// What *_simd.cpp define is declared, and chosen from, once per instruction set that setup.py
// compiles them for.
#if defined(__x86_64__)
#define PRUNELM_PER_INSTRUCTION_SET(declaration) \
  namespace portable {                           \
  declaration                                    \
  }                                              \
  namespace avx2 {                               \
  declaration                                    \
  }                                              \
  namespace avx512 {                             \
  declaration                                    \
  }
#define PRUNELM_CHOSEN(name)                                  \
  (instruction_set() == InstructionSet::avx512 ? avx512::name \
   : instruction_set() == InstructionSet::avx2 ? avx2::name   \
                                               : portable::name)
#else
#define PRUNELM_PER_INSTRUCTION_SET(declaration) \
  namespace portable {                           \
  declaration                                    \
  }
#define PRUNELM_CHOSEN(name) portable::name
#endif

}  // namespace prunelm
