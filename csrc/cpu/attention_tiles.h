// Attention of one batch row and one key head in vectors of LANES floats. each_isa.h includes it
// once an instruction set, inside of a namespace.
//
// A panel of queries, PANEL of them, lies across the lanes, so that a softmax is vertical and a
// product reads its result either way. Only queries are ever transposed:
//
//     S' = K Q'    O = S V    dS' = V dO'    dQ = dS K    dV = S' dO    dK = dS' Q
//
// A product runs over words of four bytes: floats or, where there are UNITS for it, pairs of bfloat16
// that lie one behind the other along what it sums over. Scores are always floats first. Matrix units take
// scores as the right operand alone: O' = V' S, dQ' = K' dS (attention_matrices.h).

#include "attention_words.h"
#ifdef MATRIX_UNITS
#include "attention_matrices.h"
#endif

constexpr int ROWS = 6;  // of a tile: twelve sums, in registers

// sum + a[0] * b of the words' elements.
template <int terms>
static INLINE Vector add_product(const float* a, Vector b, Vector sum) {
#ifdef BFLOAT16_UNITS
  if constexpr (terms == 2) {
    const Integers word = Integers{} + *(const Word*)a;  // a float's addition might change the bits
    return (Vector)_mm512_dpbf16_ps((__m512)sum, (__m512bh)word, (__m512bh)b);
  }
#endif
  return sum + a[0] * b;
}

// store(r, v, c) with c = the sum over k of a[r * row + k * column] * b[k * pitch + v * LANES + :].
template <int terms, int R, int V, typename Store>
static INLINE void tile(const float* a, int64_t row, int64_t column, const float* b, int64_t pitch,
                        int64_t depth, Store store) {
  Vector sum[R][V] = {};
  for (int64_t k = 0; k < depth; ++k, a += column, b += pitch) {
#pragma GCC unroll 6
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
      for (int v = 0; v < V; ++v)
        sum[r][v] = add_product<terms>(a + r * row, at(b + v * LANES), sum[r][v]);
  }
  asm("" ::: "memory");  // else what `store` reads is read ahead and takes registers from the sums
#pragma GCC unroll 6
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) store(r, v, sum[r][v]);
}

// store(r, d, c) with c = rows [r, d : d + LANES] of the product of a [rows, .] and b [., size].
// range(r, last): the first of its terms that rows r to last need, and the one past the last; where
// words hold two, what completes a word has to be there.
template <int terms, typename Range, typename Store>
static INLINE void product(int64_t rows, int64_t size, const float* a, int64_t row, int64_t column,
                           const float* b, int64_t pitch, Range range, Store store) {
#ifdef MATRIX_UNITS
  if constexpr (terms == 2) return product_of_tiles(rows, size, a, row, b, pitch, range, store);
#endif
  auto tiles = [&](int64_t r, auto height) __attribute__((always_inline)) {
    const auto [from_term, to_term] = range(r, r + height - 1);
    const int64_t first = from_term / terms, end = (to_term + terms - 1) / terms;
    const float *from = a + r * row + first * column, *to = b + first * pitch;
    int64_t d = 0;
    for (; d + PANEL <= size; d += PANEL)
      tile<terms, height, 2>(from, row, column, to + d, pitch, end - first,
                      [&](int s, int v, Vector c) { store(r + s, d + v * LANES, c); });
    if (d < size)
      tile<terms, height, 1>(from, row, column, to + d, pitch, end - first,
                      [&](int s, int, Vector c) { store(r + s, d, c); });
  };
  // Heights differ by one at most: low tiles wait for their sums.
  for (int64_t r = 0, left = (rows + ROWS - 1) / ROWS, height; left > 0; --left, r += height) {
    height = (rows - r) / left;
    switch (height) {
      case 1: tiles(r, std::integral_constant<int, 1>{}); break;
      case 2: tiles(r, std::integral_constant<int, 2>{}); break;
      case 3: tiles(r, std::integral_constant<int, 3>{}); break;
      case 4: tiles(r, std::integral_constant<int, 4>{}); break;
      case 5: tiles(r, std::integral_constant<int, 5>{}); break;
      default: tiles(r, std::integral_constant<int, 6>{});
    }
  }
}

