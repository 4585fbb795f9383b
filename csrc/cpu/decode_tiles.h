// A layer's step of generation in vectors of LANES floats. decode.cpp includes it once an instruction
// set, inside of a namespace. All threads run it, each its share of every loop between two barriers.

#include "attention_words.h"

constexpr int64_t BLOCK = 12;  // rows of a weight that meet all rows of x while a near cache holds them

static INLINE float total(Vector x) {
  typedef float Quad __attribute__((vector_size(16), aligned(4), may_alias));
  Quad sum = *(const Quad*)&x;
  for (int l = 4; l < LANES; l += 4) sum += *(const Quad*)((const float*)&x + l);
  sum += __builtin_shuffle(sum, (Integers4){2, 3, 0, 1});
  return sum[0] + sum[1];
}

// A tile of rows of x and of w: out[m, n] = x[m, :] · w[n, :], or that more.
template <int M, int N>
static void tile(const float* x, int64_t x_pitch, const float* w, int64_t w_pitch, int64_t depth,
                 float* out, int64_t pitch, bool add) {
  Vector sum[M][N] = {};
  int64_t k = 0;
  for (; k + LANES <= depth; k += LANES) {
#pragma GCC unroll 12
    for (int n = 0; n < N; ++n) {
      const Vector b = at(w + n * w_pitch + k);
#pragma GCC unroll 4
      for (int m = 0; m < M; ++m) sum[m][n] += at(x + m * x_pitch + k) * b;
    }
  }
#pragma GCC unroll 4
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 12
    for (int n = 0; n < N; ++n) {
      float c = total(sum[m][n]);
      for (int64_t d = k; d < depth; ++d) c += x[m * x_pitch + d] * w[n * w_pitch + d];
      float& to = out[m * pitch + n];
      to = add ? to + c : c;
    }
}

template <int M>
static void tiles(const float* x, int64_t x_pitch, int64_t outputs, const float* w, int64_t w_pitch,
                  int64_t depth, float* out, int64_t pitch, bool add) {
  constexpr int N = BLOCK / M;
  int64_t n = 0;
  for (; n + N <= outputs; n += N)
    tile<M, N>(x, x_pitch, w + n * w_pitch, w_pitch, depth, out + n, pitch, add);
  for (; n < outputs; ++n)
    tile<M, 1>(x, x_pitch, w + n * w_pitch, w_pitch, depth, out + n, pitch, add);
}

// out [rows, outputs] = x times w transposed, or that more: as many rows at a time as sums fit in registers.
static void product(int64_t rows, const float* x, int64_t x_pitch, int64_t outputs, const float* w,
                    int64_t w_pitch, int64_t depth, float* out, int64_t pitch, bool add) {
  decltype(&tiles<1>) heights[] = {tiles<1>, tiles<2>, tiles<3>, tiles<4>};
  for (int64_t n = 0; n < outputs; n += BLOCK)
    for (int64_t m = 0, left = (rows + 3) / 4, height; left > 0; --left, m += height) {
      height = (rows - m) / left;
      heights[height - 1](x + m * x_pitch, x_pitch, std::min(BLOCK, outputs - n), w + n * w_pitch,
                          w_pitch, depth, out + m * pitch + n, pitch, add);
    }
}

// out [rows, outputs] = x [rows, inputs] times the weight, transposed, plus the bias; or that more.
static void few_rows(const Team& team, int64_t rows, const float* x, DecodeParameters of, float* out,
                     int64_t outputs, int64_t inputs, bool add) {
  const auto [first, last] = team.share(outputs, BLOCK);
  product(rows, x, inputs, last - first, of.weight + first * inputs, inputs, inputs, out + first,
          outputs, add);
  if (!of.bias) return;
  for (int64_t m = 0; m < rows; ++m)
    for (int64_t n = first; n < last; ++n) out[m * outputs + n] += of.bias[n];
}

static void normalize(const DecodeStep& s, DecodeParameters of, const float* x, float* out) {
  float mean = 0, squares = 0;
  if (s.layer_norm) {
#pragma omp simd reduction(+ : mean)
    for (int64_t i = 0; i < s.width; ++i) mean += x[i];
    mean /= s.width;
  }
#pragma omp simd reduction(+ : squares)
  for (int64_t i = 0; i < s.width; ++i) squares += (x[i] - mean) * (x[i] - mean);
  const float scale = 1 / std::sqrt(squares / s.width + float(s.epsilon));
  if (of.bias)
    for (int64_t i = 0; i < s.width; ++i)
      out[i] = (x[i] - mean) * scale * of.weight[i] + of.bias[i];
  else
    for (int64_t i = 0; i < s.width; ++i) out[i] = (x[i] - mean) * scale * of.weight[i];
}

