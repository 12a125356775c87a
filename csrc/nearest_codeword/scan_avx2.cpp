// AVX2 with FMA: 2 vectors of 8 queries by 4 codes are 8 sums, 2 queries, a code and perhaps a difference of 16 registers.
#include <immintrin.h>

#include <cstdint>

namespace {

struct Simd {
  using F = __m256;
  using I = __m256i;
  static constexpr int lanes = 8, vectors = 2, codes = 4;
  static F load(const float* p) { return _mm256_loadu_ps(p); }
  static void store(float* p, F x) { _mm256_storeu_ps(p, x); }
  static void store(std::int32_t* p, I x) { _mm256_storeu_si256(reinterpret_cast<I*>(p), x); }
  static F broadcast(float x) { return _mm256_set1_ps(x); }
  static I broadcast(std::int32_t x) { return _mm256_set1_epi32(x); }
  static F subtract(F a, F b) { return _mm256_sub_ps(a, b); }
  static F add_square(F x, F sum) { return _mm256_fmadd_ps(x, x, sum); }
  static F subtract_product(F a, F b, F sum) { return _mm256_fnmadd_ps(a, b, sum); }
  static F min(F a, F b) { return _mm256_min_ps(a, b); }
  static F max(F a, F b) { return _mm256_max_ps(a, b); }
  static I where_less(F a, F b, I yes, I no) {
    const F less = _mm256_cmp_ps(a, b, _CMP_LT_OQ);
    return _mm256_castps_si256(_mm256_blendv_ps(_mm256_castsi256_ps(no), _mm256_castsi256_ps(yes), less));
  }
  static std::uint32_t lanes_not_above(F a, F b) {
    return static_cast<std::uint32_t>(_mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_LE_OQ)));
  }
};

}  // namespace

#include "scan_loops.h"

const alit::Scan alit::scan_avx2 = kScan;
