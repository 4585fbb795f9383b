#include "rope.h"

FOR_EACH_PROCESSOR
static int forward(const void* qkv, const void* cos, const void* sin, void* q, void* k, void* v,
                   int64_t first, int64_t last, int64_t groups, int64_t group, int64_t size,
                   int64_t axes, int dtype) {
  return by_dtype(dtype, [&](auto element, auto accumulator) __attribute__((always_inline)) {
    using T = decltype(element);
    using A = decltype(accumulator);
    const T* x = (const T*)qkv + first * groups * (group + 2) * size;
    T *to_q = (T*)q + first * groups * group * size, *to_k = (T*)k + first * groups * size,
      *to_v = (T*)v + first * groups * size;
    for (int64_t row = first; row < last; ++row) {
      const A *c = (const A*)cos + row * size, *s = (const A*)sin + row * size;
      for (int64_t g = 0; g < groups; ++g) {
        for (int64_t h = 0; h < group; ++h, x += size, to_q += size)
          turn(x, c, s, to_q, size, axes, A(1));
        turn(x, c, s, to_k, size, axes, A(1));
        std::memcpy(to_v, x + size, size * sizeof(T));
        x += 2 * size, to_k += size, to_v += size;
      }
    }
  });
}

FOR_EACH_PROCESSOR
static int backward(const void* q, const void* k, const void* v, const int64_t* strides,
                    const void* cos, const void* sin, void* grad_qkv, int64_t length, int64_t first,
                    int64_t last, int64_t groups, int64_t group, int64_t size, int64_t axes,
                    int dtype) {
  return by_dtype(dtype, [&](auto element, auto accumulator) __attribute__((always_inline)) {
    using T = decltype(element);
    using A = decltype(accumulator);
    T* to = (T*)grad_qkv + first * groups * (group + 2) * size;
    for (int64_t row = first; row < last; ++row) {
      const A *c = (const A*)cos + row * size, *s = (const A*)sin + row * size;
      auto at = [&](const void* x, const int64_t* by, int64_t head) {
        return (const T*)x + row / length * by[0] + row % length * by[1] + head * by[2];
      };
      for (int64_t g = 0; g < groups; ++g) {
        for (int64_t h = 0; h < group; ++h, to += size)
          turn(at(q, strides, g * group + h), c, s, to, size, axes, A(-1));
        turn(at(k, strides + 3, g), c, s, to, size, axes, A(-1));
        std::memcpy(to + size, at(v, strides + 6, g), size * sizeof(T));
        to += 2 * size;
      }
    }
  });
}

extern "C" int megaarch_heads_forward(const void* qkv, const void* cos, const void* sin, void* q,
                                      void* k, void* v, int64_t rows, int64_t groups, int64_t group,
                                      int64_t size, int64_t axes, int dtype, void*) {
  return in_threads(rows, groups * (group + 2) * size, [&](int64_t first, int64_t last) {
    return forward(qkv, cos, sin, q, k, v, first, last, groups, group, size, axes, dtype);
  });
}

extern "C" int megaarch_heads_backward(const void* q, const void* k, const void* v,
                                       const int64_t* strides, const void* cos, const void* sin,
                                       void* grad_qkv, int64_t batch, int64_t rows, int64_t groups,
                                       int64_t group, int64_t size, int64_t axes, int dtype,
                                       void*) {
  return in_threads(rows, groups * (group + 2) * size, [&](int64_t first, int64_t last) {
    return backward(q, k, v, strides, cos, sin, grad_qkv, rows / batch, first, last, groups, group,
                    size, axes, dtype);
  });
}
