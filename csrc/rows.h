// A matrix whose rows lie `stride` elements apart and whose columns are adjacent.
#pragma once

#include <cstdint>

#include "types.h"

namespace alit {

struct Rows {
  const void* data;
  Type type;
  std::int64_t count, dim, stride;

  template <typename T>
  const T* row(std::int64_t i) const {
    return static_cast<const T*>(data) + i * stride;
  }
};

}  // namespace alit
