// AVX-512 with products of pairs of bfloat16, two of them in one instruction. Sums in the same tiles as for AVX-512.
#include <immintrin.h>

#include <cstdint>

namespace {

constexpr int kLanes = 16, kRows = 4, kVectors = 4;

typedef float Numbers __attribute__((vector_size(64)));
typedef std::uint32_t Pairs __attribute__((vector_size(64)));

inline Numbers pair_product(Numbers sum, std::uint32_t a, Pairs x) {
  return (Numbers)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_epi32(static_cast<int>(a)), (__m512bh)x);
}

// 32 numbers, rounded to nearest, as 16 pairs.
inline Pairs successive(Numbers first, Numbers second) { return (Pairs)_mm512_cvtne2ps_pbh((__m512)second, (__m512)first); }

inline Pairs rounded(Numbers x) { return (Pairs)_mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh((__m512)x)); }

// 16 pairs of a number of each.
inline Pairs side_by_side(Numbers first, Numbers second) { return rounded(first) | rounded(second) << 16; }

}  // namespace

#define ALIT_PAIRS
#include "block_loops.h"

const alit::attention::Blocks<alit::attention::Pair> alit::attention::blocks_avx512_bf16 = {kPanel, forward, backward};
