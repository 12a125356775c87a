// The loops over all codes, once for each instruction set.
//
// A block of queries is transposed: coordinate d of query i lies at queries[d * width + i]. Codes come in groups of eight:
// coordinate d of code c of group g at codes[(g * dim + d) * 8 + c]. All values are finite, so no distance is NaN; it may
// overflow to infinity. Distances are sums of squared differences, never the expanded square: the relative error of
// each is at most (dim + 2) 2^-24 wherever nothing underflows, with a fused multiply-add or without.
#pragma once

#include <cstdint>

namespace alit {

constexpr int kGroup = 8;

// Called with a group and a bit for each lane whose least distance in the group is within its limit.
using Visit = void (*)(void* context, std::int64_t group, std::uint32_t lanes);

struct Scan {
  int lanes;  // queries in a vector
  int width;  // queries in a block, a multiple of lanes
  // For each query of a block: the least distance, the group that has it (the first of several), and the least distance
  // among the other groups. And the same by codes: for few dimensions twice the work, for many no group to look through.
  using Nearest = void (*)(const float* queries, const float* codes, std::int64_t groups, std::int64_t dim, float* best,
                           float* second, std::int32_t* place);
  Nearest nearest_group, nearest_code;
  // Visits, in order, the groups with a distance of at most limit[i] to query i of one vector of the block.
  void (*within)(const float* queries, const float* codes, std::int64_t groups, std::int64_t dim, const float* limit,
                 Visit visit, void* context);
  // Distances in float64 of one query, whose coordinates are adjacent, to the codes of one group.
  void (*exact)(const float* query, const float* group, std::int64_t dim, double* distance);
};

extern const Scan scan_baseline;
#if defined(__x86_64__)
extern const Scan scan_avx2, scan_avx512;
#endif

}  // namespace alit
