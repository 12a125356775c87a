// Vectors sorted by code: sums over the vectors of a code then need no atomics and no matrix, and their order is fixed.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

namespace alit {

struct Assignment {
  std::vector<std::int64_t> start;  // of each code in `row`, and the end of the last
  std::vector<std::int64_t> row;    // vectors that take part, by code, in their own order within it

  // Index: int32 or int64. Throws where an index that takes part is out of range.
  template <typename Index>
  Assignment(const Index* index, const bool* mask, std::int64_t rows, std::int64_t codes)
      : start(static_cast<std::size_t>(codes + 1), 0) {
    for (std::int64_t i = 0; i < rows; ++i) {
      if (mask != nullptr && !mask[i]) continue;
      if (index[i] < 0 || index[i] >= codes) {
        throw std::out_of_range("index: expected values in 0.." + std::to_string(codes - 1) + ", got " +
                                std::to_string(index[i]));
      }
      ++start[index[i] + 1];
    }
    for (std::int64_t k = 0; k < codes; ++k) start[k + 1] += start[k];
    row.resize(static_cast<std::size_t>(start[codes]));
    std::vector<std::int64_t> next(start.begin(), start.end() - 1);
    for (std::int64_t i = 0; i < rows; ++i) {
      if (mask == nullptr || mask[i]) row[next[index[i]]++] = i;
    }
  }
};

}  // namespace alit
