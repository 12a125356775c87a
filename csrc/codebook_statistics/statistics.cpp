#include "statistics.h"

#include "../parallel.h"
#include "assignment.h"

namespace alit {

namespace {

// Sums some rows, Width columns at a time (in registers), as long as so many are left; returns the first one not done.
template <int Width, typename T>
std::int64_t sum_columns(const Rows& z, const std::int64_t* row, std::int64_t rows, std::int64_t column, float* total) {
  for (; column + Width <= z.dim; column += Width) {
    double sum[Width] = {};
    for (std::int64_t i = 0; i < rows; ++i) {
      const T* values = z.row<T>(row[i]) + column;
      for (int d = 0; d < Width; ++d) sum[d] += static_cast<double>(load(values[d]));
    }
    for (int d = 0; d < Width; ++d) total[column + d] = static_cast<float>(sum[d]);
  }
  return column;
}

}  // namespace

template <typename Index>
void codebook_statistics(const Index* index, const Rows& z, const bool* mask, std::int64_t codes, float* count,
                         float* total, int threads) {
  const Assignment assignment(index, mask, z.count, codes);
  dispatch(z.type, [&](auto element) {
    using T = decltype(element);
    parallel_for(codes, 64, threads, [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t k = begin; k < end; ++k) {
        const std::int64_t first = assignment.start[k], rows = assignment.start[k + 1] - first;
        const std::int64_t* row = assignment.row.data() + first;
        float* out = total + k * z.dim;
        count[k] = static_cast<float>(rows);
        std::int64_t column = sum_columns<16, T>(z, row, rows, 0, out);
        column = sum_columns<4, T>(z, row, rows, column, out);
        sum_columns<1, T>(z, row, rows, column, out);
      }
    });
  });
}

template void codebook_statistics(const std::int32_t*, const Rows&, const bool*, std::int64_t, float*, float*, int);
template void codebook_statistics(const std::int64_t*, const Rows&, const bool*, std::int64_t, float*, float*, int);

}  // namespace alit
