// The levels of x86 that functions are compiled for, of which each process chooses one when the library is loaded.

#pragma once

#include <cstdlib>
#include <cstring>

#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__)
#define SELFGEN_X86_LEVELS 1
#else
#define SELFGEN_X86_LEVELS 0
#endif
#if SELFGEN_X86_LEVELS && __GNUC__ >= 10  // older ones know no such instruction
#define SELFGEN_X86_BF16 1
#else
#define SELFGEN_X86_BF16 0
#endif
#define SELFGEN_INLINE inline __attribute__((always_inline))

namespace {

enum class Isa { kDefault, kAvx2, kAvx512, kAvx512Bf16 };  // each has what those before it have
constexpr const char* kIsaNames[] = {"default", "avx2", "avx512", "avx512_bf16"};

// The best level of this machine, or what SELFGEN_CPU_LEVEL says if that is less.
inline Isa choose_isa() {
  Isa best = Isa::kDefault;
#if SELFGEN_X86_LEVELS
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) best = Isa::kAvx2;
  if (best == Isa::kAvx2 && __builtin_cpu_supports("avx512f")) best = Isa::kAvx512;
#if SELFGEN_X86_BF16
  if (best == Isa::kAvx512 && __builtin_cpu_supports("avx512bf16")) best = Isa::kAvx512Bf16;
#endif
  const char* const set = std::getenv("SELFGEN_CPU_LEVEL");
  for (int isa = 0; isa < int(best) && set != nullptr; ++isa) {
    if (std::strcmp(set, kIsaNames[isa]) == 0) return Isa(isa);
  }
#endif
  return best;
}

const Isa kIsa = choose_isa();

}  // namespace

// SELFGEN_CLONES(result, name, (type x, ..), (x, ..)) makes the function `name` of the always inlined `name_`, compiled
// for each level. No floating-point flag that could change a result is set: every level gives the same bits.
#if SELFGEN_X86_LEVELS
#define SELFGEN_CLONES(result, name, parameters, arguments)                                                  \
  [[maybe_unused]] __attribute__((target("avx512f"))) result name##_avx512 parameters { return name##_ arguments; } \
  [[maybe_unused]] __attribute__((target("avx2"))) result name##_avx2 parameters { return name##_ arguments; }      \
  [[maybe_unused]] __attribute__((noinline)) result name##_default parameters { return name##_ arguments; }         \
  [[maybe_unused]] SELFGEN_INLINE result name parameters {                                                   \
    if (kIsa >= Isa::kAvx512) return name##_avx512 arguments;                                                      \
    if (kIsa >= Isa::kAvx2) return name##_avx2 arguments;                                                          \
    return name##_default arguments;                                                                          \
  }
#else
#define SELFGEN_CLONES(result, name, parameters, arguments) \
  [[maybe_unused]] inline result name parameters { return name##_ arguments; }
#endif

// Functions of one level that is chosen by hand, as their vectors are as long as its registers.
#if SELFGEN_X86_LEVELS
#define SELFGEN_LEVEL(names) __attribute__((target(names), optimize("fp-contract=fast")))
#endif
