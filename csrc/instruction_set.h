// Vector instructions that the kernels may use: chosen at run time, so that one build serves every machine. The build
// defines ALIT_X86 where it compiles the files for x86's.
#pragma once

#include <stdexcept>
#include <string>

namespace alit {

// Each set includes those before it.
enum class InstructionSet { baseline, avx2, avx512, avx512_bf16 };

constexpr InstructionSet kInstructionSets[] = {InstructionSet::baseline, InstructionSet::avx2, InstructionSet::avx512,
                                               InstructionSet::avx512_bf16};

inline const char* name(InstructionSet set) {
  constexpr const char* names[] = {"baseline", "avx2", "avx512", "avx512_bf16"};
  return names[static_cast<int>(set)];
}

// The best that this machine and the compiler have.
inline InstructionSet best_instruction_set() {
#ifdef ALIT_X86
  __builtin_cpu_init();
#ifdef ALIT_AVX512_BF16
  // Compilers take AVX512-BF16 to bring AVX512-BW.
  if (__builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512bw")) return InstructionSet::avx512_bf16;
#endif
  if (__builtin_cpu_supports("avx512f")) return InstructionSet::avx512;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return InstructionSet::avx2;
#endif
  return InstructionSet::baseline;
}

// The set of that name; the best for an empty name. Throws if the name is unknown or the machine has it not.
inline InstructionSet instruction_set(const std::string& requested) {
  const InstructionSet best = best_instruction_set();
  if (requested.empty()) return best;
  for (const auto set : kInstructionSets) {
    if (requested != name(set)) continue;
    if (set > best) throw std::invalid_argument("instruction set " + requested + ": this machine has only " + name(best));
    return set;
  }
  throw std::invalid_argument("instruction set: expected avx512_bf16, avx512, avx2 or baseline, got " + requested);
}

}  // namespace alit
