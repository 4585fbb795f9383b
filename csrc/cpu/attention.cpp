#include <algorithm>
#include <memory>
#include <type_traits>
#include <utility>

#include "common.h"
#include "isa.h"

constexpr double LOG2E = 1.4426950408889634;
enum Part { UNUSED, FULL, CAUSAL };

// Rows of a tensor [batch, length, heads, size] with strides.
template <typename T>
struct Rows {
  const T* data;
  int64_t batch, stride, head;
  Rows(const void* data, const int64_t* strides)
      : data((const T*)data), batch(strides[0]), stride(strides[1]), head(strides[2]) {}
  const T* at(int64_t b, int64_t s, int64_t h) const {
    return data + b * batch + s * stride + h * head;
  }
};

// Query rows of a part, from `start` on. Its keys are counted from `key`: row i sees those before
// reach + i * step, one at least.
struct Block {
  int64_t start, rows, key, reach, step;
  int64_t seen(int64_t i) const { return reach + i * step; }
  int64_t first(int64_t j) const { return step ? std::max<int64_t>(0, j + 1 - reach) : 0; }
};

// What a score gains by the query's position less the key's: figures [heads, width], and sums of its
// gradients [batch, heads, width].
struct Bias {
  const float* figures;
  float* sums;
  const int64_t *queries, *keys;
  int64_t reach;
  int64_t width() const { return 2 * (reach + BIAS_PADDING) + 1; }
  // That of a distance, or of the least of `more` ascending ones and one: beyond reach all are alike.
  int64_t place(int64_t distance, int64_t more) const {
    return std::min(std::max(distance, -reach - more), reach) + reach + BIAS_PADDING;
  }
};

struct Call {
  const int32_t* parts;
  int64_t batch, parts_per_row, queries, keys, heads, key_heads, size;
  double scale;
  Bias bias;

  // Of rows in scratch: an odd number of cache lines, so that a column of them uses every set.
  int64_t pitch() const { return ((size + 15) / 16 | 1) * 16; }
  int64_t place(int64_t row, int64_t query, int64_t head) const {
    return ((row * queries + query) * heads + head) * size;
  }
  int64_t key_place(int64_t row, int64_t key, int64_t head) const {
    return ((row * keys + key) * key_heads + head) * size;
  }

  // run(block, head) for the parts of a row and the heads of a key head, `most` queries at a time.
  template <typename Run>
  void each_block(int64_t row, int64_t key_head, int64_t most, Run run) const {
    const int64_t group = heads / key_heads;
    for (int64_t head = key_head * group; head < (key_head + 1) * group; ++head)
      for (int64_t n = 0; n < parts_per_row; ++n) {
        const int32_t* part = parts + (row * parts_per_row + n) * 5;
        const int64_t step = part[0] == CAUSAL, end = part[2], key = part[3], held = part[4] - key;
        if (part[0] == UNUSED || held == 0) continue;
        int64_t start = step ? std::max(int64_t(part[1]), end - held) : part[1];
        for (; start < end; start += most)
          run(Block{start, std::min(most, end - start), key, held - step * (end - 1 - start), step},
              head);
      }
  }

  // Rows [length, all heads] of a key head's share of heads, zeroed where `where` says so.
  template <typename T, typename Where>
  void clear(T* to, int64_t length, int64_t all, int64_t row, int64_t key_head,
             Where where) const {
    const int64_t group = all / key_heads;
    for (int64_t i = 0; i < length; ++i)
      for (int64_t head = key_head * group; head < (key_head + 1) * group; ++head)
        if (where(i, head)) std::fill_n(to + ((row * length + i) * all + head) * size, size, T{});
  }
  // Query rows that see no key: those whose lse stayed what it was first.
  template <typename T>
  void clear_unseen(T* to, const float* lse, int64_t row, int64_t key_head) const {
    clear(to, queries, heads, row, key_head, [&](int64_t i, int64_t head) {
      return lse[(row * heads + head) * queries + i] == -INFINITY;
    });
  }
};

template <typename T>
struct Forward : Call {
  static constexpr int64_t QUERIES = 256, KEYS = 128;  // of a block: what fits in the second cache
  Rows<T> q, k, v;
  T* out;
  float* lse;
  int64_t scratch() const { return QUERIES * (2 * size + 2) + KEYS * (2 * pitch() + 32); }
  void before(int64_t row, int64_t key_head, float*) const {
    const int64_t all = heads / key_heads * queries;
    std::fill_n(lse + (row * key_heads + key_head) * all, all, -INFINITY);
  }
  void after(int64_t row, int64_t key_head, float*) const { clear_unseen(out, lse, row, key_head); }
};

