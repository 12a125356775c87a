#include "search.h"

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <limits>
#include <stdexcept>
#include <vector>

#include "../parallel.h"
#include "scan.h"

namespace alit {

namespace {

// Below this distance the squares of single differences may have underflowed.
constexpr float kLeastCertain = 0x1p-100f;
// From here on a group of codes is too much to look through once more for each vector.
constexpr std::int64_t kManyDimensions = 48;

const Scan& scan_for(InstructionSet set) {
#if defined(__x86_64__)
  if (set == InstructionSet::avx512) return scan_avx512;
  if (set == InstructionSet::avx2) return scan_avx2;
#endif
  (void)set;
  return scan_baseline;
}

template <typename T>
bool all_finite(const T* row, std::int64_t dim) {
  std::uint32_t largest = 0;
  for (std::int64_t d = 0; d < dim; ++d) largest = std::max(largest, to_bits(load(row[d])) & 0x7fffffffu);
  return largest < 0x7f800000u;
}

// The codebook in groups, times a power of two that keeps squares of ordinary distances within the range of float32.
struct PackedCodes {
  std::vector<float> values;
  std::int64_t groups;
  float scale = 1.0f;

  template <typename T>
  PackedCodes(const Rows& codebook, T) : groups((codebook.count + kGroup - 1) / kGroup) {
    const std::int64_t dim = codebook.dim;
    std::vector<char> usable(static_cast<std::size_t>(codebook.count));
    float largest = 0.0f;
    for (std::int64_t k = 0; k < codebook.count; ++k) {
      const T* row = codebook.row<T>(k);
      usable[k] = all_finite(row, dim);
      if (!usable[k]) continue;
      for (std::int64_t d = 0; d < dim; ++d) largest = std::max(largest, std::fabs(load(row[d])));
    }
    if (largest > 0.0f && (largest > 0x1p40f || largest < 0x1p-40f)) {
      scale = std::ldexp(1.0f, -std::max(std::min(std::ilogb(largest), 126), -126));
    }
    // Codes that are not finite, and those that fill the last group, are infinitely far from every finite vector.
    values.assign(static_cast<std::size_t>(groups * kGroup * dim), 0.0f);
    for (std::int64_t k = 0; k < groups * kGroup; ++k) {
      float* out = values.data() + (k / kGroup) * dim * kGroup + k % kGroup;
      if (k >= codebook.count || !usable[k]) {
        out[0] = FLT_MAX;
        continue;
      }
      const T* row = codebook.row<T>(k);
      for (std::int64_t d = 0; d < dim; ++d) out[d * kGroup] = load(row[d]) * scale;
    }
  }
};

template <typename T>
class Searcher {
 public:
  Searcher(const Rows& z, const Rows& codebook, const PackedCodes& codes, const Scan& scan, std::int64_t* index)
      : z_(z),
        codebook_(codebook),
        codes_(codes),
        scan_(scan),
        index_(index),
        pitch_(((z.dim + 15) / 16 | 1) * 16),
        vectors_(static_cast<std::size_t>(scan.width * pitch_)),
        queries_(static_cast<std::size_t>(scan.width * z.dim)),
        best_(scan.width),
        second_(scan.width),
        limit_(scan.width),
        distance_(scan.width),
        place_(scan.width) {
    rows_.reserve(scan.width);
  }

  // Takes a row into the block; searches the block when it is full.
  void add(std::int64_t row) {
    if (!all_finite(z_.row<T>(row), z_.dim)) {
      index_[row] = exhaustive(row);
      return;
    }
    const T* values = z_.row<T>(row);
    float* out = vectors_.data() + rows_.size() * pitch_;
    for (std::int64_t d = 0; d < z_.dim; ++d) out[d] = load(values[d]) * codes_.scale;
    rows_.push_back(row);
    if (static_cast<int>(rows_.size()) == scan_.width) flush();
  }

  void flush() {
    if (rows_.empty()) return;
    transpose();
    const bool by_code = z_.dim >= kManyDimensions;
    const Scan::Nearest nearest = by_code ? scan_.nearest_code : scan_.nearest_group;
    nearest(queries_.data(), codes_.values.data(), codes_.groups, z_.dim, best_.data(), second_.data(), place_.data());
    // A computed distance is within (dim + 2) 2^-24 of the true one: codes beyond this ratio are certainly farther.
    const double ratio = 1.0 + 2.02 * static_cast<double>(z_.dim + 2) * 0x1p-24;
    const int count = static_cast<int>(rows_.size());
    std::uint32_t contested_vectors = 0;  // those with a query that may have another nearest code
    for (int i = 0; i < scan_.width; ++i) {
      const double limit = best_[i] * ratio;
      const bool contested = i < count && second_[i] <= limit && best_[i] < FLT_MAX;
      limit_[i] = contested ? std::nextafter(static_cast<float>(limit), INFINITY) : -1.0f;
      contested_vectors |= static_cast<std::uint32_t>(contested) << (i / scan_.lanes);
      if (i >= count) continue;
      if (by_code) {
        index_[rows_[i]] = place_[i];
      } else {
        distance_[i] = INFINITY;
        consider(i, place_[i]);
      }
    }
    for (int first = 0; first < count; first += scan_.lanes) {
      if (contested_vectors >> (first / scan_.lanes) & 1u) recheck(first);
    }
    for (int i = 0; i < count; ++i) {
      // Overflow, underflow, or codes that are not finite: nothing computed in float32 counts.
      const bool certain = best_[i] <= FLT_MAX && (best_[i] >= kLeastCertain || equal(rows_[i], index_[rows_[i]]));
      if (!certain) index_[rows_[i]] = exhaustive(rows_[i]);
    }
    rows_.clear();
  }

