// Cross-entropy of a chunk of logits: a block a row, one pass forward, one pass backward.
#include "common.cuh"

constexpr int THREADS = 512;
constexpr int64_t MOST_BLOCKS = 1 << 16;

// Maximum and sum of exponentials beneath it. NaN reaches the sum.
struct Online {
  float maximum = -INFINITY, sum = 0;

  __device__ void merge(float other, float its_sum) {
    const float larger = other > maximum ? other : maximum;
    if (maximum != larger) sum *= __expf(maximum - larger);
    if (other != larger) its_sum *= __expf(other - larger);
    sum += its_sum;
    maximum = larger;
  }
  __device__ void merge_warp() {
#pragma unroll
    for (int offset = WARP / 2; offset; offset /= 2)
      merge(__shfl_xor_sync(~0u, maximum, offset), __shfl_xor_sync(~0u, sum, offset));
  }
  // Over the block; the log of the whole sum, in every thread.
  __device__ float log_of_block() {
    __shared__ float maxima[WARP], sums[WARP];
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    merge_warp();
    if (lane == 0) maxima[warp] = maximum, sums[warp] = sum;
    __syncthreads();
    const bool some = lane < blockDim.x / WARP;
    maximum = some ? maxima[lane] : -INFINITY;
    sum = some ? sums[lane] : 0.f;
    merge_warp();
    __syncthreads();
    return maximum + logf(sum);
  }
};

// Several logits at once: one rescaling of the sum for all of them.
template <int N>
__device__ void take_in(Online& online, const float (&x)[N]) {
  float larger = online.maximum;
#pragma unroll
  for (int k = 0; k < N; ++k) larger = x[k] > larger ? x[k] : larger;
  float sum = 0;
#pragma unroll
  for (int k = 0; k < N; ++k) sum += x[k] == -INFINITY ? 0.f : __expf(x[k] - larger);
  if (larger != online.maximum) online.sum *= __expf(online.maximum - larger);
  online.sum += sum;
  online.maximum = larger;
}

template <typename T, int LANES>
__global__ void __launch_bounds__(THREADS)
    forward(const T* __restrict__ logits, const float* __restrict__ bias,
            const int64_t* __restrict__ target, const uint8_t* __restrict__ text,
            float* __restrict__ figures, int64_t rows, int64_t columns, int64_t known) {
  for (int64_t row = blockIdx.x; row < rows; row += gridDim.x) {
    const T* from = logits + row * columns;
    Online all, of_text;
    for (int64_t i = int64_t(threadIdx.x) * LANES; i < known; i += THREADS * LANES) {
      const auto pack = *reinterpret_cast<const Pack<T, LANES>*>(from + i);
      float x[LANES], its_text[LANES];
#pragma unroll
      for (int k = 0; k < LANES; ++k) {
        x[k] = i + k < known ? to_float(pack.at[k]) + (bias ? bias[i + k] : 0.f) : -INFINITY;
        its_text[k] = text && text[i + k] ? x[k] : -INFINITY;
      }
      take_in(all, x);
      if (text) take_in(of_text, its_text);
    }
    const float partition = all.log_of_block();
    const float text_partition = text ? of_text.log_of_block() : 0.f;
    if (threadIdx.x == 0) {
      const int64_t at = target[row];
      const bool held = at >= 0 && at < known;
      figures[row] = partition;
      figures[rows + row] = held ? to_float(from[at]) + (bias ? bias[at] : 0.f) : -INFINITY;
      if (text) figures[2 * rows + row] = text_partition;
    }
  }
}

template <typename T, int LANES>
__global__ void __launch_bounds__(THREADS)
    backward(const T* __restrict__ logits, const float* __restrict__ bias,
             const int64_t* __restrict__ target, const float* __restrict__ partition,
             const float* __restrict__ grad_softmax, const float* __restrict__ grad_nll,
             T* __restrict__ grad, int64_t rows, int64_t columns, int64_t known) {
  for (int64_t row = blockIdx.x; row < rows; row += gridDim.x) {
    const float log_sum = partition[row], by = grad_softmax[row], less = grad_nll[row];
    const int64_t hit = target[row] < known ? target[row] : -1;
    for (int64_t i = int64_t(threadIdx.x) * LANES; i < columns; i += THREADS * LANES) {
      auto pack = *reinterpret_cast<const Pack<T, LANES>*>(logits + row * columns + i);
#pragma unroll
      for (int k = 0; k < LANES; ++k) {
        float result = 0;
        if (i + k < known)
          result = __expf(to_float(pack.at[k]) + (bias ? bias[i + k] : 0.f) - log_sum) * by;
        pack.at[k] = from_float<T>(i + k == hit ? result - less : result);
      }
      *reinterpret_cast<Pack<T, LANES>*>(grad + row * columns + i) = pack;
    }
  }
}

// run(lanes) with packs where addresses and columns allow them.
template <typename T, typename Run>
static int by_lanes(bool packed, Run run) {
  if (packed) return run(std::integral_constant<int, PACK_BYTES / int(sizeof(T))>{});
  return run(std::integral_constant<int, 1>{});
}

extern "C" int megaarch_cross_entropy_forward(const void* logits, const void* bias,
                                              const int64_t* target, const uint8_t* text,
                                              void* figures, int64_t rows, int64_t columns,
                                              int64_t known, int dtype, void* stream) {
  if (rows == 0) return 0;
  return by_dtype(dtype, [&](auto element) {
    using T = decltype(element);
    return by_lanes<T>(packs(logits, columns * sizeof(T)), [&](auto lanes) {
      const int blocks = int(rows < MOST_BLOCKS ? rows : MOST_BLOCKS);
      forward<T, lanes()><<<blocks, THREADS, 0, cudaStream_t(stream)>>>(
          (const T*)logits, (const float*)bias, target, text, (float*)figures, rows, columns,
          known);
      return launched();
    });
  });
}

extern "C" int megaarch_cross_entropy_backward(const void* logits, const void* bias,
                                               const int64_t* target, const void* partition,
                                               const void* grad_softmax, const void* grad_nll,
                                               void* grad, int64_t rows, int64_t columns,
                                               int64_t known, int dtype, void* stream) {
  if (rows == 0) return 0;
  return by_dtype(dtype, [&](auto element) {
    using T = decltype(element);
    return by_lanes<T>(packs(logits, grad, columns * sizeof(T)), [&](auto lanes) {
      const int blocks = int(rows < MOST_BLOCKS ? rows : MOST_BLOCKS);
      backward<T, lanes()><<<blocks, THREADS, 0, cudaStream_t(stream)>>>(
          (const T*)logits, (const float*)bias, target, (const float*)partition,
          (const float*)grad_softmax, (const float*)grad_nll, (T*)grad, rows, columns, known);
      return launched();
    });
  });
}
