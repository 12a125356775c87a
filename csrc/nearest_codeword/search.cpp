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
// From this dimension on a group of codes is too much to look through once more for each vector.
constexpr std::int64_t kManyDimensions = 48;
// Products are tried while at most one in so many queries must be searched again.
constexpr std::int64_t kDoubtful = 4;

const Scan& scan_for(InstructionSet set) {
#ifdef ALIT_X86
  if (set >= InstructionSet::avx512) return scan_avx512;
  if (set == InstructionSet::avx2) return scan_avx2;
#endif
  (void)set;
  return scan_baseline;
}

template <typename T>
bool all_finite(const T* row, std::int64_t dim) {
  std::int32_t largest = 0;
  for (std::int64_t d = 0; d < dim; ++d) {
    largest = std::max(largest, static_cast<std::int32_t>(to_bits(load(row[d])) & 0x7fffffffu));
  }
  return largest < 0x7f800000;
}

// The codebook in groups, times a power of two that keeps squares of ordinary distances within the range of float32.
struct PackedCodes {
  std::vector<float> values, zeros, halves;  // the latter: what sums start from, see scan.h
  std::int64_t groups, dim;
  float scale = 1.0f;
  double radius = 0.0;  // of the longest code

  template <typename T>
  PackedCodes(const Rows& codebook, T) : groups((codebook.count + kGroup - 1) / kGroup), dim(codebook.dim) {
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
    zeros.assign(static_cast<std::size_t>(groups * kGroup), INFINITY);
    halves = zeros;
    for (std::int64_t k = 0; k < codebook.count; ++k) {
      if (!usable[k]) continue;
      float* out = values.data() + (k / kGroup) * dim * kGroup + k % kGroup;
      const T* row = codebook.row<T>(k);
      double square = 0.0;
      for (std::int64_t d = 0; d < dim; ++d) {
        const float value = load(row[d]) * scale;
        out[d * kGroup] = value;
        square += static_cast<double>(value) * value;
      }
      zeros[k] = 0.0f;
      halves[k] = static_cast<float>(0.5 * square);
      radius = std::max(radius, std::sqrt(square));
    }
  }

  Codes for_differences() const { return {values.data(), zeros.data(), groups, dim}; }
  Codes for_products() const { return {values.data(), halves.data(), groups, dim}; }
};

// Queries that are searched together, and the results of a scan of them.
struct Block {
  std::int64_t dim, width, pitch;
  std::vector<float> vectors, queries;  // scaled: as rows, and transposed
  std::vector<float> best, second, square;
  std::vector<std::int32_t> place;
  std::vector<double> distance;
  std::vector<std::int64_t> rows;

  Block(std::int64_t dim, std::int64_t width)
      : dim(dim),
        width(width),
        pitch(((dim + 15) / 16 | 1) * 16),  // an odd number of cache lines: a column does not fall into few cache sets
        vectors(static_cast<std::size_t>(width * pitch)),
        queries(static_cast<std::size_t>(width * dim)),
        best(width),
        second(width),
        square(width),
        place(width),
        distance(width) {
    rows.reserve(width);
  }

  int count() const { return static_cast<int>(rows.size()); }
  bool full() const { return count() == width; }
  const float* vector(int i) const { return vectors.data() + i * pitch; }

  // Takes a row; returns where its vector is to be written.
  float* add(std::int64_t row) {
    rows.push_back(row);
    return vectors.data() + (count() - 1) * pitch;
  }

  void scan(Scan::Nearest nearest, const Codes& codes) {
    for (std::int64_t d = 0; d < dim; ++d) {
      const float* from = vectors.data() + d;
      float* to = queries.data() + d * width;
      for (std::int64_t i = 0; i < width; ++i) to[i] = from[i * pitch];
    }
    nearest(queries.data(), codes, {best.data(), second.data(), square.data(), place.data()});
  }
};

// Search in two steps. Products, which cost half, decide those queries that their rounding leaves in no doubt. The rest
// is gathered and searched by differences. Either way the index has the least distance in float64 by differences.
template <typename T>
class Searcher {
 public:
  Searcher(const Rows& z, const Rows& codebook, const PackedCodes& codes, const Scan& scan, std::int64_t* index)
      : z_(z),
        codebook_(codebook),
        codes_(codes),
        scan_(scan),
        index_(index),
        by_code_(z.dim >= kManyDimensions),
        fresh_(z.dim, scan.width),
        doubtful_(z.dim, scan.width),
        limit_(scan.width) {}

  // Takes a row into a block; searches the block when it is full.
  void add(std::int64_t row) {
    const T* values = z_.row<T>(row);
    if (!all_finite(values, z_.dim)) {
      const bool no_number = std::any_of(values, values + z_.dim, [](T x) { return std::isnan(load(x)); });
      index_[row] = no_number ? 0 : exhaustive(row);  // every distance is NaN: the first of equals
      return;
    }
    ++taken_;
    const bool by_products = kDoubtful * doubted_ <= taken_;  // else most would be searched twice
    Block& block = by_products ? fresh_ : doubtful_;
    float* out = block.add(row);
    for (std::int64_t d = 0; d < z_.dim; ++d) out[d] = load(values[d]) * codes_.scale;
    if (block.full()) by_products ? search_by_products() : search_by_differences();
  }

