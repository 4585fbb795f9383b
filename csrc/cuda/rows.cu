// Rows into the calls of a kernel and their gradients back: a warp a row, 128 bits a thread.
#include "common.cuh"

constexpr int THREADS = 256;
constexpr int64_t MOST_BLOCKS = 1 << 16;

static int blocks_for(int64_t rows) {
  const int64_t blocks = (rows + THREADS / WARP - 1) / (THREADS / WARP);
  return int(blocks < MOST_BLOCKS ? blocks : MOST_BLOCKS);
}

// Strides and head_units in units of U; a row of one head is contiguous.
template <typename U>
__global__ void __launch_bounds__(THREADS)
    take(const U* __restrict__ x, U* __restrict__ out, const int64_t* __restrict__ first,
         const int32_t* __restrict__ starts, int64_t segments, int64_t total, int heads,
         int head_units, int64_t row_stride, int64_t head_stride) {
  const int lane = threadIdx.x % WARP, warps = THREADS / WARP, units = heads * head_units;
  for (int64_t t = int64_t(blockIdx.x) * warps + threadIdx.x / WARP; t < total;
       t += int64_t(gridDim.x) * warps) {
    const int64_t n = segment_of(starts, segments, t);
    const U* from = x + (first[n] + t - starts[n]) * row_stride;
    U* to = out + t * units;
    if (heads == 1) {
      for (int i = lane; i < units; i += WARP) to[i] = from[i];
    } else {
      for (int i = lane; i < units; i += WARP)
        to[i] = from[i / head_units * head_stride + i % head_units];
    }
  }
}

template <typename T, int LANES>
__global__ void __launch_bounds__(THREADS)
    add(const T* __restrict__ a, int64_t a_rows, const T* __restrict__ b, T* __restrict__ out,
        const int64_t* __restrict__ bounds, const int32_t* __restrict__ readers,
        const int64_t* __restrict__ origin, int64_t pieces, int64_t rows, int64_t width) {
  using Row = Pack<T, LANES>;
  const int lane = threadIdx.x % WARP, warps = THREADS / WARP;
  const int64_t count = width / LANES;
  for (int64_t r = int64_t(blockIdx.x) * warps + threadIdx.x / WARP; r < rows;
       r += int64_t(gridDim.x) * warps) {
    const int64_t p = segment_of(bounds, pieces, r), inside = r - bounds[p];
    const int from = readers[p], to = readers[p + 1];
    for (int64_t i = lane; i < count; i += WARP) {
      float sum[LANES] = {};
      for (int j = from; j < to; ++j) {
        const int64_t row = origin[j] + inside;
        const T* source = row < a_rows ? a + row * width : b + (row - a_rows) * width;
        const Row value = reinterpret_cast<const Row*>(source)[i];
#pragma unroll
        for (int k = 0; k < LANES; ++k) sum[k] += to_float(value.at[k]);
      }
      Row result;
#pragma unroll
      for (int k = 0; k < LANES; ++k) result.at[k] = from_float<T>(sum[k]);
      reinterpret_cast<Row*>(out + r * width)[i] = result;
    }
  }
}

extern "C" int megaarch_rows_take(const void* x, void* out, const int64_t* first,
                                  const int32_t* starts, int64_t segments, int64_t total,
                                  int64_t heads, int64_t head_bytes, int64_t row_stride,
                                  int64_t head_stride, void* stream) {
  if (total == 0) return 0;
  if (head_stride == head_bytes) {
    head_bytes *= heads;
    heads = 1;
  }
  const auto run = [&](auto unit) {
    using U = decltype(unit);
    const int64_t size = sizeof(U);
    take<U><<<blocks_for(total), THREADS, 0, cudaStream_t(stream)>>>(
        (const U*)x, (U*)out, first, starts, segments, total, int(heads), int(head_bytes / size),
        row_stride / size, head_stride / size);
    return launched();
  };
  const uintptr_t sizes = uintptr_t(x) | uintptr_t(out) | head_bytes | row_stride | head_stride;
  if (sizes % PACK_BYTES == 0) return run(uint4{});
  if (sizes % sizeof(uint32_t) == 0) return run(uint32_t{});
  if (sizes % sizeof(uint16_t) == 0) return run(uint16_t{});
  return UNSUPPORTED_DTYPE;
}

extern "C" int megaarch_rows_add(const void* a, int64_t a_rows, const void* b, void* out,
                                 const int64_t* bounds, const int32_t* readers,
                                 const int64_t* origin, int64_t pieces, int64_t rows,
                                 int64_t width, int dtype, void* stream) {
  if (rows == 0) return 0;
  return by_dtype(dtype, [&](auto element) {
    using T = decltype(element);
    const auto run = [&](auto lanes) {
      add<T, lanes()><<<blocks_for(rows), THREADS, 0, cudaStream_t(stream)>>>(
          (const T*)a, a_rows, (const T*)b, (T*)out, bounds, readers, origin, pieces, rows, width);
      return launched();
    };
    if (packs(a, b, out, width * sizeof(T)))
      return run(std::integral_constant<int, PACK_BYTES / int(sizeof(T))>{});
    return run(std::integral_constant<int, 1>{});
  });
}
