#include "common.h"

extern "C" int megaarch_rows_take(const void* x, void* out, const int64_t* first,
                                  const int32_t* starts, int64_t segments, int64_t,
                                  int64_t heads, int64_t head_bytes, int64_t row_stride,
                                  int64_t head_stride, void*) {
  char* to = (char*)out;
  for (int64_t n = 0; n < segments; ++n)
    for (int64_t t = starts[n]; t < starts[n + 1]; ++t) {
      const char* row = (const char*)x + (first[n] + t - starts[n]) * row_stride;
      for (int64_t h = 0; h < heads; ++h, to += head_bytes)
        std::memcpy(to, row + h * head_stride, head_bytes);
    }
  return 0;
}

template <typename T, typename A>
static void add(const T* a, int64_t a_rows, const T* b, T* out, const int64_t* bounds,
                const int32_t* readers, const int64_t* origin, int64_t pieces, int64_t width) {
  for (int64_t p = 0; p < pieces; ++p)
    for (int64_t r = bounds[p]; r < bounds[p + 1]; ++r, out += width)
      for (int64_t i = 0; i < width; ++i) {
        A sum = 0;
        for (int32_t j = readers[p]; j < readers[p + 1]; ++j) {
          int64_t row = origin[j] + r - bounds[p];
          sum += load(row < a_rows ? a + row * width + i : b + (row - a_rows) * width + i);
        }
        store(out + i, sum);
      }
}

extern "C" int megaarch_rows_add(const void* a, int64_t a_rows, const void* b, void* out,
                                 const int64_t* bounds, const int32_t* readers,
                                 const int64_t* origin, int64_t pieces, int64_t, int64_t width,
                                 int dtype, void*) {
  return by_dtype(dtype, [&](auto element, auto accumulator) {
    using T = decltype(element);
    using A = decltype(accumulator);
    add<T, A>((const T*)a, a_rows, (const T*)b, (T*)out, bounds, readers, origin, pieces, width);
  });
}
