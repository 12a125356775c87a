// Any processor: vectors of 4 in the compiler's own notation, which SSE2 and NEON both have.
#include <cstdint>

namespace {

struct Simd {
  typedef float F __attribute__((vector_size(16)));
  typedef std::int32_t I __attribute__((vector_size(16)));
  static constexpr int lanes = 4, vectors = 2, codes = 4;
  static F load(const float* p) {
    F x;
    __builtin_memcpy(&x, p, sizeof x);
    return x;
  }
  static void store(float* p, F x) { __builtin_memcpy(p, &x, sizeof x); }
  static void store(std::int32_t* p, I x) { __builtin_memcpy(p, &x, sizeof x); }
  static F broadcast(float x) { return F{x, x, x, x}; }
  static I broadcast(std::int32_t x) { return I{x, x, x, x}; }
  static F subtract(F a, F b) { return a - b; }
  static F add_square(F x, F sum) { return sum + x * x; }
  static F subtract_product(F a, F b, F sum) { return sum - a * b; }
  static F min(F a, F b) { return a < b ? a : b; }
  static F max(F a, F b) { return a > b ? a : b; }
  static I where_less(F a, F b, I yes, I no) { return a < b ? yes : no; }
  static std::uint32_t lanes_not_above(F a, F b) {
    const I le = a <= b;
    return (le[0] & 1u) | (le[1] & 2u) | (le[2] & 4u) | (le[3] & 8u);
  }
};

}  // namespace

#include "scan_loops.h"

const alit::Scan alit::scan_baseline = kScan;
