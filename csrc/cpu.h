// The kernels that only the CPU has: torch passes memory once an operation there, and each of these
// makes one pass of several. On CUDA torch.compile fuses the same. As csrc/megaarch.h otherwise.

#pragma once
#include "megaarch.h"

#ifdef __cplusplus
extern "C" {
#endif

enum Gate { SILU = 0, GELU_TANH = 1 };

// Rows of a fused projection [rows, groups, group + 2, size], a key group's queries, key and value
// one behind the other, into q [rows, groups * group, size], k and v [rows, groups, size]. Queries
// and key are turned (RoPE: Su et al. 2021, section 3.2.2) by cos and signed sin, accumulator
// [rows, size]: channel i of each of `axes` shares of a head pairs with channel i + share / 2.
int megaarch_heads_forward(const void* qkv, const void* cos, const void* sin, void* q, void* k,
                           void* v, int64_t rows, int64_t groups, int64_t group, int64_t size,
                           int64_t axes, int dtype, void* stream);

// Its gradient. q, k, v here: gradients [batch, rows / batch, heads, size], last axis contiguous,
// their other strides in elements: three of q, three of k, three of v.
int megaarch_heads_backward(const void* q, const void* k, const void* v, const int64_t* strides,
                            const void* cos, const void* sin, void* grad_qkv, int64_t batch,
                            int64_t rows, int64_t groups, int64_t group, int64_t size, int64_t axes,
                            int dtype, void* stream);

// out[i] = gate(x[2 i]) * x[2 i + 1] (Shazeer 2020), and its gradient [2 * count].
int megaarch_gated_forward(const void* x, void* out, int64_t count, int gate, int dtype,
                           void* stream);
int megaarch_gated_backward(const void* grad, const void* x, void* grad_x, int64_t count, int gate,
                            int dtype, void* stream);

// In place: each row of logits [rows, columns] becomes its softmax, less 1 at its target: the
// gradient of -log softmax[target]. partition: the log of the sum of exponentials; target_logit:
// what stood at the target, accumulators both. OUT_OF_RANGE for a target outside of 0..columns.
int megaarch_softmax_less_target(void* logits, const int64_t* target, void* partition,
                                 void* target_logit, int64_t rows, int64_t columns, int dtype,
                                 void* stream);

// Attention where parts, int32 [batch, parts_per_row, 5] (megaarch/attention/mask.py), let a query
// see a key: softmax(scale * q k' + bias) v, blocks of keys at a time (Milakov and Gimelshein 2018; Dao
// 2023, algorithm 1). float, or bfloat16 with sums in float: where the processor multiplies bfloat16,
// weights and their gradients are rounded to it too. q [batch, queries, heads, size], k and v [batch,
// keys, key_heads, size], last axis contiguous, their other strides in elements: three of q, three of k,
// three of v. out as q, contiguous; lse [batch, heads, queries]: the log of a row's sum of exponentials.
// Rows that see no key are zero, and what rows in no part hold reaches nothing. size: a multiple of 8 up
// to 256.
// bias, or null: [heads, 2 (reach + BIAS_PADDING) + 1] by the query's position less the key's, from
// -reach - BIAS_PADDING up, the same beyond reach as there; positions [batch, queries] and [batch, keys].
enum { BIAS_PADDING = 32 };
int megaarch_attention_forward(const void* q, const void* k, const void* v, void* out, float* lse,
                               const int32_t* parts, const int64_t* strides, int64_t batch,
                               int64_t parts_per_row, int64_t queries, int64_t keys, int64_t heads,
                               int64_t key_heads, int64_t size, double scale, const float* bias,
                               const int64_t* query_positions, const int64_t* key_positions,
                               int64_t reach, int dtype, void* stream);

// Its gradients, contiguous, by the same probabilities computed again (Dao 2023, algorithm 2). grad as
// q, with strides ahead of the others. grad_bias: [batch, heads, ...] as bias, added to.
int megaarch_attention_backward(const void* grad, const void* q, const void* k, const void* v,
                                const void* out, const float* lse, void* grad_q, void* grad_k,
                                void* grad_v, const int32_t* parts, const int64_t* strides,
                                int64_t batch, int64_t parts_per_row, int64_t queries, int64_t keys,
                                int64_t heads, int64_t key_heads, int64_t size, double scale,
                                const float* bias, float* grad_bias, const int64_t* query_positions,
                                const int64_t* key_positions, int64_t reach, int dtype,
                                void* stream);

// Layers of a decoder on a few new tokens over their cache, a step of generation in one call: without
// gradients, all in float (megaarch/model/layers.py is what they compute, megaarch/kernels/decode.py has
// the same structures).

typedef struct {
  const float *weight, *bias;  // of a product [outputs, inputs] and [outputs], of a norm [width]; or null
} DecodeParameters;

typedef struct {
  DecodeParameters attention_norm, qkv, output;
  DecodeParameters cross_norm, cross_query, cross_output;  // null without cross-attention
  DecodeParameters feed_forward_norm, up, down;            // up: gate and up, where it is gated
  float *keys, *values;                                    // [rows, slots, key_heads, size]
  const float *memory_keys, *memory_values;  // [rows, ?, key_heads, size] with memory's strides
} DecodeLayer;

enum Activation { RELU = 2, GELU = 3, UNGATED_GELU_TANH = 4 };  // beside Gate, whose are gated

typedef struct {
  int64_t tokens, width, heads, key_heads, size, feed_forward, axes, slots;
  int64_t pre_norm, layer_norm, activation, reach;  // reach: as attention's
  int64_t memory_row, memory_key, memory_head;      // strides of memory, in elements
  double epsilon, scale;
  // Of each token: its row, the slot that its key takes (-1: none), the slots that it sees, from first up
  // to end, and how many of memory it sees.
  const int64_t *row, *slot, *first, *end, *memory_end;
  const float *cos, *sin;  // [tokens, size], as heads_forward's; or null
  const float* bias;       // as attention's; or null
  const int64_t *positions, *key_positions;  // [tokens, axes], [rows, slots, axes]; with a bias, axis 0
} DecodeStep;

// x [tokens, width], in place: from the input of the first layer to the output of the last.
int megaarch_decode_layers(const DecodeLayer* layers, int64_t count, const DecodeStep* step, float* x,
                           void* stream);

// out [rows, outputs] = x [rows, inputs] times the weight [outputs, inputs], transposed, plus bias
// [outputs] or null: for a few rows, where a product costs what it takes to read the weight.
int megaarch_few_rows(const float* x, const float* weight, const float* bias, float* out, int64_t rows,
                      int64_t outputs, int64_t inputs, void* stream);

#ifdef __cplusplus
}
#endif
