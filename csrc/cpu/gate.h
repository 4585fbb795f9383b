// The gates of gated activations.
#pragma once
#include "common.h"

// A gate's value and slope at x: silu(x) = x s(x), gelu(x) = x (1 + tanh(z(x))) / 2 = x s(2 z(x)),
// with the logistic s and z(x) = sqrt(2 / pi) (x + 0.044715 x^3) (Hendrycks and Gimpel 2016).
template <int gate, typename A>
static INLINE void apply(A x, A& value, A& slope) {
  A inner = x, of_inner = 1;
  if (gate == GELU_TANH) {
    const A scale = A(1.5957691216057308), cubic = A(0.044715);
    inner = scale * x * (1 + cubic * x * x), of_inner = scale * (1 + 3 * cubic * x * x);
  }
  A s = 1 / (1 + exponential(-inner));
  value = x * s;
  slope = s + x * s * (1 - s) * of_inner;
}
template <int kind>
static INLINE float gate(float x) {
  float value, slope;
  apply<kind>(x, value, slope);
  return value;
}
