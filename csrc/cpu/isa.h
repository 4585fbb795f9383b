// Which versions of a function a library has, and which of them this processor runs. A file that is
// included once an instruction set has vectors as wide as its own: target_clones would take those that are
// wider than the default processor's apart before inlining.
#pragma once

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && !defined(GENERIC)
#if __GNUC__ >= 12  // which knows the levels of x86-64
#define X86_VERSIONS
#include <immintrin.h>
#ifdef __linux__
#include <sys/syscall.h>
#include <unistd.h>
#endif

enum Processor { ANY, AVX2, AVX512, AVX512_BF16 };
static Processor processor() {
  // Intel's multiply pairs of bfloat16 no faster than floats, which need no pairing (docs/log.md).
  if (__builtin_cpu_supports("x86-64-v4"))
    return __builtin_cpu_supports("avx512bf16") && !__builtin_cpu_is("intel") ? AVX512_BF16 : AVX512;
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") ? AVX2 : ANY;
}
// Whether it multiplies tiles of bfloat16, and the system keeps them for this process (asked once).
[[maybe_unused]] static bool has_matrix_units() {
#ifdef __linux__
  constexpr int ASK = 0x1023, TILES = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  static const bool found = __builtin_cpu_supports("amx-tile") && __builtin_cpu_supports("amx-bf16") &&
                            __builtin_cpu_supports("avx512bf16") &&
                            syscall(SYS_arch_prctl, ASK, TILES) == 0;
  return found;
#else
  return false;
#endif
}
#endif
#endif
