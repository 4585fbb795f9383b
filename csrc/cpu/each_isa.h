// The file TILES once an instruction set, inside of a namespace, with vectors of LANES floats; where HALVES
// is defined also with UNITS for bfloat16: products of pairs, and those of matrices.

#pragma GCC diagnostic ignored "-Wpsabi"  // vectors are passed to nothing outside of the file

namespace any {
constexpr int LANES = 4;
constexpr bool UNITS = false;
#include TILES
}  // namespace any

#ifdef X86_VERSIONS
#pragma GCC push_options
#pragma GCC target("avx2,fma")
namespace avx2 {
constexpr int LANES = 8;
constexpr bool UNITS = false;
#include TILES
}  // namespace avx2
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("arch=x86-64-v4")
namespace avx512 {
constexpr int LANES = 16;
constexpr bool UNITS = false;
#include TILES
}  // namespace avx512
#pragma GCC pop_options
#ifdef HALVES
#pragma GCC push_options
#pragma GCC target("arch=x86-64-v4,avx512bf16")
#define BFLOAT16_UNITS
namespace avx512_bf16 {
constexpr int LANES = 16;
constexpr bool UNITS = true;
#include TILES
}  // namespace avx512_bf16
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("arch=x86-64-v4,avx512bf16,amx-tile,amx-bf16")
#define MATRIX_UNITS
namespace amx {
constexpr int LANES = 16;
constexpr bool UNITS = true;
#include TILES
}  // namespace amx
#pragma GCC pop_options
#endif
#endif
