#include <omp.h>

#include <algorithm>
#include <memory>
#include <type_traits>
#include <utility>

#include "gate.h"
#include "rope.h"
#include "isa.h"

// The threads that run a call.
struct Team {
  int64_t thread, threads;
  // This one's share of `count`, whole blocks but for the last.
  std::pair<int64_t, int64_t> share(int64_t count, int64_t block) const {
    const int64_t blocks = (count + block - 1) / block;
    return {std::min(count, blocks * thread / threads * block),
            std::min(count, blocks * (thread + 1) / threads * block)};
  }
  void meet() const {
    if (threads > 1) {
#pragma omp barrier
    }
  }
};

// What the tokens of a step leave between two products.
struct Scratch {
  float *input, *wide, *queries, *heads, *acted, *all_scores;
  int64_t each;  // scores of a thread
  float* scores(int64_t thread) const { return all_scores + thread * each; }
};

typedef int32_t Integers4 __attribute__((vector_size(16)));

#define TILES "decode_tiles.h"
#include "each_isa.h"

#ifdef X86_VERSIONS
#define VERSION(name) \
  (processor() >= AVX512 ? avx512::name : processor() >= AVX2 ? avx2::name : any::name)
#else
#define VERSION(name) any::name
#endif

template <typename Run>
static void in_team(bool worth_it, Run run) {
#pragma omp parallel if (worth_it)
  run(Team{omp_get_thread_num(), omp_get_num_threads()});
}

extern "C" int megaarch_decode_layers(const DecodeLayer* layers, int64_t count,
                                      const DecodeStep* step, float* x, void*) {
  const DecodeStep& s = *step;
  const int64_t inner = s.heads * s.size, fused = inner + 2 * s.key_heads * s.size;
  const int64_t wide = std::max(fused, 2 * s.feed_forward);
  int64_t most = 0;
  for (int64_t m = 0; m < s.tokens; ++m) {
    most = std::max(most, s.end[m] - s.first[m]);
    if (s.memory_end) most = std::max(most, s.memory_end[m]);
  }
  const int64_t each = most * (s.heads / s.key_heads), threads = omp_get_max_threads();
  const int64_t held = s.tokens * (s.width + wide + 2 * inner + s.feed_forward) + threads * each;
  std::unique_ptr<float[]> memory(new float[held]);
  Scratch of{memory.get()};
  of.wide = of.input + s.tokens * s.width;
  of.queries = of.wide + s.tokens * wide;
  of.heads = of.queries + s.tokens * inner;
  of.acted = of.heads + s.tokens * inner;
  of.all_scores = of.acted + s.tokens * s.feed_forward;
  of.each = each;
  const auto run = VERSION(decode_layer);
  in_team(true, [&](const Team& team) {
    for (int64_t n = 0; n < count; ++n) run(team, s, layers[n], x, of);
  });
  return 0;
}

extern "C" int megaarch_few_rows(const float* x, const float* weight, const float* bias, float* out,
                                 int64_t rows, int64_t outputs, int64_t inputs, void*) {
  const auto run = VERSION(few_rows);
  in_team(rows * outputs * inputs > 1 << 16, [&](const Team& team) {
    run(team, rows, x, {weight, bias}, out, outputs, inputs, false);
  });
  return 0;
}
