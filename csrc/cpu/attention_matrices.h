// Products of pairs of bfloat16 in the tiles of a processor's matrix units (Intel's AMX), 16 rows of 16
// words each. attention_tiles.h includes it for processors that have them.
//
// A tile of the left operand is read row by row, one of the right as rows of words, so that a product by
// scores is taken the other way round, O' = V' S and dQ' = K' dS, and values and keys are turned instead.

constexpr int SIDE = 16, TILE_TERMS = 2 * SIDE;

// The units, set up in this thread for as long as it lives; then as they were, for other libraries set
// them up once and remember that.
class MatrixUnits {
  alignas(64) uint8_t before[64];

 public:
  MatrixUnits() {
    alignas(64) uint8_t shapes[64] = {1};
    for (int tile = 0; tile < 8; ++tile) shapes[16 + 2 * tile] = 4 * SIDE, shapes[48 + tile] = SIDE;
    _tile_storeconfig(before);
    asm volatile("" ::"r"(before), "r"(shapes) : "memory");  // the compiler is told of 8 bytes of either
    _tile_loadconfig(shapes);
  }
  ~MatrixUnits() { _tile_loadconfig(before); }
};

// As `product` with words of two and columns of one, in tiles of two by two: sizes are multiples of
// PANEL, all that it reads beyond the rows is there, and beyond the terms zeros are on both sides.
template <typename Range, typename Store>
static INLINE void product_of_tiles(int64_t rows, int64_t size, const float* a, int64_t row,
                                    const float* b, int64_t pitch, Range range, Store store) {
  alignas(64) float sums[2 * SIDE * PANEL];
  for (int64_t r = 0; r < rows; r += 2 * SIDE) {
    const int64_t high = std::min<int64_t>(2 * SIDE, rows - r);
    const auto [from, to] = range(r, r + high - 1);
    const int64_t first = from / TILE_TERMS * SIDE;
    const int64_t end = (to + TILE_TERMS - 1) / TILE_TERMS * SIDE;
    for (int64_t d = 0; d < size; d += PANEL) {
      _tile_zero(0);
      _tile_zero(1);
      _tile_zero(2);
      _tile_zero(3);
      asm("" ::: "memory");  // a tile's load does not tell the compiler that it reads
      for (int64_t k = first; k < end; k += SIDE) {
        _tile_loadd(6, b + k * pitch + d, pitch * 4);
        _tile_loadd(7, b + k * pitch + d + SIDE, pitch * 4);
        _tile_loadd(4, a + r * row + k, row * 4);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        if (high <= SIDE) continue;
        _tile_loadd(5, a + (r + SIDE) * row + k, row * 4);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
      }
      _tile_stored(0, sums, PANEL * 4);
      _tile_stored(1, sums + SIDE, PANEL * 4);
      if (high > SIDE) {
        _tile_stored(2, sums + SIDE * PANEL, PANEL * 4);
        _tile_stored(3, sums + SIDE * PANEL + SIDE, PANEL * 4);
      }
      for (int64_t s = 0; s < high; ++s)
        for (int u = 0; u < PANEL; u += LANES) store(r + s, d + u, at(sums + s * PANEL + u));
    }
  }
}

template <int half>
static INLINE void swap_halves(Vector (&x)[LANES]) {
  Integers low, high;
  for (int l = 0; l < LANES; ++l) {
    low[l] = l & half ? LANES + l - half : l;
    high[l] = l & half ? LANES + l : l + half;
  }
#pragma GCC unroll 16
  for (int r = 0; r < LANES; ++r)
    if (!(r & half)) {
      const Vector upper = x[r], lower = x[r + half];
      x[r] = __builtin_shuffle(upper, lower, low);
      x[r + half] = __builtin_shuffle(upper, lower, high);
    }
}
// A square of words turned: rows become columns.
static INLINE void turn(Vector (&x)[LANES]) {
  swap_halves<8>(x), swap_halves<4>(x), swap_halves<2>(x), swap_halves<1>(x);
}

// Rows as words of two rows each, turned: [size, rows / 2] of pitch KEY_WORDS. The last tile's is filled
// with zeros.
static INLINE void zip_turned(const bfloat16* from, int64_t stride, int64_t rows, int64_t size,
                              float* to) {
  for (int64_t r = 0; r < rows; r += TILE_TERMS, from += TILE_TERMS * stride, to += SIDE)
    for (int64_t d = 0; d < size; d += LANES) {
      Vector x[LANES];
#pragma GCC unroll 16
      for (int l = 0; l < LANES; ++l) x[l] = pair(from + 2 * l * stride + d, stride, rows - r - 2 * l);
      turn(x);
#pragma GCC unroll 16
      for (int l = 0; l < LANES; ++l) at(to + (d + l) * KEY_WORDS) = x[l];
    }
}

// Panels [size, PANEL] of queries, each times its factor, as rows of bfloat16.
static INLINE void write_turned(const float* panels, int64_t rows, int64_t size, const float* factors,
                                bfloat16* to, int64_t stride) {
  for (int64_t i = 0; i < rows; i += PANEL, panels += size * PANEL)
    for (int u = 0; u < PANEL; u += LANES)
      for (int64_t d = 0; d < size && i + u < rows; d += LANES) {
        Vector x[LANES];
#pragma GCC unroll 16
        for (int l = 0; l < LANES; ++l) x[l] = at(panels + (d + l) * PANEL + u) * at(factors + i + u);
        turn(x);
        const int64_t high = std::min<int64_t>(LANES, rows - i - u);
        for (int64_t l = 0; l < high; ++l) narrow(x[l], to + (i + u + l) * stride + d);
      }
}