// Scores become weights; returns their sum.
static float soften(float* scores, int64_t keys) {
  float highest = -INFINITY, sum = 0;
#pragma omp simd reduction(max : highest)
  for (int64_t j = 0; j < keys; ++j) highest = std::max(highest, scores[j]);
#pragma omp simd reduction(+ : sum)
  for (int64_t j = 0; j < keys; ++j) sum += scores[j] = exponential(scores[j] - highest);
  return sum;
}

// out[d] = the sum of weights[j] * values[j, d], over `sum`, for V vectors of them.
template <int V>
static INLINE void weigh(const float* weights, const float* values, int64_t pitch, int64_t keys,
                         float factor, float* out) {
  Vector sums[V] = {};
  for (int64_t j = 0; j < keys; ++j, values += pitch)
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) sums[v] += weights[j] * at(values + v * LANES);
  for (int v = 0; v < V; ++v) at(out + v * LANES) = sums[v] * factor;
}

// Keys and values of a row and key head, one behind the other at a pitch.
struct Seen {
  const float *keys, *values;
  int64_t pitch, count;
};

// The outputs [group, size] of the queries of a key head. bias(head, scores) adds to their scores.
template <typename Bias>
static void attend(const DecodeStep& s, const float* queries, const Seen& seen, float* scores,
                   float* out, Bias bias) {
  const int64_t group = s.heads / s.key_heads, size = s.size, keys = seen.count;
  if (keys <= 0) {
    std::fill_n(out, group * size, 0.f);
    return;
  }
  product(group, queries, size, keys, seen.keys, seen.pitch, size, scores, keys, false);
  for (int64_t g = 0; g < group; ++g) {
    float *weights = scores + g * keys, *to = out + g * size;
    for (int64_t j = 0; j < keys; ++j) weights[j] *= float(s.scale);
    bias(g, weights);
    const float share = 1 / soften(weights, keys);
    int64_t d = 0;
    for (; d + 8 * LANES <= size; d += 8 * LANES)
      weigh<8>(weights, seen.values + d, seen.pitch, keys, share, to + d);
    for (; d + LANES <= size; d += LANES)
      weigh<1>(weights, seen.values + d, seen.pitch, keys, share, to + d);
    for (; d < size; ++d) {
      to[d] = 0;
      for (int64_t j = 0; j < keys; ++j) to[d] += weights[j] * seen.values[j * seen.pitch + d];
      to[d] *= share;
    }
  }
}

// A token's queries, turned, into q [heads, size]; its keys, turned, and values into their slot.
static void split(const DecodeStep& s, const DecodeLayer& layer, const float* qkv, int64_t m,
                  float* q) {
  const int64_t group = s.heads / s.key_heads, size = s.size;
  auto turned = [&](const float* x, float* to) {
    if (s.cos) turn(x, s.cos + m * size, s.sin + m * size, to, size, s.axes, 1.f);
    else std::copy_n(x, size, to);
  };
  for (int64_t head = 0; head < s.key_heads; ++head, qkv += (group + 2) * size) {
    for (int64_t g = 0; g < group; ++g) turned(qkv + g * size, q + (head * group + g) * size);
    if (s.slot[m] < 0) continue;
    const int64_t place = ((s.row[m] * s.slots + s.slot[m]) * s.key_heads + head) * size;
    turned(qkv + group * size, layer.keys + place);
    std::copy_n(qkv + (group + 1) * size, size, layer.values + place);
  }
}

static void self_attention(const DecodeStep& s, const DecodeLayer& layer, int64_t m, int64_t head,
                           const float* q, float* scores, float* out) {
  const int64_t group = s.heads / s.key_heads, first = s.first[m], keys = s.end[m] - first;
  const int64_t pitch = s.key_heads * s.size;
  const int64_t place = (s.row[m] * s.slots + first) * pitch + head * s.size;
  attend(s, q, {layer.keys + place, layer.values + place, pitch, keys}, scores, out,
         [&](int64_t g, float* to) {
           if (!s.bias) return;
           const int64_t most = s.reach + BIAS_PADDING;
           const float* figures = s.bias + (head * group + g) * (2 * most + 1) + most;
           const int64_t* of_keys = s.key_positions + (s.row[m] * s.slots + first) * s.axes;
           for (int64_t j = 0; j < keys; ++j) {
             const int64_t behind = s.positions[m * s.axes] - of_keys[j * s.axes];
             to[j] += figures[std::min(std::max(behind, -s.reach), s.reach)];
           }
         });
}

