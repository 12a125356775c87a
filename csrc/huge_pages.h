// Large outputs are usually fresh memory, and then faulting their pages in one by one costs more than writing them.
#pragma once

#ifdef __linux__
#include <sys/mman.h>
#endif

#include <cstddef>
#include <cstdint>

namespace alit {

// Asks the kernel to back [data, data + bytes) with huge pages where it has not been touched yet. Only a hint: its
// answer does not matter, and pages that are there stay as they are. Small outputs are left alone.
inline void prefer_huge_pages([[maybe_unused]] void* data, [[maybe_unused]] std::int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr std::uintptr_t kPage = 4096;
  constexpr std::int64_t kLeast = 4 << 20;
  if (bytes < kLeast) return;
  const std::uintptr_t begin = (reinterpret_cast<std::uintptr_t>(data) + kPage - 1) / kPage * kPage;
  const std::uintptr_t end = (reinterpret_cast<std::uintptr_t>(data) + static_cast<std::uintptr_t>(bytes)) / kPage * kPage;
  (void)madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

}  // namespace alit
