#include "gate.h"

template <int gate, typename T, typename A>
static INLINE void forward(const T* x, T* out, int64_t count, A) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) {
    A value, slope, a, b;
    load_pair(x + 2 * i, a, b);
    apply<gate>(a, value, slope);
    store(out + i, value * b);
  }
}

template <int gate, typename T, typename A>
static INLINE void backward(const T* grad, const T* x, T* grad_x, int64_t count, A) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) {
    A value, slope, a, b, g = load(grad + i);
    load_pair(x + 2 * i, a, b);
    apply<gate>(a, value, slope);
    store_pair(grad_x + 2 * i, g * b * slope, g * value);
  }
}

FOR_EACH_PROCESSOR
static int forward(const void* x, void* out, int64_t first, int64_t last, int gate, int dtype) {
  return by_dtype(dtype, [&](auto element, auto accumulator) __attribute__((always_inline)) {
    using T = decltype(element);
    const T* from = (const T*)x + 2 * first;
    T* to = (T*)out + first;
    if (gate == SILU) forward<SILU>(from, to, last - first, accumulator);
    else forward<GELU_TANH>(from, to, last - first, accumulator);
  });
}

FOR_EACH_PROCESSOR
static int backward(const void* grad, const void* x, void* grad_x, int64_t first, int64_t last,
                    int gate, int dtype) {
  return by_dtype(dtype, [&](auto element, auto accumulator) __attribute__((always_inline)) {
    using T = decltype(element);
    const T *given = (const T*)grad + first, *from = (const T*)x + 2 * first;
    T* to = (T*)grad_x + 2 * first;
    if (gate == SILU) backward<SILU>(given, from, to, last - first, accumulator);
    else backward<GELU_TANH>(given, from, to, last - first, accumulator);
  });
}

extern "C" int megaarch_gated_forward(const void* x, void* out, int64_t count, int gate, int dtype,
                                      void*) {
  return in_threads(count, 1, [&](int64_t first, int64_t last) {
    return forward(x, out, first, last, gate, dtype);
  });
}

extern "C" int megaarch_gated_backward(const void* grad, const void* x, void* grad_x, int64_t count,
                                       int gate, int dtype, void*) {
  return in_threads(count, 1, [&](int64_t first, int64_t last) {
    return backward(grad, x, grad_x, first, last, gate, dtype);
  });
}
