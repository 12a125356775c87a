// Attention of one block of queries, once for each instruction set.
//
// Everything is float32, in memory that attention.cpp has packed. Rows of `pitch` elements, the head dimension rounded up
// to kUnit; elements beyond the head dimension are zero. A panel is the transpose of `panel` successive rows: element d of
// row j at [d * panel + j]; what fills the last panel is zero. No key is masked here: those that are have been dropped.
#pragma once

#include <cstdint>

namespace alit::attention {

constexpr std::int64_t kUnit = 16;    // elements: one cache line
constexpr std::int64_t kQueries = 64;  // in a block, at most
constexpr std::int64_t kKeys = 256;    // of which scores are held at a time, at most; a multiple of every panel
// Between two rows of scores: an odd number of cache lines, so that a column does not fall into a few sets of the cache.
constexpr std::int64_t kScorePitch = kKeys + kUnit;
constexpr std::int64_t kScores = kQueries * kScorePitch;

// The keys of one head of one sequence; at least one.
struct Keys {
  std::int64_t count, dim, pitch;
  const float *key_panels, *value;           // forward and backward; forward only
  const float *value_panels = nullptr, *key = nullptr;  // backward only
};

// One block of queries, times the scale, and what the backward knows of it.
struct Queries {
  std::int64_t count;
  const float* query;
  const float *grad_out = nullptr, *lse = nullptr;  // lse: +inf for a query without any key
  const float* delta = nullptr;                     // rowsum(out * grad_out) - grad_lse
};

struct Blocks {
  std::int64_t panel;
  // out[i] = sum over j of exp(s_ij - largest[i]) value[j], sum[i] = the same of 1; s the scores, largest their maximum.
  // `scores` has room for kScores.
  void (*forward)(const Keys& keys, const Queries& queries, float* out, float* largest, float* sum, float* scores);
  // grad_query[i] = sum over j of dS_ij key[j]; adds dS_ij query[i] to grad_key[j] and P_ij grad_out[i] to grad_value[j], with
  // P = exp(s - lse) and dS = P (grad_out value^T - delta). `scores` has room for 2 kScores.
  void (*backward)(const Keys& keys, const Queries& queries, float* grad_query, float* grad_key, float* grad_value,
                   float* scores);
};

extern const Blocks blocks_baseline;
#if defined(__x86_64__)
extern const Blocks blocks_avx2, blocks_avx512;
#endif

}  // namespace alit::attention
