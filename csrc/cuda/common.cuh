// Element types, 128-bit packs and reductions that the CUDA kernels share. Sums are fp32.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "../megaarch.h"

constexpr int WARP = 32;
constexpr int PACK_BYTES = 16;  // one load of a thread

template <typename T, int N>
struct alignas(sizeof(T) * N) Pack {
  T at[N];
};

__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ inline float to_float(__half x) { return __half2float(x); }
template <typename T>
__device__ T from_float(float x);
template <>
__device__ inline float from_float<float>(float x) { return x; }
template <>
__device__ inline __nv_bfloat16 from_float<__nv_bfloat16>(float x) { return __float2bfloat16_rn(x); }
template <>
__device__ inline __half from_float<__half>(float x) { return __float2half_rn(x); }

__device__ inline float warp_sum(float x) {
#pragma unroll
  for (int offset = WARP / 2; offset; offset /= 2) x += __shfl_xor_sync(~0u, x, offset);
  return x;
}

// The sum over a block of whole warps, in every thread; may be called again at once.
__device__ inline float block_sum(float x) {
  __shared__ float of_warp[WARP];
  const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
  x = warp_sum(x);
  if (lane == 0) of_warp[warp] = x;
  __syncthreads();
  x = warp_sum(lane < blockDim.x / WARP ? of_warp[lane] : 0.f);
  __syncthreads();
  return x;
}

// The last n with starts[n] <= at, of sorted starts[0..count).
template <typename Index>
__device__ inline int64_t segment_of(const Index* starts, int64_t count, int64_t at) {
  int64_t low = 0, high = count;
  while (high - low > 1) {
    const int64_t middle = (low + high) / 2;
    if (starts[middle] <= at) low = middle; else high = middle;
  }
  return low;
}

// Whether all these addresses and byte counts are multiples of a pack.
template <typename... Args>
bool packs(Args... args) {
  return (((uintptr_t)args % PACK_BYTES == 0) && ...);
}

inline int whole_warps(int64_t threads) { return int((threads + WARP - 1) / WARP * WARP); }

// run(element) with a value of the type of `dtype`; returns what it returns.
template <typename Run>
int by_dtype(int dtype, Run run) {
  switch (dtype) {
    case FLOAT32: return run(float{});
    case BFLOAT16: return run(__nv_bfloat16{});
    case FLOAT16: return run(__half{});
    default: return UNSUPPORTED_DTYPE;
  }
}

inline int launched() { return int(cudaGetLastError()); }
