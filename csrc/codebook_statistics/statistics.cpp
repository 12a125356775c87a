#include "statistics.h"

#include <algorithm>
#include <vector>

#include "../parallel.h"
#include "assignment.h"

namespace alit {

template <typename Index>
void codebook_statistics(const Index* index, const Rows& z, const bool* mask, std::int64_t codes, float* count,
                         float* total, int threads) {
  const Assignment assignment(index, mask, z.count, codes);
  dispatch(z.type, [&](auto element) {
    using T = decltype(element);
    parallel_for(codes, 64, threads, [&](std::int64_t begin, std::int64_t end) {
      std::vector<double> sum(static_cast<std::size_t>(z.dim));
      for (std::int64_t k = begin; k < end; ++k) {
        const std::int64_t first = assignment.start[k], last = assignment.start[k + 1];
        count[k] = static_cast<float>(last - first);
        std::fill(sum.begin(), sum.end(), 0.0);
        for (std::int64_t i = first; i < last; ++i) {
          const T* row = z.row<T>(assignment.row[i]);
          for (std::int64_t d = 0; d < z.dim; ++d) sum[d] += static_cast<double>(load(row[d]));
        }
        std::copy(sum.begin(), sum.end(), total + k * z.dim);
      }
    });
  });
}

template void codebook_statistics(const std::int32_t*, const Rows&, const bool*, std::int64_t, float*, float*, int);
template void codebook_statistics(const std::int64_t*, const Rows&, const bool*, std::int64_t, float*, float*, int);

}  // namespace alit
