// Bytes of row data that kernels read and write, for the test that holds them to one pass. Counts only where
// ALIT_COUNT_BYTES is defined before this is included; elsewhere it is nothing.
#pragma once

#ifdef ALIT_COUNT_BYTES
#include <atomic>
#include <cstdint>

namespace alit {
inline std::atomic<std::int64_t> bytes_moved{0};
}
#define COUNT_BYTES(count) alit::bytes_moved += static_cast<std::int64_t>(count)
#else
#define COUNT_BYTES(count) ((void)0)
#endif
