// Attention of one block of queries, once for each instruction set.
//
// Sums are float32. Factors are elements E: numbers in float32, or pairs of two successive numbers in bfloat16, which
// attention.cpp has packed. Rows of `row` elements follow the head dimension, `depth` elements and then zeros. A
// panel is the transpose of `panel` successive rows: element e of row j at [e * panel + j]; zeros fill the last one.
// A stack is for sums over rows: float32 rows as they are, or in row n, element d the pair of elements d of rows 2 n and
// 2 n + 1, zero beyond the last row. Its rows and those of sums are `pitch` apart, the head dimension rounded up to
// kUnit, zeros beyond it. No key is masked here: masked keys have been dropped.
#pragma once

#include <cstdint>

namespace alit::attention {

constexpr std::int64_t kUnit = 16;    // elements: one cache line
constexpr std::int64_t kQueries = 64;  // in a block, at most
constexpr std::int64_t kKeys = 256;    // of which scores are held at a time, at most; a multiple of every panel
// Pitch of rows of scores: an odd number of cache lines, so that a column does not fall into a few sets of the cache.
constexpr std::int64_t kScorePitch = kKeys + kUnit;
constexpr std::int64_t kScores = kQueries * kScorePitch;

// Two successive numbers in bfloat16, the first in the lower half.
struct Pair {
  std::uint32_t bits;
};

template <typename E>
constexpr std::int64_t kNumbers = 1;  // in an element
template <>
inline constexpr std::int64_t kNumbers<Pair> = 2;

// The keys of one head of one sequence; at least one.
template <typename E>
struct Keys {
  std::int64_t count, depth, row, pitch;
  const E *key_panels, *value;                          // forward and backward; a stack, forward only
  const E *value_panels = nullptr, *key = nullptr;      // backward only; the latter a stack
};

// One block of queries, with its data for the backward. Numbers are multiplied by the scale already; pairs, which that
// would round, are not, and the scale comes with them.
template <typename E>
struct Queries {
  std::int64_t count;
  const E* query;                                            // rows
  const std::int64_t* seen;                                  // how many keys each sees, the first ones
  float scale = 1.0f;                                        // of pairs
  const E *grad_out = nullptr;                               // rows
  const E *query_stack = nullptr, *grad_out_stack = nullptr;
  const float* lse = nullptr;                                // +inf for a query without any key
  const float* delta = nullptr;                              // rowsum(out * grad_out) - grad_lse
};

template <typename E>
struct Blocks {
  std::int64_t panel;
  // out[i] = sum over j of exp(s_ij - largest[i]) value[j], sum[i] = the same of 1; s the scores, largest their maximum.
  // `scores` has room for kScores.
  void (*forward)(const Keys<E>& keys, const Queries<E>& queries, float* out, float* largest, float* sum, float* scores);
  // Adds dS_ij key[j] to grad_query[i], dS_ij query[i] to grad_key[j] and P_ij grad_out[i] to grad_value[j], with
  // P = exp(s - lse) and dS = P (grad_out value^T - delta). `scores` has room for 3 kScores.
  void (*backward)(const Keys<E>& keys, const Queries<E>& queries, float* grad_query, float* grad_key, float* grad_value,
                   float* scores);
};

extern const Blocks<float> blocks_baseline;
#ifdef ALIT_X86
extern const Blocks<float> blocks_avx2, blocks_avx512;
#endif
#ifdef ALIT_AVX512_BF16
extern const Blocks<Pair> blocks_avx512_bf16;
#endif

}  // namespace alit::attention