  void flush() {
    search_by_products();
    search_by_differences();
  }

 private:
  void search_by_products() {
    if (fresh_.rows.empty()) return;
    fresh_.scan(by_code_ ? scan_.products.code : scan_.products.group, codes_.for_products());
    for (int i = 0; i < fresh_.count(); ++i) {
      if (beyond_doubt(i)) continue;
      ++doubted_;
      std::copy_n(fresh_.vector(i), z_.dim, doubtful_.add(fresh_.rows[i]));
      if (doubtful_.full()) search_by_differences();
    }
    fresh_.rows.clear();
  }

  // Sets the index of query i of the block searched by products, unless another code may be as near.
  bool beyond_doubt(int i) {
    // Errors of products (scan.h), and of differences in float64; 1.02 covers the rounding of the norms.
    const double radius = codes_.radius, norm = std::sqrt(static_cast<double>(fresh_.square[i]));
    const double magnitude = 0.5 * radius * radius + norm * radius;
    const double rounding = static_cast<double>(z_.dim + 2);
    const double error = 1.02 * rounding * 0x1p-24 * magnitude * (1.0 + rounding * 0x1p-24) +
                         rounding * 0x1p-50 * (norm * norm + radius * radius);
    const double gap = static_cast<double>(fresh_.second[i]) - static_cast<double>(fresh_.best[i]);
    if (!(gap > 2.0 * error)) return false;  // also where something overflows: the square of the norm did so first
    if (by_code_) {
      index_[fresh_.rows[i]] = fresh_.place[i];
      return true;
    }
    fresh_.distance[i] = INFINITY;
    consider(fresh_, i, fresh_.place[i]);
    return fresh_.distance[i] >= kLeastCertain || equal(fresh_.rows[i], index_[fresh_.rows[i]]);
  }

  void search_by_differences() {
    Block& block = doubtful_;
    if (block.rows.empty()) return;
    block.scan(by_code_ ? scan_.differences.code : scan_.differences.group, codes_.for_differences());
    // A computed distance is within (dim + 2) 2^-24 of the true one: codes beyond this ratio are certainly farther.
    const double ratio = 1.0 + 2.02 * static_cast<double>(z_.dim + 2) * 0x1p-24;
    std::uint32_t contested_vectors = 0;  // those with a query that may have another nearest code
    for (int i = 0; i < scan_.width; ++i) {
      const double limit = block.best[i] * ratio;
      const bool contested = i < block.count() && block.second[i] <= limit && block.best[i] < FLT_MAX;
      limit_[i] = contested ? std::nextafter(static_cast<float>(limit), INFINITY) : -1.0f;
      contested_vectors |= static_cast<std::uint32_t>(contested) << (i / scan_.lanes);
      if (i >= block.count()) continue;
      if (by_code_) {
        index_[block.rows[i]] = block.place[i];
      } else {
        block.distance[i] = INFINITY;
        consider(block, i, block.place[i]);
      }
    }
    for (int first = 0; first < block.count(); first += scan_.lanes) {
      if (contested_vectors >> (first / scan_.lanes) & 1u) recheck(first);
    }
    for (int i = 0; i < block.count(); ++i) {
      const std::int64_t row = block.rows[i];
      // Overflow, underflow, or codes that are not finite: nothing computed in float32 counts.
      const bool certain = block.best[i] <= FLT_MAX && (block.best[i] >= kLeastCertain || equal(row, index_[row]));
      if (!certain) index_[row] = exhaustive(row);
    }
    block.rows.clear();
  }

  // Compares the codes of a group with query i of a block in float64; keeps the first of equals.
  void consider(Block& block, int i, std::int64_t group) {
    double sum[kGroup];
    scan_.exact(block.vector(i), codes_.for_differences(), group, sum);
    int least = 0;
    for (int c = 1; c < kGroup; ++c) least = sum[c] < sum[least] ? c : least;
    if (sum[least] < block.distance[i]) {
      block.distance[i] = sum[least];
      index_[block.rows[i]] = group * kGroup + least;
    }
  }

  // Looks again at every group within the limits of the queries from `first` on, in order of the codes.
  void recheck(int first) {
    struct Context {
      Searcher* self;
      int first;
    } context{this, first};
    for (int i = first; i < first + scan_.lanes; ++i) {
      if (limit_[i] >= 0.0f) doubtful_.distance[i] = INFINITY;
    }
    const auto visit = [](void* opaque, std::int64_t group, std::uint32_t lanes) {
      const auto* here = static_cast<Context*>(opaque);
      for (int lane = 0; lanes; ++lane, lanes >>= 1) {
        if (lanes & 1u) here->self->consider(here->self->doubtful_, here->first + lane, group);
      }
    };
    scan_.within(doubtful_.queries.data() + first, codes_.for_differences(), limit_.data() + first, visit, &context);
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
  const bool by_code_;
  Block fresh_, doubtful_;
  std::vector<float> limit_;
  std::int64_t taken_ = 0, doubted_ = 0;
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