template <typename T>
struct Backward : Call {
  static constexpr int64_t QUERIES = 128, KEYS = 128, ACROSS = QUERIES + 16;
  Rows<T> grad, q, k, v;
  const T* out;
  const float* lse;
  T *grad_q, *grad_k, *grad_v;
  // Gradients of a key head's keys and values are summed in scratch, in fp32.
  int64_t sums() const { return 2 * keys * size; }
  int64_t scratch() const {
    return sums() + QUERIES * (3 * size + 2 * pitch() + 2) + KEYS * (3 * pitch() + 3 * ACROSS);
  }
  void before(int64_t, int64_t, float* scratch) const { std::fill_n(scratch, sums(), 0.f); }
  void after(int64_t row, int64_t key_head, float* scratch) const {
    for (int64_t i = 0; i < keys; ++i)
      for (int64_t d = 0, to = key_place(row, i, key_head); d < size; ++d) {
        store(grad_k + to + d, float(scratch[i * size + d] * scale));
        store(grad_v + to + d, scratch[(keys + i) * size + d]);
      }
    clear_unseen(grad_q, lse, row, key_head);
  }
};

#define TILES "attention_tiles.h"
#define HALVES
#include "each_isa.h"

#ifdef X86_VERSIONS
template <template <typename> class Each, typename T>
static auto version(const Each<T>& x) {
  void (*attend)(const Each<T>&, int64_t, int64_t, float*) = any::attend;
  const Processor found = processor();
  if (found >= AVX2) attend = avx2::attend;
  if (found >= AVX512 && x.size % 16 == 0) attend = avx512::attend;
  if constexpr (std::is_same<T, bfloat16>::value) {
    if (found >= AVX512_BF16 && x.size % 16 == 0) attend = avx512_bf16::attend;
    if (has_matrix_units() && x.size % 32 == 0) attend = amx::attend;
  }
  return attend;
}
#else
template <typename Each>
static auto version(const Each&) {
  return static_cast<void (*)(const Each&, int64_t, int64_t, float*)>(any::attend);
}
#endif

template <typename Run>
static int by_type(int dtype, Run run) {
  return dtype == FLOAT32 ? run(float{}) : dtype == BFLOAT16 ? run(bfloat16{}) : UNSUPPORTED_DTYPE;
}

// Key heads are independent, so that the sums do not depend on the number of threads.
template <typename Each>
static int run(const Each& x) {
  if (x.size <= 0 || x.size % 8 || x.size > 256) return UNSUPPORTED_SIZE;
  const auto attend = version(x);
#pragma omp parallel if (x.batch * x.key_heads > 1)
  {
    std::unique_ptr<float[]> memory(new float[x.scratch() + 16]);
    float* scratch = (float*)((uintptr_t(memory.get()) + 63) / 64 * 64);
#pragma omp for schedule(dynamic)
    for (int64_t n = 0; n < x.batch * x.key_heads; ++n) {
      const int64_t row = n / x.key_heads, key_head = n % x.key_heads;
      x.before(row, key_head, scratch);
      attend(x, row, key_head, scratch);
      x.after(row, key_head, scratch);
    }
  }
  return 0;
}

extern "C" int megaarch_attention_forward(const void* q, const void* k, const void* v, void* out,
                                          float* lse, const int32_t* parts, const int64_t* strides,
                                          int64_t batch, int64_t parts_per_row, int64_t queries,
                                          int64_t keys, int64_t heads, int64_t key_heads,
                                          int64_t size, double scale, const float* bias,
                                          const int64_t* query_positions,
                                          const int64_t* key_positions, int64_t reach, int dtype,
                                          void*) {
  const Call call{parts, batch, parts_per_row, queries, keys, heads, key_heads, size, scale,
                  Bias{bias, nullptr, query_positions, key_positions, reach}};
  return by_type(dtype, [&](auto of) {
    using T = decltype(of);
    return run(Forward<T>{call, {q, strides}, {k, strides + 3}, {v, strides + 6}, (T*)out, lse});
  });
}

extern "C" int megaarch_attention_backward(
    const void* grad, const void* q, const void* k, const void* v, const void* out,
    const float* lse, void* grad_q, void* grad_k, void* grad_v, const int32_t* parts,
    const int64_t* strides, int64_t batch, int64_t parts_per_row, int64_t queries, int64_t keys,
    int64_t heads, int64_t key_heads, int64_t size, double scale, const float* bias,
    float* grad_bias, const int64_t* query_positions, const int64_t* key_positions, int64_t reach,
    int dtype, void*) {
  const Call call{parts, batch, parts_per_row, queries, keys, heads, key_heads, size, scale,
                  Bias{bias, grad_bias, query_positions, key_positions, reach}};
  return by_type(dtype, [&](auto of) {
    using T = decltype(of);
    return run(Backward<T>{call, {grad, strides}, {q, strides + 3}, {k, strides + 6},
                           {v, strides + 9}, (const T*)out, lse, (T*)grad_q, (T*)grad_k,
                           (T*)grad_v});
  });
}
