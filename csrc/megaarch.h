// The fused kernels' signatures: the same functions for the CPU (csrc/cpu) and for CUDA (csrc/cuda),
// in a library each, loaded with ctypes (megaarch/kernels). Plain C, no torch header: a library
// serves every version of torch, and builds without one.
//
// Tensors are contiguous unless strides are given. Statistics, figures and sums are `accumulator`s:
// float, or double where the tensors are double. stream: CUDA's; ignored on the CPU. Nothing waits.
// Every function returns 0, a positive CUDA error, or a Status below.

#pragma once
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

enum Dtype { FLOAT32 = 0, BFLOAT16 = 1, FLOAT16 = 2, FLOAT64 = 3 };
enum Status { UNSUPPORTED_DTYPE = -1, UNSUPPORTED_SIZE = -2, OUT_OF_RANGE = -3 };

// What a code means, for people; static storage.
const char* megaarch_error(int code);

// out = x * rstd * weight, rstd = 1 / sqrt(mean(x^2) + epsilon). x, out [rows, width],
// weight [width], rstd accumulator [rows]. Zhang and Sennrich 2019, equation 4.
int megaarch_rms_norm_forward(const void* x, const void* weight, void* out, void* rstd,
                              int64_t rows, int64_t width, double epsilon, int dtype, void* stream);

// grad_x = rstd * (weight * grad - xhat * mean(weight * grad * xhat)), xhat = x * rstd;
// grad_weight = the sum over rows of grad * xhat, in two stages and a fixed order: partial,
// accumulator [partials, width], is scratch.
int megaarch_rms_norm_backward(const void* grad, const void* x, const void* weight,
                               const void* rstd, void* grad_x, void* grad_weight, void* partial,
                               int64_t partials, int64_t rows, int64_t width, int dtype,
                               void* stream);

// Rows of segments, one behind the other: out[t] = x[first[n] + t - starts[n]] where
// starts[n] <= t < starts[n + 1]. x is [?, heads, head_bytes] with these strides in bytes; out is
// [total, heads, head_bytes].
int megaarch_rows_take(const void* x, void* out, const int64_t* first, const int32_t* starts,
                       int64_t segments, int64_t total, int64_t heads, int64_t head_bytes,
                       int64_t row_stride, int64_t head_stride, void* stream);

// The transpose of takes: out[r] = the sum, in order, of source[origin[j] + r - bounds[p]] over
// readers[p] <= j < readers[p + 1], where bounds[p] <= r < bounds[p + 1]. source is a [a_rows, width]
// followed by b; out is [bounds[pieces], width], written whole.
int megaarch_rows_add(const void* a, int64_t a_rows, const void* b, void* out,
                      const int64_t* bounds, const int32_t* readers, const int64_t* origin,
                      int64_t pieces, int64_t rows, int64_t width, int dtype, void* stream);

// Of logits [rows, columns], bias [columns] (accumulator, or null) added, columns from `known` on
// left out: figures[0] the log of the sum of exponentials (online: Milakov and Gimelshein 2018),
// figures[1] the target's logit (-infinity where target is outside of 0..columns), and where `text`
// (bytes [columns]) is given figures[2], the first over its columns alone. figures: accumulator
// [2 or 3, rows].
int megaarch_cross_entropy_forward(const void* logits, const void* bias, const int64_t* target,
                                   const uint8_t* text, void* figures, int64_t rows,
                                   int64_t columns, int64_t known, int dtype, void* stream);

// grad = exp(logit - partition) * grad_softmax, less grad_nll at the target; 0 from `known` on.
// partition, grad_softmax, grad_nll: accumulator [rows].
int megaarch_cross_entropy_backward(const void* logits, const void* bias, const int64_t* target,
                                    const void* partition, const void* grad_softmax,
                                    const void* grad_nll, void* grad, int64_t rows,
                                    int64_t columns, int64_t known, int dtype, void* stream);

#ifdef __cplusplus
}
#endif
