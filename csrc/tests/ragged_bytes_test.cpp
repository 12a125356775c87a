// Every ragged kernel, C++ and (emulated) CUDA, passes once over its data: the row data it reads and writes are at most 1.1
// times the floor, each needed input row read once and each output row written once. Prints the ratios; returns 0 if all is
// well.

#define ALIT_COUNT_BYTES
#define ragged counted_ragged  // beside the kernels that do not count
#include "../ragged/ragged.cpp"
#include "../ragged/ragged.cu"

#include <cstdio>
#include <cstdlib>
#include <vector>

using namespace alit::ragged;

namespace {

constexpr Size kWidth = 96, kRow = kWidth * 4, kAdded = 32;
int failures = 0;

// Rows of memory: `count` rows of kRow bytes.
struct Memory {
  explicit Memory(Size count) : bytes(static_cast<std::size_t>(count * kRow)) {}
  std::byte* data() { return reinterpret_cast<std::byte*>(bytes.data()); }
  i64 address() { return reinterpret_cast<i64>(bytes.data()); }
  std::vector<char> bytes;
};

template <typename T>
i64 address(std::vector<T>& values) {
  return reinterpret_cast<i64>(values.data());
}

template <typename Call>
void measure(const char* name, Size floor_rows, const Call& call) {
  alit::bytes_moved = 0;
  call();
  const double ratio = static_cast<double>(alit::bytes_moved) / static_cast<double>(floor_rows * kRow);
  std::printf("%-28s %.3f times the floor\n", name, ratio);
  if (ratio < 1.0 || ratio > 1.1) ++failures;
}

}  // namespace

int main() {
  std::vector<Size> lengths;
  for (Size b = 0; b < 24; ++b) lengths.push_back(b % 5 == 4 ? 0 : 257 + 32 * (b % 8));
  const Size B = static_cast<Size>(lengths.size()), longest = 257 + 32 * 7, spare = 40;
  std::vector<Offset> offsets(static_cast<std::size_t>(B) + 1);
  cumulative_offsets({lengths.data(), 8}, B, offsets.data());
  const Size total = offsets.back(), capacity = total + spare;
  Memory padded(B * longest), packed(capacity), back(B * longest);

  const Size pack_floor = total + capacity, unpack_floor = total + B * longest;
  const std::byte zeros[16] = {};
  measure("pack", pack_floor, [&] {
    pack({padded.data(), longest * kRow, kRow}, longest, offsets.data(), B, packed.data(), capacity, kRow, 2);
  });
  measure("pack, CUDA", pack_floor, [&] {
    alit_cuda_pack(0, 0, 0, padded.address(), longest * kRow, kRow, longest, address(lengths), 8, B, packed.address(),
                   address(offsets), capacity, kRow);
  });
  measure("unpack", unpack_floor, [&] {
    unpack({packed.data(), kRow}, capacity, offsets.data(), B, zeros, 4, back.data(), longest, kRow, 2);
  });
  measure("unpack, CUDA", unpack_floor, [&] {
    alit_cuda_unpack(0, 0, 0, packed.address(), kRow, capacity, address(offsets), B, 0, 0, back.address(), longest, kRow);
  });

  std::vector<std::uint8_t> keep(static_cast<std::size_t>(capacity));
  Size kept = 0;
  for (Size i = 0; i < capacity; ++i) kept += (keep[static_cast<std::size_t>(i)] = i * 7 % 3 != 0) && i < total;
  const Size room = kept + spare;
  Memory few(room), old(capacity);
  std::vector<Offset> shorter(offsets.size()), source(static_cast<std::size_t>(room)), target(keep.size());
  measure("compact", kept + room, [&] {
    compact({packed.data(), kRow}, capacity, offsets.data(), B, keep.data(), few.data(), shorter.data(), source.data(),
            target.data(), room, kRow, 2);
  });
  measure("compact, CUDA", kept + room, [&] {
    alit_cuda_compact(0, 0, 0, packed.address(), kRow, capacity, address(offsets), B, address(keep), few.address(),
                      address(shorter), address(source), address(target), room, kRow);
  });
  measure("compact, backward", kept + capacity, [&] {
    compact_backward({few.data(), kRow}, room, target.data(), old.data(), capacity, kRow, 2);
  });
  measure("compact, backward, CUDA", kept + capacity, [&] {
    alit_cuda_compact_backward(0, 0, 0, few.address(), kRow, room, address(target), old.address(), capacity, kRow);
  });

  std::vector<std::uint8_t> select(static_cast<std::size_t>(B));
  Size chosen = 0;
  for (Size b = 0; b < B; ++b) chosen += select[static_cast<std::size_t>(b)] = b % 3 != 1;
  const Size grown = total + chosen * kAdded, more = grown + spare;
  Memory fresh(B * kAdded), longer(more), fresh_grad(B * kAdded);
  std::vector<Offset> new_offsets(offsets.size());
  measure("append", grown + more, [&] {
    append({packed.data(), kRow}, capacity, offsets.data(), B, {fresh.data(), kAdded * kRow, kRow}, kAdded, select.data(),
           longer.data(), new_offsets.data(), more, kRow, 2);
  });
  measure("append, CUDA", grown + more, [&] {
    alit_cuda_append(0, 0, 0, packed.address(), kRow, capacity, address(offsets), B, fresh.address(), kAdded * kRow, kRow,
                     kAdded, address(select), longer.address(), address(new_offsets), more, kRow);
  });
  for (const bool shared : {false, true}) {
    const Size floor = grown + capacity + (shared ? 1 : B) * kAdded;
    measure(shared ? "append, backward, shared" : "append, backward", floor, [&] {
      append_backward({longer.data(), kRow}, more, offsets.data(), new_offsets.data(), B, select.data(), old.data(),
                      capacity, fresh_grad.data(), kAdded, shared, kRow, alit::Type::float32, 2);
    });
    measure(shared ? "append, backward, shared, CUDA" : "append, backward, CUDA", floor, [&] {
      alit_cuda_append_backward(0, 0, 0, longer.address(), kRow, more, address(offsets), address(new_offsets), B,
                                address(select), old.address(), capacity, fresh_grad.address(), kAdded, shared, kRow, 0);
    });
  }

  std::vector<Size> half = lengths;
  for (Size& length : half) length /= 2;
  Memory fill(1);
  const Size all = 2 * B * longest;
  std::vector<float> partial(static_cast<std::size_t>(B * alit_cuda_sum_blocks(longest) * kWidth));
  measure("tail_mask", all, [&] {
    tail_mask({padded.data(), longest * kRow, kRow}, {half.data(), 8}, B, longest, fill.data(), back.data(), kRow, 2);
  });
  measure("tail_mask, CUDA", all, [&] {
    alit_cuda_tail_mask(0, 0, 0, padded.address(), longest * kRow, kRow, address(half), 8, B, longest, fill.address(),
                        back.address(), kRow);
  });
  measure("tail_mask, backward", all, [&] {
    tail_mask_backward({padded.data(), longest * kRow, kRow}, {half.data(), 8}, B, longest, back.data(), fill.data(), kRow,
                       alit::Type::float32, 2);
  });
  measure("tail_mask, backward, CUDA", all, [&] {
    alit_cuda_tail_mask_backward(0, 0, 0, padded.address(), longest * kRow, kRow, address(half), 8, B, longest, back.address(),
                                 fill.address(), kRow, 0, address(partial));
  });
  return failures;
}
