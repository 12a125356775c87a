// Number and sum of the vectors that each code received.
#pragma once

#include <cstdint>

#include "../rows.h"

namespace alit {

// count (codes,) and total (codes, z.dim) of the rows of z where mask (may be null) is true. Sums are added in float64 in the
// order of the rows, whatever the thread count. Index: int32 or int64.
template <typename Index>
void codebook_statistics(const Index* index, const Rows& z, const bool* mask, std::int64_t codes, float* count,
                         float* total, int threads);

}  // namespace alit
