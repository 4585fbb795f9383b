#include <memory>

#include "common.h"

// `wide`: room for a row in its accumulator; may be the row itself.
template <typename T, typename A>
static INLINE void less_target(T* row, A* wide, int64_t target, A& partition, A& target_logit,
                               int64_t columns) {
  A maximum = load(row), sum = 0;
#pragma omp simd reduction(max : maximum)
  for (int64_t i = 0; i < columns; ++i) maximum = load(row + i) > maximum ? load(row + i) : maximum;
  target_logit = load(row + target);
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < columns; ++i) {
    wide[i] = exponential(load(row + i) - maximum);
    sum += wide[i];
  }
  partition = maximum + std::log(sum);
  A scale = 1 / sum, of_target = wide[target] * scale - 1;
#pragma omp simd
  for (int64_t i = 0; i < columns; ++i) store(row + i, wide[i] * scale);
  store(row + target, of_target);
}

FOR_EACH_PROCESSOR
static int rows_of(void* logits, const int64_t* target, void* partition, void* target_logit,
                   int64_t first, int64_t last, int64_t columns, int dtype) {
  int status = 0;
  int unsupported = by_dtype(dtype, [&](auto of, auto wide) __attribute__((always_inline)) {
    using T = decltype(of);
    using A = decltype(wide);
    constexpr bool same = sizeof(T) == sizeof(A);
    std::unique_ptr<A[]> room(same ? nullptr : new A[columns]);
    for (int64_t r = first; r < last; ++r) {
      T* row = (T*)logits + r * columns;
      if (target[r] < 0 || target[r] >= columns) status = OUT_OF_RANGE;
      else less_target(row, same ? (A*)row : room.get(), target[r], ((A*)partition)[r],
                       ((A*)target_logit)[r], columns);
    }
  });
  return unsupported ? unsupported : status;
}

extern "C" int megaarch_softmax_less_target(void* logits, const int64_t* target, void* partition,
                                            void* target_logit, int64_t rows, int64_t columns,
                                            int dtype, void*) {
  return in_threads(rows, columns, [&](int64_t first, int64_t last) {
    return rows_of(logits, target, partition, target_logit, first, last, columns, dtype);
  });
}
