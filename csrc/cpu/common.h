// Element types of the CPU's kernels and their accumulators, exponentials and threads.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

#include "../cpu.h"

// One function in a version for each kind of processor, chosen when the library is loaded.
#if defined(__x86_64__) && defined(__GNUC__) && __GNUC__ >= 12 && !defined(__clang__)
#define FOR_EACH_PROCESSOR \
  __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define FOR_EACH_PROCESSOR
#endif
#define INLINE inline __attribute__((always_inline))

struct bfloat16 {
  uint16_t bits;
};

// Elements in memory as accumulators. Of a bfloat16 the bits are read, never the struct, which would
// not be vectorized.
static INLINE float load(const bfloat16* p) {
  uint32_t u = uint32_t(p->bits) << 16;
  float value;
  std::memcpy(&value, &u, sizeof value);
  return value;
}
static INLINE uint32_t bits(float value) {  // to nearest, ties to even; NaN stays NaN
  uint32_t u;
  std::memcpy(&u, &value, sizeof u);
  return value != value ? 0x7fc0u : (u + 0x7fff + (u >> 16 & 1)) >> 16;
}
static INLINE void store(bfloat16* p, float value) { p->bits = uint16_t(bits(value)); }
// Two neighbours, of bfloat16 in one word.
static INLINE void load_pair(const bfloat16* p, float& a, float& b) {
  uint32_t both;
  std::memcpy(&both, p, sizeof both);
  uint32_t low = both << 16, high = both & 0xffff0000u;
  std::memcpy(&a, &low, sizeof a);
  std::memcpy(&b, &high, sizeof b);
}
static INLINE void store_pair(bfloat16* p, float a, float b) {
  uint32_t both = bits(a) | bits(b) << 16;
  std::memcpy(p, &both, sizeof both);
}
static INLINE float load(const float* p) { return *p; }
static INLINE void store(float* p, float value) { *p = value; }
static INLINE double load(const double* p) { return *p; }
static INLINE void store(double* p, double value) { *p = value; }
template <typename A>
static INLINE void load_pair(const A* p, A& a, A& b) {
  a = p[0], b = p[1];
}
template <typename A>
static INLINE void store_pair(A* p, A a, A b) {
  p[0] = a, p[1] = b;
}

// e^x in arithmetic that compilers vectorize; 0 below -87.3, where floats lose bits, infinity above
// 88.7. To 2 units in the last place: 2^n times a Taylor polynomial on half of ln 2 to either side.
static INLINE float exponential(float x) {
  float inside = x < -87.3f ? -87.3f : x > 88.7f ? 88.7f : x;
  float shifted = inside * 1.44269504f + 12582912.f;  // 1.5 * 2^23: the sum is rounded to integers
  float n = shifted - 12582912.f;
  float r = inside - n * 0.693145752f - n * 1.42860677e-6f;  // ln 2 in two parts
  float p = 1.f / 5040;
  p = p * r + 1.f / 720;
  p = p * r + 1.f / 120;
  p = p * r + 1.f / 24;
  p = p * r + 1.f / 6;
  p = p * r + 0.5f;
  p = p * r + 1.f;
  p = p * r + 1.f;
  int32_t bits, power;
  std::memcpy(&bits, &p, sizeof bits);
  std::memcpy(&power, &shifted, sizeof power);
  bits += int32_t(uint32_t(power) << 23);
  std::memcpy(&p, &bits, sizeof p);
  return x < -87.3f ? 0.f : x > 88.7f ? INFINITY : x != x ? x : p;
}
static INLINE double exponential(double x) { return std::exp(x); }

// run(element, accumulator) with values of the types of `dtype`.
template <typename Run>
INLINE int by_dtype(int dtype, Run run) {
  switch (dtype) {
    case FLOAT32: run(float{}, float{}); return 0;
    case BFLOAT16: run(bfloat16{}, float{}); return 0;
    case FLOAT64: run(double{}, double{}); return 0;
    default: return UNSUPPORTED_DTYPE;
  }
}

// run(first, last) over ranges of `rows`, each about as much work as 2^14 figures, in the threads of
// the process. run returns a Status.
template <typename Run>
int in_threads(int64_t rows, int64_t width, Run run) {
  int64_t most = (1 << 14) / (width > 0 ? width : 1) + 1, ranges = (rows + most - 1) / most;
  int status = 0;
#pragma omp parallel for schedule(static) if (ranges > 1)
  for (int64_t i = 0; i < ranges; ++i) {
    int64_t last = (i + 1) * most;
    if (int code = run(i * most, last < rows ? last : rows)) {
#pragma omp atomic write
      status = code;
    }
  }
  return status;
}