 private:
  void transpose() {
    const std::int64_t dim = z_.dim, width = scan_.width;
    for (std::int64_t d = 0; d < dim; ++d) {
      const float* from = vectors_.data() + d;
      float* to = queries_.data() + d * width;
      for (std::int64_t i = 0; i < width; ++i) to[i] = from[i * pitch_];
    }
  }

  // Compares the codes of a group with query i of the block in float64; keeps the first of equals.
  void consider(int i, std::int64_t group) {
    double sum[kGroup];
    scan_.exact(vectors_.data() + i * pitch_, codes_.values.data() + group * z_.dim * kGroup, z_.dim, sum);
    int least = 0;
    for (int c = 1; c < kGroup; ++c) least = sum[c] < sum[least] ? c : least;
    if (sum[least] < distance_[i]) {
      distance_[i] = sum[least];
      index_[rows_[i]] = group * kGroup + least;
    }
  }

  // Looks again at every group within the limits of the queries from `first` on, in order of the codes.
  void recheck(int first) {
    struct Context {
      Searcher* self;
      int first;
    } context{this, first};
    for (int i = first; i < first + scan_.lanes; ++i) {
      if (limit_[i] >= 0.0f) distance_[i] = INFINITY;
    }
    const auto visit = [](void* opaque, std::int64_t group, std::uint32_t lanes) {
      const auto* here = static_cast<Context*>(opaque);
      for (int lane = 0; lanes; ++lane, lanes >>= 1) {
        if (lanes & 1u) here->self->consider(here->first + lane, group);
      }
    };
    scan_.within(queries_.data() + first, codes_.values.data(), codes_.groups, z_.dim, limit_.data() + first, visit,
                 &context);
  }

  bool equal(std::int64_t row, std::int64_t code) const {
    const T *a = z_.row<T>(row), *b = codebook_.row<T>(code);
    return std::equal(a, a + z_.dim, b, [](T x, T y) { return load(x) == load(y); });
  }

  // The definition: every code in float64.
  std::int64_t exhaustive(std::int64_t row) const {
    const T* a = z_.row<T>(row);
    double least = NAN;
    std::int64_t nearest = 0;
    for (std::int64_t k = 0; k < codebook_.count; ++k) {
      const T* b = codebook_.row<T>(k);
      double sum = 0.0;
      for (std::int64_t d = 0; d < z_.dim; ++d) {
        const double difference = static_cast<double>(load(a[d])) - static_cast<double>(load(b[d]));
        sum += difference * difference;
      }
      if (sum < least || (std::isnan(least) && !std::isnan(sum))) {
        least = sum;
        nearest = k;
      }
    }
    return nearest;
  }

  const Rows &z_, &codebook_;
  const PackedCodes& codes_;
  const Scan& scan_;
  std::int64_t* index_;
  std::int64_t pitch_;  // an odd number of cache lines, so that a column does not fall into a few sets of the cache
  std::vector<float> vectors_, queries_;  // the block, scaled: as rows, and transposed
  std::vector<float> best_, second_, limit_;
  std::vector<double> distance_;
  std::vector<std::int32_t> place_;
  std::vector<std::int64_t> rows_;
};

}  // namespace

void nearest_codeword(const Rows& z, const Rows& codebook, const bool* mask, std::int64_t* index, int threads,
                      InstructionSet set) {
  if (z.type != codebook.type || z.dim != codebook.dim) throw std::invalid_argument("codebook: type or dim unlike z");
  if (codebook.count < 1) throw std::invalid_argument("codebook: no rows");
  const Scan& scan = scan_for(set);
  dispatch(z.type, [&](auto element) {
    using T = decltype(element);
    const PackedCodes codes(codebook, element);
    const std::int64_t blocks = (z.count + scan.width - 1) / scan.width;
    parallel_for(blocks, 1, threads, [&](std::int64_t begin, std::int64_t end) {
      Searcher<T> searcher(z, codebook, codes, scan, index);
      for (std::int64_t row = begin * scan.width; row < std::min(end * scan.width, z.count); ++row) {
        if (mask != nullptr && !mask[row]) {
          index[row] = 0;
        } else {
          searcher.add(row);
        }
      }
      searcher.flush();
    });
  });
}

}  // namespace alit
