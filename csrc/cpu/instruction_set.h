// Which of the compiled instruction sets this processor runs.
#pragma once

#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

namespace prunelm {

enum class InstructionSet { portable, avx2 };

inline const char* instruction_set_name(InstructionSet set) {
  return set == InstructionSet::avx2 ? "avx2" : "portable";
}

// The best one that the processor has, or the one that PRUNELM_ISA names (for tests); naming one
// that the processor lacks is an error, never an illegal instruction.
inline InstructionSet instruction_set() {
  static const InstructionSet chosen = [] {
    auto best = InstructionSet::portable;
#if defined(__x86_64__)
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
        __builtin_cpu_supports("f16c")) {
      best = InstructionSet::avx2;
    }
#endif
    const char* asked = std::getenv("PRUNELM_ISA");
    if (asked == nullptr || std::strcmp(asked, "") == 0) return best;
    for (auto set : {InstructionSet::portable, InstructionSet::avx2}) {
      if (std::strcmp(asked, instruction_set_name(set)) == 0 && set <= best) return set;
    }
    throw std::runtime_error(std::string("PRUNELM_ISA: expected portable to ") +
                             instruction_set_name(best) + " on this processor, got " + asked);
  }();
  return chosen;
}

}  // namespace prunelm
