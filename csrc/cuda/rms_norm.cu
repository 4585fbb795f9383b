// RMSNorm: a block a row, which it reads once into registers; rows in a grid-stride loop.
#include "common.cuh"

constexpr int THREADS = 512;  // of a block, at most
constexpr int64_t FORWARD_BLOCKS = 1 << 16;

extern "C" const char* megaarch_error(int code) {
  if (code == UNSUPPORTED_DTYPE) return "no kernel for this dtype";
  if (code == UNSUPPORTED_SIZE) return "no kernel for this size";
  return cudaGetErrorString(cudaError_t(code));
}

template <typename T, int LANES, int ITEMS>
__global__ void __launch_bounds__(THREADS)
    forward(const T* __restrict__ x, const T* __restrict__ weight, T* __restrict__ out,
            float* __restrict__ rstd, int64_t rows, int width, float epsilon) {
  using Row = Pack<T, LANES>;
  const int count = width / LANES;
  for (int64_t row = blockIdx.x; row < rows; row += gridDim.x) {
    const Row* from = reinterpret_cast<const Row*>(x + row * width);
    Row* to = reinterpret_cast<Row*>(out + row * width);
    Row held[ITEMS];
    float sum = 0;
#pragma unroll
    for (int i = 0; i < ITEMS; ++i) {
      const int at = threadIdx.x + i * blockDim.x;
      if (at >= count) break;
      held[i] = from[at];
#pragma unroll
      for (int lane = 0; lane < LANES; ++lane) {
        const float value = to_float(held[i].at[lane]);
        sum += value * value;
      }
    }
    const float scale = rsqrtf(block_sum(sum) / width + epsilon);
    if (threadIdx.x == 0) rstd[row] = scale;
#pragma unroll
    for (int i = 0; i < ITEMS; ++i) {
      const int at = threadIdx.x + i * blockDim.x;
      if (at >= count) break;
      const Row by = reinterpret_cast<const Row*>(weight)[at];
#pragma unroll
      for (int lane = 0; lane < LANES; ++lane)
        held[i].at[lane] =
            from_float<T>(to_float(held[i].at[lane]) * scale * to_float(by.at[lane]));
      to[at] = held[i];
    }
  }
}

// A thread meets the same columns in every row of its block, so the weight's gradient adds up in
// registers; partial [gridDim.x, width] takes it, and `sum_partials` adds those in order.
template <typename T, int LANES, int ITEMS>
__global__ void __launch_bounds__(THREADS)
    backward(const T* __restrict__ grad, const T* __restrict__ x, const T* __restrict__ weight,
             const float* __restrict__ rstd, T* __restrict__ grad_x, float* __restrict__ partial,
             int64_t rows, int width) {
  using Row = Pack<T, LANES>;
  const int count = width / LANES;
  float of_weight[ITEMS][LANES] = {};
  for (int64_t row = blockIdx.x; row < rows; row += gridDim.x) {
    const Row* grads = reinterpret_cast<const Row*>(grad + row * width);
    const Row* from = reinterpret_cast<const Row*>(x + row * width);
    Row* to = reinterpret_cast<Row*>(grad_x + row * width);
    Row held[ITEMS], wanted[ITEMS];  // x, and the gradient times the weight
    const float scale = rstd[row];
    float dot = 0;
#pragma unroll
    for (int i = 0; i < ITEMS; ++i) {
      const int at = threadIdx.x + i * blockDim.x;
      if (at >= count) break;
      held[i] = from[at];
      wanted[i] = grads[at];
      const Row by = reinterpret_cast<const Row*>(weight)[at];
#pragma unroll
      for (int lane = 0; lane < LANES; ++lane) {
        const float product =
            to_float(wanted[i].at[lane]) * (to_float(held[i].at[lane]) * scale);
        of_weight[i][lane] += product;
        dot += product * to_float(by.at[lane]);
      }
    }
    const float mean = block_sum(dot) / width;
#pragma unroll
    for (int i = 0; i < ITEMS; ++i) {
      const int at = threadIdx.x + i * blockDim.x;
      if (at >= count) break;
      const Row by = reinterpret_cast<const Row*>(weight)[at];
#pragma unroll
      for (int lane = 0; lane < LANES; ++lane)
        held[i].at[lane] = from_float<T>(
            scale * (to_float(by.at[lane]) * to_float(wanted[i].at[lane]) -
                     to_float(held[i].at[lane]) * scale * mean));
      to[at] = held[i];
    }
  }
#pragma unroll
  for (int i = 0; i < ITEMS; ++i) {
    const int at = threadIdx.x + i * blockDim.x;
    if (at >= count) break;
#pragma unroll
    for (int lane = 0; lane < LANES; ++lane)
      partial[int64_t(blockIdx.x) * width + at * LANES + lane] = of_weight[i][lane];
  }
}

