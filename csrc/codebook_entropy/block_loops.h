// Body of block.h, included by one file for each instruction set, which defines kLanes (float32 in a vector).
//
// Everything here has internal linkage and no inline function of the standard library is called: one compiled for AVX-512
// must not be the copy that the linker keeps for all.

#include <cstdint>

#include "block.h"

namespace {

using alit::entropy::Codes;
using alit::entropy::kPanel;
using alit::entropy::kRows;
using alit::entropy::Slopes;
using std::int64_t;

typedef float F __attribute__((vector_size(kLanes * sizeof(float))));
typedef std::uint32_t I __attribute__((vector_size(kLanes * sizeof(float))));

constexpr int64_t kVectors = 2;    // of scores at a time; a panel is a multiple
constexpr int64_t kSummed = 1024;  // codes that a vector sums in float32, before sums go on in float64

template <typename T>
inline T read(const void* p) {
  T x;
  __builtin_memcpy(&x, p, sizeof x);
  return x;
}

inline F load(const float* p) { return read<F>(p); }

inline void store(float* p, F x) { __builtin_memcpy(p, &x, sizeof x); }

#include "../exponential.h"

inline float sum_of(F x) {
  float result = x[0];
  for (int l = 1; l < kLanes; ++l) result += x[l];
  return result;
}

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// kRows rows; missing ones are the last one again.
struct Few {
  Few(const float* rows, int64_t count, int64_t dim) {
    for (int64_t r = 0; r < kRows; ++r) row[r] = rows + smaller(r, count - 1) * dim;
  }
  const float* row[kRows];
};

inline void multiply(const Few& rows, const float* panel, int64_t dim, float* scores, int64_t pitch) {
  for (int64_t c = 0; c < kPanel; c += kVectors * kLanes) {
    F sums[kRows][kVectors] = {};
    for (int64_t d = 0; d < dim; ++d) {
      for (int64_t v = 0; v < kVectors; ++v) {
        const F code = load(panel + d * kPanel + c + v * kLanes);
        for (int64_t r = 0; r < kRows; ++r) sums[r][v] += rows.row[r][d] * code;
      }
    }
    for (int64_t r = 0; r < kRows; ++r)
      for (int64_t v = 0; v < kVectors; ++v) store(scores + r * pitch + c + v * kLanes, sums[r][v]);
  }
}

inline void multiply_all(const Few& rows, const Codes& codes, float* scores) {
  for (int64_t g = 0; g < codes.count; ++g)
    multiply(rows, codes.panels + g * codes.dim * kPanel, codes.dim, scores + g * kPanel, codes.codes());
}

inline float largest_of(const float* x, int64_t count) {
  F most = load(x);
  for (int64_t k = kLanes; k < count; k += kLanes) most = load(x + k) > most ? load(x + k) : most;
  float result = most[0];
  for (int l = 1; l < kLanes; ++l) result = most[l] > result ? most[l] : result;
  return result;
}

void forward(const Codes& codes, const float* rows, int64_t count, float* scores, float* largest, float* sum,
             float* entropy, float* mean) {
  const int64_t all = codes.codes();
  multiply_all(Few(rows, count, codes.dim), codes, scores);
  float inverse[kRows];
  for (int64_t r = 0; r < count; ++r) {
    float* row = scores + r * all;
    const float most = largest_of(row, all);
    double total = 0, weighted = 0;
    for (int64_t first = 0; first < all; first += kSummed) {
      F sum_e = {}, sum_ex = {};
      for (int64_t k = first; k < smaller(first + kSummed, all); k += kLanes) {
        const F x = load(row + k) - most, e = exponential(x);
        store(row + k, e);
        sum_e += e;
        sum_ex += e == 0.0f ? F{} : e * x;
      }
      total += sum_of(sum_e);
      weighted += sum_of(sum_ex);
    }
    largest[r] = most;
    sum[r] = static_cast<float>(total);
    entropy[r] = static_cast<float>(__builtin_log(total) - weighted / total);
    inverse[r] = static_cast<float>(1 / total);
  }
  for (int64_t k = 0; k < all; k += kLanes) {
    F p = load(mean + k);
    for (int64_t r = 0; r < count; ++r) p += load(scores + r * all + k) * inverse[r];
    store(mean + k, p);
  }
}

inline F grad_of(F x, F p, F slope, const Slopes& slopes, float constant) {
  return p == 0.0f ? F{} : p * (slopes.sample * x + slopes.batch * slope + constant);
}

void grad_rows(const Codes& codes, const float* rows, int64_t count, const Slopes& slopes, const float* largest,
               const float* sum, const float* entropy, float* scores, float* inverse, float* constant, float* grad) {
  const int64_t all = codes.codes();
  float* const p_of = scores + kRows * all;
  multiply_all(Few(rows, count, codes.dim), codes, scores);
  for (int64_t r = 0; r < count; ++r) {
    float* row = scores + r * all;
    inverse[r] = 1 / sum[r];
    double mean = 0;
    for (int64_t first = 0; first < all; first += kSummed) {
      F sum_p = {};
      for (int64_t k = first; k < smaller(first + kSummed, all); k += kLanes) {
        const F x = load(row + k) - largest[r], p = exponential(x) * inverse[r];
        store(row + k, x);
        store(p_of + k, p);
        sum_p += p * load(slopes.of_code + k);
      }
      mean += sum_of(sum_p);
    }
    constant[r] = static_cast<float>(slopes.sample * (entropy[r] - __builtin_log(sum[r])) - slopes.batch * mean);
    if (grad == nullptr) continue;
    double rest = 0;
    for (int64_t first = 0; first < all; first += kSummed) {
      F sum_grad = {};
      for (int64_t k = first; k < smaller(first + kSummed, all); k += kLanes) {
        const F g = grad_of(load(row + k), load(p_of + k), load(slopes.of_code + k), slopes, constant[r]);
        store(row + k, g);
        sum_grad += g;
      }
      rest += sum_of(sum_grad);
    }
    grad[r * codes.dim + codes.dim - 1] = static_cast<float>(rest);
  }
  if (grad == nullptr) return;
  const int64_t dim = codes.dim - 1;
  for (int64_t d = 0; d < dim; d += 2) {  // two coordinates: of an odd number the last one twice
    const int64_t other = smaller(d + 1, dim - 1);
    double totals[kRows][2] = {};
    for (int64_t first = 0; first < all; first += kSummed) {
      F sums[kRows][2] = {};
      for (int64_t k = first; k < smaller(first + kSummed, all); k += kLanes) {
        const float* code = codes.panels + k / kPanel * kPanel * codes.dim + k % kPanel;
        const F a = load(code + d * kPanel), b = load(code + other * kPanel);
        for (int64_t r = 0; r < kRows; ++r) {
          const F slope = load(scores + r * all + k);
          sums[r][0] += slope * a;
          sums[r][1] += slope * b;
        }
      }
      for (int64_t r = 0; r < kRows; ++r)
        for (int64_t i = 0; i < 2; ++i) totals[r][i] += sum_of(sums[r][i]);
    }
    for (int64_t r = 0; r < count; ++r) {
      grad[r * codes.dim + d] = static_cast<float>(totals[r][0]);
      grad[r * codes.dim + other] = static_cast<float>(totals[r][other - d]);
    }
  }
}

void grad_codes(const Codes& codes, int64_t panel, const float* rows, int64_t count, const Slopes& slopes,
                const float* largest, const float* inverse, const float* constant, float* grad) {
  float scores[kRows * kPanel];
  const Few few(rows, count, codes.dim);
  multiply(few, codes.panels + panel * codes.dim * kPanel, codes.dim, scores, kPanel);
  for (int64_t k = 0; k < kPanel; k += kLanes) {
    F of_row[kRows] = {};
    const F slope = load(slopes.of_code + panel * kPanel + k);
    for (int64_t r = 0; r < count; ++r) {
      const F x = load(scores + r * kPanel + k) - largest[r];
      of_row[r] = grad_of(x, exponential(x) * inverse[r], slope, slopes, constant[r]);
    }
    for (int64_t d = 0; d < codes.dim; ++d) {
      F sum = load(grad + d * kPanel + k);
      for (int64_t r = 0; r < kRows; ++r) sum += few.row[r][d] * of_row[r];
      store(grad + d * kPanel + k, sum);
    }
  }
}

}  // namespace
