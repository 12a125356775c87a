// AVX-512: 3 vectors of 16 queries by 8 codes are 24 sums, 3 queries and a code of 32 registers.
#include <immintrin.h>

#include <cstdint>

namespace {

struct Simd {
  using F = __m512;
  using I = __m512i;
  static constexpr int lanes = 16, vectors = 3, codes = 8;
  static F load(const float* p) { return _mm512_loadu_ps(p); }
  static void store(float* p, F x) { _mm512_storeu_ps(p, x); }
  static void store(std::int32_t* p, I x) { _mm512_storeu_si512(p, x); }
  static F broadcast(float x) { return _mm512_set1_ps(x); }
  static I broadcast(std::int32_t x) { return _mm512_set1_epi32(x); }
  static F subtract(F a, F b) { return _mm512_sub_ps(a, b); }
  static F add_square(F x, F sum) { return _mm512_fmadd_ps(x, x, sum); }
  static F subtract_product(F a, F b, F sum) { return _mm512_fnmadd_ps(a, b, sum); }
  static F min(F a, F b) { return _mm512_min_ps(a, b); }
  static F max(F a, F b) { return _mm512_max_ps(a, b); }
  static I where_less(F a, F b, I yes, I no) {
    return _mm512_mask_mov_epi32(no, _mm512_cmp_ps_mask(a, b, _CMP_LT_OQ), yes);
  }
  static std::uint32_t lanes_not_above(F a, F b) { return _mm512_cmp_ps_mask(a, b, _CMP_LE_OQ); }
};

}  // namespace

#include "scan_loops.h"

const alit::Scan alit::scan_avx512 = kScan;