// Blocks of 32 columns and 8 strides of rows.
template <typename T>
__global__ void sum_partials(const float* __restrict__ partial, T* __restrict__ grad_weight,
                             int64_t partials, int width) {
  __shared__ float sums[8][WARP];
  const int column = blockIdx.x * WARP + threadIdx.x;
  float sum = 0;
  if (column < width)
    for (int64_t row = threadIdx.y; row < partials; row += 8) sum += partial[row * width + column];
  sums[threadIdx.y][threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.y || column >= width) return;
#pragma unroll
  for (int i = 1; i < 8; ++i) sum += sums[i][threadIdx.x];
  grad_weight[column] = from_float<T>(sum);
}

// run(lanes, items, threads), the first two as types, for rows of this width.
template <typename T, typename Run>
static int by_width(int64_t width, bool packed, Run run) {
  const auto with_lanes = [&](auto lanes) {
    constexpr int MOST_ITEMS = lanes() < 8 ? 8 : 4;  // backward keeps 32 sums in registers
    const int64_t count = width / lanes();
    const auto with_items = [&](auto items) {
      return run(lanes, items, whole_warps((count + items() - 1) / items()));
    };
    if (count <= THREADS) return with_items(std::integral_constant<int, 1>{});
    if (count <= 2 * THREADS) return with_items(std::integral_constant<int, 2>{});
    if (count <= MOST_ITEMS * THREADS)
      return with_items(std::integral_constant<int, MOST_ITEMS>{});
    return int(UNSUPPORTED_SIZE);
  };
  constexpr int LANES = PACK_BYTES / sizeof(T);
  if (packed) return with_lanes(std::integral_constant<int, LANES>{});
  return with_lanes(std::integral_constant<int, 1>{});
}

extern "C" int megaarch_rms_norm_forward(const void* x, const void* weight, void* out, void* rstd,
                                         int64_t rows, int64_t width, double epsilon, int dtype,
                                         void* stream) {
  if (rows == 0) return 0;
  return by_dtype(dtype, [&](auto element) {
    using T = decltype(element);
    const bool packed = packs(x, weight, out, width * sizeof(T));
    return by_width<T>(width, packed, [&](auto lanes, auto items, int threads) {
      const int blocks = int(rows < FORWARD_BLOCKS ? rows : FORWARD_BLOCKS);
      forward<T, lanes(), items()><<<blocks, threads, 0, cudaStream_t(stream)>>>(
          (const T*)x, (const T*)weight, (T*)out, (float*)rstd, rows, int(width), float(epsilon));
      return launched();
    });
  });
}

extern "C" int megaarch_rms_norm_backward(const void* grad, const void* x, const void* weight,
                                          const void* rstd, void* grad_x, void* grad_weight,
                                          void* partial, int64_t partials, int64_t rows,
                                          int64_t width, int dtype, void* stream) {
  return by_dtype(dtype, [&](auto element) {
    using T = decltype(element);
    const auto on = cudaStream_t(stream);
    const bool packed = packs(grad, x, weight, grad_x, width * sizeof(T));
    if (rows) {
      const int failed = by_width<T>(width, packed, [&](auto lanes, auto items, int threads) {
        backward<T, lanes(), items()><<<int(partials), threads, 0, on>>>(
            (const T*)grad, (const T*)x, (const T*)weight, (const float*)rstd, (T*)grad_x,
            (float*)partial, rows, int(width));
        return launched();
      });
      if (failed) return failed;
    }
    sum_partials<<<int((width + WARP - 1) / WARP), dim3(WARP, 8), 0, on>>>(
        (const float*)partial, (T*)grad_weight, rows ? partials : 0, int(width));
    return launched();
  });
}