// A panel's scores of one key, `value` where its first `hidden` queries do not see it.
static INLINE void hide(float* scores, int64_t hidden, float value) {
  for (int u = 0; u < PANEL; u += LANES) {
    Integers lane;
    for (int l = 0; l < LANES; ++l) lane[l] = u + l;
    at(scores + u) = lane < int32_t(hidden) ? Vector{} + value : at(scores + u);
  }
}

// The bias of a panel's scores of some keys [keys, pitch], by positions of its queries and the keys.
struct PanelBias {
  const Bias& bias;
  const int64_t *asks, *seen;
  int64_t high, head;  // queries, and the head's place in figures
  bool even() const {  // positions count up by one, as within a document
    for (int64_t l = 1; l < high; ++l)
      if (asks[l] != asks[0] + l) return false;
    return true;
  }
  void add(float* scores, int64_t keys, int64_t pitch) const {
    const float* figures = bias.figures + head * bias.width();
    const bool all = even();
    for (int64_t m = 0; m < keys; ++m, scores += pitch) {
      const float* from = figures + bias.place(asks[0] - seen[m], PANEL);
      if (all)
        for (int u = 0; u < PANEL; u += LANES) at(scores + u) += at(from + u) * float(LOG2E);
      else
        for (int64_t l = 0; l < high; ++l)
          scores[l] += figures[bias.place(asks[l] - seen[m], 0)] * float(LOG2E);
    }
  }
  void sum(const float* gradients, int64_t keys, int64_t pitch, int64_t row, int64_t heads) const {
    float* sums = bias.sums + (row * heads + head) * bias.width();
    const bool all = even();
    for (int64_t m = 0; m < keys; ++m, gradients += pitch) {
      float* to = sums + bias.place(asks[0] - seen[m], PANEL);
      if (all)
        for (int u = 0; u < PANEL; u += LANES) at(to + u) += at(gradients + u);
      else
        for (int64_t l = 0; l < high; ++l)
          sums[bias.place(asks[l] - seen[m], 0)] += gradients[l];
    }
  }
};

// A panel's scores of some keys [keys, pitch] as words of two keys each, [keys / 2, pitch]; may be in
// place. Zeros fill the last word, or the last tile.
static INLINE void zip_scores(const float* scores, int64_t pitch, int64_t keys, float* to) {
  int64_t m = 0;
  for (; m < keys; m += 2, to += pitch)
    for (int u = 0; u < PANEL; u += LANES) {
      const Vector odd = m + 1 < keys ? at(scores + (m + 1) * pitch + u) : Vector{};
      at(to + u) = zipped(at(scores + m * pitch + u), odd);
    }
  for (; m < filled(keys); m += 2, to += pitch) std::fill_n(to, PANEL, 0.f);
}
// A panel's scores of some keys, from query i on, as words of two queries each, from word i / 2 on.
static INLINE void pair_scores(float* scores, int64_t i, int64_t keys) {
  for (int64_t m = 0; m < keys; ++m, scores += Backward<bfloat16>::ACROSS) {
    const Vector even = at(scores + i), odd = at(scores + i + LANES);
#ifdef MATRIX_UNITS
    at(scores + i / 2) = (Vector)_mm512_cvtne2ps_pbh((__m512)odd, (__m512)even);
#else
    narrow(even, (bfloat16*)(scores + i / 2));
    narrow(odd, (bfloat16*)(scores + i / 2) + LANES);
#endif
  }
}

static PanelBias panel_bias(const Call& x, int64_t row, int64_t head, const Block& block, int64_t i,
                            int64_t j) {
  return {x.bias, x.bias.queries + row * x.queries + block.start + i,
          x.bias.keys + row * x.keys + block.key + j, std::min<int64_t>(PANEL, block.rows - i), head};
}

