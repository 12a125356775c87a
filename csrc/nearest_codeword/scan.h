// The loops over all codes, once for each instruction set.
//
// A block of queries is transposed: coordinate d of query i lies at queries[d * width + i]. Codes come in groups of eight:
// coordinate d of code c of group g at codes[(g * dim + d) * 8 + c]. All values are finite.
//
// Differences: sums of squared differences. None is NaN; they may overflow to infinity. The relative error of each is at
// most (dim + 2) 2^-24 wherever nothing underflows, with a fused multiply-add or without.
// Products: |c|^2 / 2 - q c; the squared distance but for a constant of the query and a factor of two, for half the
// arithmetic. The absolute error is at most (dim + 2) 2^-24 (|c|^2 / 2 + |q| |c|) where that is far from overflow.
#pragma once

#include <cstdint>

namespace alit {

constexpr int kGroup = 8;

// Function that is called with a group and a bit for each lane whose least distance in the group is within its limit.
using Visit = void (*)(void* context, std::int64_t group, std::uint32_t lanes);

struct Codes {
  const float* values;
  const float* start;  // what the sum of each code starts from: |c|^2 / 2 or 0; infinity if it can never be the nearest
  std::int64_t groups, dim;
};

// Results for each query of a block: the least value, its place (the first of several), the least value elsewhere; and,
// with products, the square of the query's norm.
struct Least {
  float *best, *second, *square;
  std::int32_t* place;
};

struct Scan {
  int lanes;  // queries in a vector
  int width;  // queries in a block, a multiple of lanes
  // Places are groups, or codes: for few dimensions twice the work, for many no group to look through.
  using Nearest = void (*)(const float* queries, const Codes& codes, const Least& least);
  struct {
    Nearest group, code;
  } differences, products;
  // Visits, in order, the groups with a distance, by differences, of at most limit[i] to query i of one vector of a block.
  void (*within)(const float* queries, const Codes& codes, const float* limit, Visit visit, void* context);
  // Distances in float64 of one query, whose coordinates are adjacent, to the codes of one group.
  void (*exact)(const float* query, const Codes& codes, std::int64_t group, double* distance);
};

extern const Scan scan_baseline;
#ifdef ALIT_X86
extern const Scan scan_avx2, scan_avx512;
#endif

}  // namespace alit
