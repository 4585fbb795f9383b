#include <cmath>
#include <limits>

#include "common.h"

// Maximum and sum of exponentials beneath it, merged one figure at a time. NaN reaches the sum.
template <typename A>
struct Online {
  A maximum = -std::numeric_limits<A>::infinity(), sum = 0;
  void add(A x) {
    if (x == -std::numeric_limits<A>::infinity()) return;
    if (x > maximum) {
      sum = sum * std::exp(maximum - x) + 1;
      maximum = x;
    } else {
      sum += std::exp(x - maximum);
    }
  }
  A log() const { return maximum + std::log(sum); }
};

template <typename T, typename A>
static void forward(const T* logits, const A* bias, const int64_t* target, const uint8_t* text,
                    A* figures, int64_t rows, int64_t columns, int64_t known) {
  for (int64_t r = 0; r < rows; ++r, logits += columns) {
    auto logit = [&](int64_t i) { return load(logits + i) + (bias ? bias[i] : 0); };
    Online<A> all, of_text;
    for (int64_t i = 0; i < known; ++i) {
      all.add(logit(i));
      if (text && text[i]) of_text.add(logit(i));
    }
    bool held = target[r] >= 0 && target[r] < known;
    figures[r] = all.log();
    figures[rows + r] = held ? logit(target[r]) : -std::numeric_limits<A>::infinity();
    if (text) figures[2 * rows + r] = of_text.log();
  }
}

template <typename T, typename A>
static void backward(const T* logits, const A* bias, const int64_t* target, const A* partition,
                     const A* grad_softmax, const A* grad_nll, T* grad, int64_t rows,
                     int64_t columns, int64_t known) {
  for (int64_t r = 0; r < rows; ++r, logits += columns, grad += columns)
    for (int64_t i = 0; i < columns; ++i) {
      A of_softmax = 0;
      if (i < known)
        of_softmax =
            std::exp(load(logits + i) + (bias ? bias[i] : 0) - partition[r]) * grad_softmax[r];
      store(grad + i, i == target[r] && i < known ? of_softmax - grad_nll[r] : of_softmax);
    }
}

extern "C" int megaarch_cross_entropy_forward(const void* logits, const void* bias,
                                              const int64_t* target, const uint8_t* text,
                                              void* figures, int64_t rows, int64_t columns,
                                              int64_t known, int dtype, void*) {
  return by_dtype(dtype, [&](auto element, auto accumulator) {
    using T = decltype(element);
    using A = decltype(accumulator);
    forward((const T*)logits, (const A*)bias, target, text, (A*)figures, rows, columns, known);
  });
}

extern "C" int megaarch_cross_entropy_backward(const void* logits, const void* bias,
                                               const int64_t* target, const void* partition,
                                               const void* grad_softmax, const void* grad_nll,
                                               void* grad, int64_t rows, int64_t columns,
                                               int64_t known, int dtype, void*) {
  return by_dtype(dtype, [&](auto element, auto accumulator) {
    using T = decltype(element);
    using A = decltype(accumulator);
    backward((const T*)logits, (const A*)bias, target, (const A*)partition, (const A*)grad_softmax,
             (const A*)grad_nll, (T*)grad, rows, columns, known);
  });
}
