#include "entropy.h"

#include <algorithm>
#include <memory>
#include <vector>

#include "../parallel.h"

namespace alit::entropy {

namespace {

using std::int64_t;

// Pieces of the rows, each with its sum of distributions: results do not depend on the thread count.
constexpr int64_t kPieces = 32;
// Rows whose share of a code's gradient is summed by itself, so that sums over many rows stay exact.
constexpr int64_t kSummedRows = 256;

const Blocks& blocks(InstructionSet set) {
#ifdef ALIT_X86
  if (set >= InstructionSet::avx512) return blocks_avx512;
  if (set == InstructionSet::avx2) return blocks_avx2;
#endif
  (void)set;
  return blocks_baseline;
}

std::unique_ptr<float[]> uninitialized(int64_t count) { return std::unique_ptr<float[]>(new float[count]); }

}  // namespace

void forward(const Codes& codes, const float* rows, int64_t count, float* largest, float* sum, float* entropy,
             float* total, int threads, InstructionSet set) {
  const int64_t all = codes.codes();
  const int64_t height = std::max(kRows, (count + kPieces - 1) / kPieces), pieces = (count + height - 1) / height;
  std::vector<float> totals(pieces * all);
  parallel_for(pieces, 1, threads, [&](int64_t begin, int64_t end) {
    const auto scores = uninitialized(kRows * all);
    for (int64_t piece = begin; piece < end; ++piece) {
      const int64_t behind = std::min(count, (piece + 1) * height);
      for (int64_t i = piece * height; i < behind; i += kRows)
        blocks(set).forward(codes, rows + i * codes.dim, std::min(kRows, behind - i), scores.get(), largest + i, sum + i,
                            entropy + i, totals.data() + piece * all);
    }
  });
  std::fill(total, total + all, 0.0f);
  for (int64_t piece = 0; piece < pieces; ++piece)
    for (int64_t k = 0; k < all; ++k) total[k] += totals[piece * all + k];
}

void backward(const Codes& codes, const float* rows, int64_t count, const Slopes& slopes, const float* largest,
              const float* sum, const float* entropy, float* grad_rows, float* grad_panels, int threads,
              InstructionSet set) {
  const auto inverse = uninitialized(count), constant = uninitialized(count);
  parallel_for((count + kRows - 1) / kRows, 1, threads, [&](int64_t begin, int64_t end) {
    const auto scores = uninitialized((kRows + 1) * codes.codes());
    for (int64_t i = begin * kRows; i < std::min(count, end * kRows); i += kRows)
      blocks(set).grad_rows(codes, rows + i * codes.dim, std::min(kRows, count - i), slopes, largest + i, sum + i,
                            entropy + i, scores.get(), inverse.get() + i, constant.get() + i,
                            grad_rows == nullptr ? nullptr : grad_rows + i * codes.dim);
  });
  if (grad_panels == nullptr) return;
  const int64_t size = codes.dim * kPanel;
  parallel_for(codes.count, 1, threads, [&](int64_t begin, int64_t end) {
    std::vector<float> part(size);
    for (int64_t panel = begin; panel < end; ++panel) {
      float* grad = grad_panels + panel * size;
      std::fill(grad, grad + size, 0.0f);
      for (int64_t first = 0; first < count; first += kSummedRows) {
        std::fill(part.begin(), part.end(), 0.0f);
        for (int64_t i = first; i < std::min(count, first + kSummedRows); i += kRows)
          blocks(set).grad_codes(codes, panel, rows + i * codes.dim, std::min(kRows, count - i), slopes, largest + i,
                                 inverse.get() + i, constant.get() + i, part.data());
        for (int64_t j = 0; j < size; ++j) grad[j] += part[j];
      }
    }
  });
}

}  // namespace alit::entropy