static void cross_attention(const DecodeStep& s, const DecodeLayer& layer, int64_t m, int64_t head,
                            const float* q, float* scores, float* out) {
  const int64_t place = s.row[m] * s.memory_row + head * s.memory_head;
  attend(s, q,
         {layer.memory_keys + place, layer.memory_values + place, s.memory_key, s.memory_end[m]},
         scores, out, [](int64_t, float*) {});
}

// What `up` gave a token becomes what `down` takes.
static void activate(const DecodeStep& s, const float* x, float* out) {
  auto each = [&](auto of) __attribute__((always_inline)) {
#pragma omp simd
    for (int64_t i = 0; i < s.feed_forward; ++i) out[i] = of(x, i);
  };
  switch (s.activation) {
    case SILU: each([](auto x, int64_t i) { return gate<SILU>(x[2 * i]) * x[2 * i + 1]; }); break;
    case GELU_TANH:
      each([](auto x, int64_t i) { return gate<GELU_TANH>(x[2 * i]) * x[2 * i + 1]; });
      break;
    case RELU: each([](auto x, int64_t i) { return x[i] < 0 ? 0 : x[i]; }); break;
    case GELU:
      each([](auto x, int64_t i) { return x[i] * 0.5f * (1 + std::erf(x[i] * 0.70710678f)); });
      break;
    default: each([](auto x, int64_t i) { return gate<GELU_TANH>(x[i]); });
  }
}

static void decode_layer(const Team& team, const DecodeStep& s, const DecodeLayer& layer, float* x,
                         const Scratch& of) {
  const int64_t inner = s.heads * s.size, group = s.heads / s.key_heads;
  const auto [first, last] = team.share(s.tokens, 1);
  // x += the branch's product of what `run` makes of the input, and the norm before or after.
  auto branch = [&](DecodeParameters norm, DecodeParameters output, int64_t inputs, auto run) {
    if (s.pre_norm) {
      for (int64_t m = first; m < last; ++m)
        normalize(s, norm, x + m * s.width, of.input + m * s.width);
      team.meet();
    }
    const float* read = run(s.pre_norm ? of.input : x);
    team.meet();
    few_rows(team, s.tokens, read, output, x, s.width, inputs, true);
    team.meet();
    if (s.pre_norm) return;
    for (int64_t m = first; m < last; ++m) normalize(s, norm, x + m * s.width, x + m * s.width);
    team.meet();
  };
  auto each_head = [&](auto attention) {
    const auto [start, stop] = team.share(s.tokens * s.key_heads, 1);
    for (int64_t n = start; n < stop; ++n) {
      const int64_t m = n / s.key_heads, head = n % s.key_heads;
      const int64_t place = m * inner + head * group * s.size;
      attention(s, layer, m, head, of.queries + place, of.scores(team.thread), of.heads + place);
    }
    return of.heads;
  };
  branch(layer.attention_norm, layer.output, inner, [&](const float* in) {
    const int64_t fused = s.key_heads * (group + 2) * s.size;
    few_rows(team, s.tokens, in, layer.qkv, of.wide, fused, s.width, false);
    team.meet();
    for (int64_t m = first; m < last; ++m)
      split(s, layer, of.wide + m * fused, m, of.queries + m * inner);
    team.meet();
    return each_head(self_attention);
  });
  if (layer.cross_query.weight)
    branch(layer.cross_norm, layer.cross_output, inner, [&](const float* in) {
      few_rows(team, s.tokens, in, layer.cross_query, of.queries, inner, s.width, false);
      team.meet();
      return each_head(cross_attention);
    });
  branch(layer.feed_forward_norm, layer.down, s.feed_forward, [&](const float* in) {
    const int64_t outputs = s.feed_forward * (s.activation <= GELU_TANH ? 2 : 1);
    few_rows(team, s.tokens, in, layer.up, of.wide, outputs, s.width, false);
    team.meet();
    for (int64_t m = first; m < last; ++m)
      activate(s, of.wide + m * outputs, of.acted + m * s.feed_forward);
    return (const float*)of.acted;
  });
}
