// Vectors of LANES floats, and the words of four bytes that a product runs over: floats or, where there
// are UNITS for it, pairs of bfloat16. attention_tiles.h includes it.

constexpr int PANEL = 2 * LANES;  // queries that lie across the lanes
#ifdef MATRIX_UNITS
constexpr bool TURNED = true;  // scores are a product's right operand, keys and values the left one
#else
constexpr bool TURNED = false;
#endif
constexpr int64_t KEY_WORDS = 64 + 16;  // pitch of what is turned, with 128 keys: an odd number of lines
// Terms that a product reads where there are so many: whole tiles of matrix units.
static INLINE int64_t filled(int64_t terms) { return TURNED ? (terms + 31) / 32 * 32 : terms; }
static_assert(PANEL <= BIAS_PADDING, "a panel's bias is read in one piece");
typedef float Vector __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef int32_t Integers __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

typedef uint32_t Bits __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef int32_t Word __attribute__((may_alias));
typedef uint16_t Halves __attribute__((vector_size(2 * LANES), aligned(2), may_alias));

static INLINE Vector& at(float* p) { return *(Vector*)p; }
static INLINE const Vector& at(const float* p) { return *(const Vector*)p; }

// Elements as floats and back, as common.h's load and store.
static INLINE Vector widen(const float* p) { return at(p); }
static INLINE Vector widen(const bfloat16* p) {
  return (Vector)(__builtin_convertvector(*(const Halves*)p, Bits) << 16);
}
static INLINE void narrow(Vector x, float* p) { at(p) = x; }
static INLINE Bits rounded(Vector x) {  // to bfloat16, in the upper half; what is below is left over
  const Bits u = (Bits)x, kept = (Bits)(x == x);
  return ((u + 0x7fff + (u >> 16 & 1)) & kept) | (0x7fc00000u & ~kept);
}
static INLINE void narrow(Vector x, bfloat16* p) {
  *(Halves*)p = __builtin_convertvector(rounded(x) >> 16, Halves);
}

// 2^x, relative error 2e-7, for x < 128; 0 below -126. NaN stays NaN. The polynomial is minimax.
static INLINE Vector exp2(Vector x) {
  const float round = 12582912 + 127;  // 1.5 * 2^23: the sum ends in the bits of the exponent
  Vector shifted = x + round;
  Vector f = x - (shifted - round);
  Vector p = f * 1.32647273e-3f + 9.67151299e-3f;
  p = p * f + 5.55073358e-2f;
  p = p * f + 2.40222424e-1f;
  p = p * f + 6.93147004e-1f;
  p = p * f + 1;
  p *= (Vector)((Integers)shifted << 23);
  return (Vector)((Integers)p & ~(x < -126));
}

// Elements in a word of what is read as T.
template <typename T>
constexpr int TERMS = UNITS && std::is_same<T, bfloat16>::value ? 2 : 1;

// Two rows of floats as one of words: theirs side by side.
static INLINE Vector zipped(Vector even, Vector odd) {
#ifdef MATRIX_UNITS
  Bits places;
  for (int l = 0; l < LANES; ++l) places[l] = l | (l + LANES) << 16;
  const auto halves = (__m512i)_mm512_cvtne2ps_pbh((__m512)odd, (__m512)even);
  return (Vector)_mm512_permutexvar_epi16((__m512i)places, halves);
#else
  return (Vector)((rounded(even) >> 16) | (rounded(odd) & 0xffff0000u));
#endif
}

static INLINE float word(const bfloat16* p) {
  float x;
  std::memcpy(&x, p, sizeof x);
  return x;
}

// Rows as words [rows, size / terms].
template <int terms, typename T>
static void copy(const T* from, int64_t stride, int64_t rows, int64_t size, float* to,
                 int64_t pitch) {
  for (int64_t r = 0; r < rows; ++r, from += stride, to += pitch)
    for (int64_t d = 0; d < size; d += LANES * terms) {
      __builtin_prefetch(from + 8 * stride + d);  // hardware does not see ahead across pages
      if (terms == 1) at(to + d) = widen(from + d);
      else std::memcpy(to + d / 2, from + d, std::min<int64_t>(size - d, 2 * LANES) * sizeof(T));
    }
}

// Elements of two rows as words, of `left` rows that there are; the others are zeros.
static INLINE Vector pair(const bfloat16* from, int64_t stride, int64_t left) {
  Bits even = {}, odd = {};
  if (left > 0) even = __builtin_convertvector(*(const Halves*)from, Bits);
  if (left > 1) odd = __builtin_convertvector(*(const Halves*)(from + stride), Bits);
  return (Vector)(even | odd << 16);
}

// Rows as words of two rows each [rows / 2, size]. Zeros fill the last word, or the last tile.
static INLINE void zip(const bfloat16* from, int64_t stride, int64_t rows, int64_t size, float* to,
                       int64_t pitch) {
  for (int64_t r = 0; r < filled(rows); r += 2, from += 2 * stride, to += pitch)
    for (int64_t d = 0; d < size; d += LANES) at(to + d) = pair(from + d, stride, rows - r);
}
static INLINE void zip(const float*, int64_t, int64_t, int64_t, float*, int64_t) {}

// Panels [size / terms, PANEL] of rows' words. The last row fills the last panel.
template <int terms, typename T>
static void transpose(const T* from, int64_t stride, int64_t rows, int64_t size, float* to) {
  for (int64_t r = 0; r < rows; r += PANEL, to += size / terms * PANEL)
    for (int u = 0; u < PANEL; u += LANES) {
      const T* lane[LANES];
      for (int l = 0; l < LANES; ++l) lane[l] = from + std::min(r + u + l, rows - 1) * stride;
      for (int64_t d = 0; d < size; d += terms) {
        Vector x;
        for (int l = 0; l < LANES; ++l)
          if constexpr (terms == 1) x[l] = load(lane[l] + d);
          else x[l] = word((const bfloat16*)lane[l] + d);
        at(to + d / terms * PANEL + u) = x;
      }
    }
}
