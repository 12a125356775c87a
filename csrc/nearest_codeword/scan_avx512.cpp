// AVX-512: 3 vectors of 16 queries by 4 codes are 12 sums, 3 queries and a code: half of the 32 registers.
#include <immintrin.h>

#include <cstdint>

namespace {

struct Simd {
  using F = __m512;
  using I = __m512i;
  static constexpr int lanes = 16, vectors = 3;
  static F load(const float* p) { return _mm512_loadu_ps(p); }
  static void store(float* p, F x) { _mm512_storeu_ps(p, x); }
  static void store(std::int32_t* p, I x) { _mm512_storeu_si512(p, x); }
  static F broadcast(float x) { return _mm512_set1_ps(x); }
  static I broadcast(std::int32_t x) { return _mm512_set1_epi32(x); }
  // Three of four codes stay in memory: where a broadcast into 512 bits takes an arithmetic unit, four of them cost as much
  // as four subtractions; where two loads a cycle are the limit, none at all would be bound by loads. The compiler would
  // make one register of them, hence the assembly.
  struct Code {
    const float* memory;
    F value;
  };
  static Code code(const float* p, int c) { return c < 3 ? Code{p + c, F{}} : Code{nullptr, broadcast(p[c])}; }
  static F subtract(F a, const Code& b) {
    if (b.memory == nullptr) return _mm512_sub_ps(a, b.value);
    F difference;
    asm("vsubps %2%{1to16%}, %1, %0" : "=v"(difference) : "v"(a), "m"(*b.memory));
    return difference;
  }
  static F add_square(F x, F sum) { return _mm512_fmadd_ps(x, x, sum); }
  static F min(F a, F b) { return _mm512_min_ps(a, b); }
  static F max(F a, F b) { return _mm512_max_ps(a, b); }
  static I where_less(F a, F b, I yes, I no) {
    return _mm512_mask_mov_epi32(no, _mm512_cmp_ps_mask(a, b, _CMP_LT_OQ), yes);
  }
  static std::uint32_t lanes_not_above(F a, F b) { return _mm512_cmp_ps_mask(a, b, _CMP_LE_OQ); }
};

}  // namespace

#include "scan_loops.h"

const alit::Scan alit::scan_avx512 = {Simd::lanes, kWidth, nearest<false>, nearest<true>, within, exact};