// Scores [keys, PANEL] become weights beneath the highest so far, and add to the sums. decay: what
// came before, beneath it too. Online softmax: Milakov and Gimelshein 2018.
static INLINE void soften(float* scores, int64_t keys, float* highest, float* sums, float* decay) {
  Vector top[2] = {at(highest), at(highest + LANES)}, sum[2];
  for (int64_t m = 0; m < keys; ++m)
    for (int u = 0; u < 2; ++u) {
      Vector score = at(scores + m * PANEL + u * LANES);
      top[u] = score > top[u] ? score : top[u];
    }
  for (int u = 0; u < 2; ++u) {
    Vector less = exp2(at(highest + u * LANES) - top[u]);
    sum[u] = at(sums + u * LANES) * less;
    at(decay + u * LANES) = less;
    at(highest + u * LANES) = top[u];
  }
  for (int64_t m = 0; m < keys; ++m)
    for (int u = 0; u < 2; ++u) {
      Vector& score = at(scores + m * PANEL + u * LANES);
      score = exp2(score - top[u]);
      sum[u] += score;
    }
  for (int u = 0; u < 2; ++u) at(sums + u * LANES) = sum[u];
}

// Sums of a block's queries, each times its factor, as rows of T.
template <typename T>
static INLINE void write_rows(const float* from, int64_t rows, int64_t size, const float* factors,
                              T* to, int64_t stride) {
#ifdef MATRIX_UNITS
  return write_turned(from, rows, size, factors, to, stride);
#endif
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t d = 0; d < size; d += LANES)
      narrow(at(from + i * size + d) * factors[i], to + i * stride + d);
}

template <typename T>
static void attend(const Forward<T>& x, int64_t row, int64_t key_head, float* scratch) {
#ifdef MATRIX_UNITS
  const MatrixUnits units;
#endif
  constexpr int terms = TERMS<T>;
  constexpr int64_t queries = Forward<T>::QUERIES, keys = Forward<T>::KEYS;
  const int64_t size = x.size, pitch = x.pitch();
  float *turned = scratch, *out = turned + queries * size;
  float *k = out + queries * size, *v = k + keys * pitch;
  float *scores = v + keys * pitch, *highest = scores + keys * PANEL, *sums = highest + queries;
  x.each_block(row, key_head, queries, [&](const Block& block, int64_t head) {
    const int64_t rows = block.rows;
    float* lse = x.lse + (row * x.heads + head) * x.queries + block.start;
    const auto factor = float(x.scale * LOG2E);
    transpose<terms>(x.q.at(row, block.start, head), x.q.stride, rows, size, turned);
    std::fill_n(highest, queries, -INFINITY);
    std::fill_n(sums, queries, 0.f);
    for (int64_t j = 0; j < block.seen(rows - 1); j += keys) {
      const int64_t held = std::min(keys, block.seen(rows - 1) - j);
      copy<terms>(x.k.at(row, block.key + j, key_head), x.k.stride, held, size, k, pitch);
      const T* values = x.v.at(row, block.key + j, key_head);
      if constexpr (TURNED) zip_turned(values, x.v.stride, held, size, v);
      else if (terms == 2) zip(values, x.v.stride, held, size, v, pitch);
      else copy<1>(values, x.v.stride, held, size, v, pitch);
      for (int64_t i = 0; i < rows; i += PANEL) {
        const int64_t high = std::min<int64_t>(PANEL, rows - i);
        const int64_t n = std::min(held, block.seen(i + high - 1) - j);
        if (n <= 0) continue;
        product<terms>(n, PANEL, k, pitch, 1, turned + i * (size / terms), PANEL,
                       [&](int64_t, int64_t) { return std::pair(int64_t(0), size); },
                       [&](int64_t m, int64_t l, Vector c) {
                         at(scores + m * PANEL + l) = c * factor;
                       });
        if (x.bias.figures) panel_bias(x, row, head, block, i, j).add(scores, n, PANEL);
        for (int64_t m = std::max<int64_t>(0, block.seen(i) - j); m < n; ++m)
          hide(scores + m * PANEL, m + 1 + j - block.seen(i), -INFINITY);
        float decay[PANEL];
        soften(scores, n, highest + i, sums + i, decay);
        if (terms == 2) zip_scores(scores, PANEL, n, scores);
        float* to = out + i * size;
        if constexpr (TURNED) {
          product<terms>(size, PANEL, v, KEY_WORDS, 1, scores, PANEL,
                         [&](int64_t, int64_t) { return std::pair(int64_t(0), n); },
                         [&](int64_t d, int64_t l, Vector c) {
                           Vector& o = at(to + d * PANEL + l);
                           o = j ? o * at(decay + l) + c : c;
                         });
          continue;
        }
        product<terms>(high, size, scores, 1, PANEL, v, pitch,
                       [&](int64_t, int64_t last) {
                         return std::pair(int64_t(0), std::min(n, block.seen(i + last) - j));
                       },
                       [&](int64_t l, int64_t d, Vector c) {
                         Vector& o = at(to + l * size + d);
                         o = j ? o * decay[l] + c : c;
                       });
      }
    }
    for (int64_t i = 0; i < rows; ++i) {
      lse[i] = float((highest[i] + std::log2(sums[i])) / LOG2E);
      sums[i] = 1 / sums[i];
    }
    T* to = x.out + x.place(row, block.start, head);
    write_rows(out, rows, size, sums, to, x.heads * size);
  });
}

