#include <algorithm>

#include "common.h"

extern "C" const char* megaarch_error(int code) {
  return code == UNSUPPORTED_DTYPE  ? "no kernel for this dtype"
         : code == UNSUPPORTED_SIZE ? "no kernel for this size"
                                    : "an index is out of range";
}

template <typename T, typename A>
static INLINE void forward_row(const T* x, const T* weight, T* out, A& rstd, int64_t width,
                               A epsilon) {
  A sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < width; ++i) sum += load(x + i) * load(x + i);
  A scale = rstd = 1 / std::sqrt(sum / width + epsilon);
#pragma omp simd
  for (int64_t i = 0; i < width; ++i) store(out + i, load(x + i) * scale * load(weight + i));
}

template <typename T, typename A>
static INLINE void backward_row(const T* grad, const T* x, const T* weight, A rstd, T* grad_x,
                                A* sums, int64_t width) {
  A dot = 0;
#pragma omp simd reduction(+ : dot)
  for (int64_t i = 0; i < width; ++i) {
    A product = load(grad + i) * load(x + i) * rstd;
    sums[i] += product;
    dot += product * load(weight + i);
  }
  A of_x = rstd * rstd * dot / width;
#pragma omp simd
  for (int64_t i = 0; i < width; ++i)
    store(grad_x + i, rstd * load(weight + i) * load(grad + i) - load(x + i) * of_x);
}

FOR_EACH_PROCESSOR
static int forward(const void* x, const void* weight, void* out, void* rstd, int64_t first,
                   int64_t last, int64_t width, double epsilon, int dtype) {
  return by_dtype(dtype, [&](auto element, auto accumulator) __attribute__((always_inline)) {
    using T = decltype(element);
    using A = decltype(accumulator);
    for (int64_t r = first; r < last; ++r)
      forward_row((const T*)x + r * width, (const T*)weight, (T*)out + r * width, ((A*)rstd)[r],
                  width, A(epsilon));
  });
}

// The rows of one stage's sum of the weight's gradient.
FOR_EACH_PROCESSOR
static int backward(const void* grad, const void* x, const void* weight, const void* rstd,
                    void* grad_x, void* partial, int64_t stage, int64_t first, int64_t last,
                    int64_t width, int dtype) {
  return by_dtype(dtype, [&](auto element, auto accumulator) __attribute__((always_inline)) {
    using T = decltype(element);
    using A = decltype(accumulator);
    A* sums = (A*)partial + stage * width;
    std::fill(sums, sums + width, A(0));
    for (int64_t r = first; r < last; ++r)
      backward_row((const T*)grad + r * width, (const T*)x + r * width, (const T*)weight,
                   ((const A*)rstd)[r], (T*)grad_x + r * width, sums, width);
  });
}

extern "C" int megaarch_rms_norm_forward(const void* x, const void* weight, void* out, void* rstd,
                                         int64_t rows, int64_t width, double epsilon, int dtype,
                                         void*) {
  return in_threads(rows, width, [&](int64_t first, int64_t last) {
    return forward(x, weight, out, rstd, first, last, width, epsilon, dtype);
  });
}

extern "C" int megaarch_rms_norm_backward(const void* grad, const void* x, const void* weight,
                                          const void* rstd, void* grad_x, void* grad_weight,
                                          void* partial, int64_t partials, int64_t rows,
                                          int64_t width, int dtype, void*) {
  int status = 0;
#pragma omp parallel for schedule(static) if (rows * width > 1 << 14)
  for (int64_t i = 0; i < partials; ++i) {
    int64_t first = rows * i / partials, last = rows * (i + 1) / partials;
    if (int code = backward(grad, x, weight, rstd, grad_x, partial, i, first, last, width, dtype)) {
#pragma omp atomic write
      status = code;
    }
  }
  if (status) return status;
  return by_dtype(dtype, [&](auto element, auto accumulator) {
    using T = decltype(element);
    using A = decltype(accumulator);
    for (int64_t i = 0; i < width; ++i) {
      A sum = 0;
      for (int64_t p = 0; p < partials; ++p) sum += ((const A*)partial)[p * width + i];
      store((T*)grad_weight + i, sum);
    }
  });
}
