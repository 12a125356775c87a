// A few rows against the codes, once for each instruction set: the inner functions of entropy.cpp.
//
// Rows (count, dim) are contiguous; scores are plain products of rows and codes. Codes come in panels: coordinate d of code
// c of panel g lies at panels[(g * dim + d) * kPanel + c]. A score may be -infinity: its probability is 0, as are then its
// terms of sums.
#pragma once

#include <cstdint>

namespace alit::entropy {

constexpr std::int64_t kPanel = 32;  // codes in a panel
constexpr std::int64_t kRows = 4;    // rows at a time, the most that functions below take

struct Codes {
  const float* panels;
  std::int64_t count, dim;  // panels, coordinates

  std::int64_t codes() const { return count * kPanel; }
};

// Gradient of a score: p (sample * x + batch * slope + constant), with x the score less the largest of its row, p =
// exp(x) * inverse, and slope (count * kPanel) of the code.
struct Slopes {
  float sample, batch;
  const float* of_code;
};

struct Blocks {
  // Scores take kRows * codes() floats. Adds each row's distribution to mean (codes()).
  void (*forward)(const Codes& codes, const float* rows, std::int64_t count, float* scores, float* largest, float* sum,
                  float* entropy, float* mean);
  // Scores take (kRows + 1) * codes() floats. Gives inverse and constant of each row from its largest score, sum and
  // entropy, and where grad (count, dim) is not null, the product of the scores' gradients and the codes; in place of the
  // last coordinate the sum of the scores' gradients, 0 but for rounding.
  void (*grad_rows)(const Codes& codes, const float* rows, std::int64_t count, const Slopes& slopes, const float* largest,
                    const float* sum, const float* entropy, float* scores, float* inverse, float* constant, float* grad);
  // Adds to grad (dim, kPanel) the product of a panel's scores' gradients and the rows.
  void (*grad_codes)(const Codes& codes, std::int64_t panel, const float* rows, std::int64_t count, const Slopes& slopes,
                     const float* largest, const float* inverse, const float* constant, float* grad);
};

extern const Blocks blocks_baseline;
#ifdef ALIT_X86
extern const Blocks blocks_avx2, blocks_avx512;
#endif

}  // namespace alit::entropy