template <typename T>
static void attend(const Backward<T>& x, int64_t row, int64_t key_head, float* scratch) {
#ifdef MATRIX_UNITS
  const MatrixUnits units;
#endif
  constexpr int terms = TERMS<T>;
  constexpr int64_t queries = Backward<T>::QUERIES, keys = Backward<T>::KEYS;
  constexpr int64_t across = Backward<T>::ACROSS;
  const int64_t size = x.size, pitch = x.pitch();
  float *grad_k = scratch, *grad_v = grad_k + x.keys * size, *grad_q = scratch + x.sums();
  float *q_turned = grad_q + queries * size, *g_turned = q_turned + queries * size;
  float *q = g_turned + queries * size, *g = q + queries * pitch;
  float *k = g + queries * pitch, *v = k + keys * pitch;
  float *p = v + keys * pitch, *ds = p + keys * across;
  float *partition = ds + keys * across, *delta = partition + queries;
  // What words of two need beside: keys and dS', two rows in one.
  float *k_zipped = terms == 1 ? k : delta + queries;
  const int64_t zipped = TURNED ? size * KEY_WORDS : keys / 2 * pitch;
  float *ds_zipped = terms == 1 ? ds : k_zipped + zipped;
  x.each_block(row, key_head, queries, [&](const Block& block, int64_t head) {
    const int64_t rows = block.rows;
    const T *asks = x.q.at(row, block.start, head), *given = x.grad.at(row, block.start, head);
    const float* lse = x.lse + (row * x.heads + head) * x.queries + block.start;
    const auto factor = float(x.scale * LOG2E);
    if (terms == 2) {
      zip(asks, x.q.stride, rows, size, q, pitch);
      zip(given, x.grad.stride, rows, size, g, pitch);
    } else {
      copy<1>(asks, x.q.stride, rows, size, q, pitch);
      copy<1>(given, x.grad.stride, rows, size, g, pitch);
    }
    transpose<terms>(asks, x.q.stride, rows, size, q_turned);
    transpose<terms>(given, x.grad.stride, rows, size, g_turned);
    std::fill_n(partition, queries, INFINITY);  // what fills the last panel has no weight
    std::fill_n(delta, queries, 0.f);
    for (int64_t i = 0; i < rows; ++i) {
      const T* out = x.out + x.place(row, block.start + i, head);
      Vector dot = {};
      for (int64_t d = 0; d < size; d += LANES)
        dot += widen(given + i * x.grad.stride + d) * widen(out + d);
      for (int l = 0; l < LANES; ++l) delta[i] += dot[l];
      partition[i] = float(lse[i] * LOG2E);
    }
    for (int64_t j = 0; j < block.seen(rows - 1); j += keys) {
      const int64_t held = std::min(keys, block.seen(rows - 1) - j);
      const T* read = x.k.at(row, block.key + j, key_head);
      float *to_k = grad_k + (block.key + j) * size, *to_v = grad_v + (block.key + j) * size;
      copy<terms>(read, x.k.stride, held, size, k, pitch);
      copy<terms>(x.v.at(row, block.key + j, key_head), x.v.stride, held, size, v, pitch);
      if constexpr (TURNED) zip_turned(read, x.k.stride, held, size, k_zipped);
      else if (terms == 2) zip(read, x.k.stride, held, size, k_zipped, pitch);
      for (int64_t i = 0; i < rows; i += PANEL) {
        const int64_t last = std::min<int64_t>(rows, i + PANEL) - 1;
        const int64_t n = std::max<int64_t>(0, std::min(held, block.seen(last) - j));
        auto all = [&](int64_t, int64_t) { return std::pair(int64_t(0), size); };
        product<terms>(n, PANEL, k, pitch, 1, q_turned + i * (size / terms), PANEL, all,
                       [&](int64_t m, int64_t l, Vector c) {
                         at(p + m * across + i + l) = c * factor;
                       });
        if (x.bias.figures) panel_bias(x, row, head, block, i, j).add(p + i, n, across);
        for (int64_t m = 0; m < n; ++m) {
          for (int64_t l = i; l < i + PANEL; l += LANES)
            at(p + m * across + l) = exp2(at(p + m * across + l) - at(partition + l));
          if (m + j >= block.seen(i)) hide(p + m * across + i, m + 1 + j - block.seen(i), 0);
        }
        product<terms>(n, PANEL, v, pitch, 1, g_turned + i * (size / terms), PANEL, all,
                       [&](int64_t m, int64_t l, Vector c) {
                         const int64_t place = m * across + i + l;
                         at(ds + place) = at(p + place) * (c - at(delta + i + l));
                       });
        if (x.bias.figures)
          panel_bias(x, row, head, block, i, j).sum(ds + i, n, across, row, x.heads);
        // A tile below reaches as far beyond what its first or last row needs.
        const int64_t reached = TURNED ? filled(n) : std::min(held, n + ROWS);
        for (int64_t m = n; m < reached; ++m) {
          std::fill_n(p + m * across + i, PANEL, 0.f);
          std::fill_n(ds + m * across + i, PANEL, 0.f);
        }
        if (terms == 2) {
          zip_scores(ds + i, across, reached, ds_zipped + i);
          pair_scores(p, i, reached);
          pair_scores(ds, i, reached);
        }
        if constexpr (TURNED)
          product<terms>(size, PANEL, k_zipped, KEY_WORDS, 1, ds_zipped + i, across,
                         [&](int64_t, int64_t) { return std::pair(int64_t(0), n); },
                         [&](int64_t d, int64_t l, Vector c) {
                           Vector& o = at(grad_q + i * size + d * PANEL + l);
                           o = j ? o + c : c;
                         });
      }
      if constexpr (!TURNED)
        product<terms>(rows, size, ds_zipped, 1, across, k_zipped, pitch,
                     [&](int64_t, int64_t last) {
                       return std::pair(int64_t(0), std::min(held, block.seen(last) - j));
                     },
                     [&](int64_t i, int64_t d, Vector c) {
                       Vector& o = at(grad_q + i * size + d);
                       o = j ? o + c : c;
                     });
      auto looking = [&](int64_t m, int64_t) { return std::pair(block.first(j + m), rows); };
      product<terms>(held, size, p, across, 1, g, pitch, looking,
                     [&](int64_t m, int64_t d, Vector c) { at(to_v + m * size + d) += c; });
      product<terms>(held, size, ds, across, 1, q, pitch, looking,
                     [&](int64_t m, int64_t d, Vector c) { at(to_k + m * size + d) += c; });
    }
    std::fill_n(partition, queries, float(x.scale));
    T* to = x.grad_q + x.place(row, block.start, head);
    write_rows(grad_q, rows, size, partition, to, x.heads * size);
  });
}
