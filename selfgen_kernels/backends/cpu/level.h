// The levels of x86 that functions are compiled for, of which each process chooses one when the library is loaded.

#pragma once

#include <cstdlib>
#include <cstring>

#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__)
#define SELFGEN_X86_LEVELS 1
#else
#define SELFGEN_X86_LEVELS 0
#endif
#define SELFGEN_INLINE inline __attribute__((always_inline))

namespace {

enum class Isa { kDefault, kAvx2, kAvx512 };

// The best level of this machine, or what SELFGEN_CPU_LEVEL says if that is less.
inline Isa choose_isa() {
#if SELFGEN_X86_LEVELS
  const char* const set = std::getenv("SELFGEN_CPU_LEVEL");
  const auto may_be = [&](const char* level) { return set == nullptr || *set == 0 || std::strcmp(set, level) == 0; };
  __builtin_cpu_init();
  if (may_be("avx512") && __builtin_cpu_supports("avx512f")) return Isa::kAvx512;
  if ((may_be("avx512") || may_be("avx2")) && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
    return Isa::kAvx2;
  }
#endif
  return Isa::kDefault;
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
    if (kIsa == Isa::kAvx512) return name##_avx512 arguments;                                                      \
    if (kIsa == Isa::kAvx2) return name##_avx2 arguments;                                                          \
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
