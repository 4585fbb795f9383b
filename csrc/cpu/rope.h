// RoPE (Su et al. 2021, section 3.2.2).
#pragma once
#include "common.h"

// A head's channels turned: to = x * cos + swapped(x) * sin, or with -sin.
template <typename T, typename A>
static INLINE void turn(const T* x, const A* cos, const A* sin, T* to, int64_t size, int64_t axes,
                        A sign) {
  int64_t half = size / axes / 2;
  for (int64_t axis = 0; axis < axes; ++axis, x += 2 * half, to += 2 * half) {
#pragma omp simd
    for (int64_t i = 0; i < half; ++i) {
      A a = load(x + i), b = load(x + i + half);
      store(to + i, a * cos[i] + sign * b * sin[i]);
      store(to + i + half, b * cos[i + half] + sign * a * sin[i + half]);
    }
    cos += 2 * half, sin += 2 * half;
  }
}
