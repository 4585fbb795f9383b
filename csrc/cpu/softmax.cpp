#include "common.h"

template <typename A>
static INLINE void less_target(A* row, int64_t target, A& partition, A& target_logit,
                               int64_t columns) {
  A maximum = row[0], sum = 0;
#pragma omp simd reduction(max : maximum)
  for (int64_t i = 0; i < columns; ++i) maximum = row[i] > maximum ? row[i] : maximum;
  target_logit = row[target];
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < columns; ++i) {
    row[i] = exponential(row[i] - maximum);
    sum += row[i];
  }
  partition = maximum + std::log(sum);
  A scale = 1 / sum;
#pragma omp simd
  for (int64_t i = 0; i < columns; ++i) row[i] *= scale;
  row[target] -= 1;
}

FOR_EACH_PROCESSOR
static int rows_of(void* logits, const int64_t* target, void* partition, void* target_logit,
                   int64_t first, int64_t last, int64_t columns, int dtype) {
  auto run = [&](auto of) __attribute__((always_inline)) {
    using A = decltype(of);
    for (int64_t r = first; r < last; ++r) {
      if (target[r] < 0 || target[r] >= columns) return int(OUT_OF_RANGE);
      less_target((A*)logits + r * columns, target[r], ((A*)partition)[r], ((A*)target_logit)[r],
                  columns);
    }
    return 0;
  };
  return dtype == FLOAT32 ? run(float{}) : dtype == FLOAT64 ? run(double{}) : int(UNSUPPORTED_DTYPE);
}

extern "C" int megaarch_softmax_less_target(void* logits, const int64_t* target, void* partition,
                                            void* target_logit, int64_t rows, int64_t columns,
                                            int dtype, void*) {
  return in_threads(rows, columns, [&](int64_t first, int64_t last) {
    return rows_of(logits, target, partition, target_logit, first, last, columns, dtype);
  });
}
