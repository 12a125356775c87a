// The ragged CUDA kernels, emulated, against the C++ ones: the same bytes, in buffers of exactly the size they need. Made to
// be run under sanitizers; with ALIT_EMULATE_THREADS on few and small cases. Prints nothing and returns 0 if all is well.

#include "../ragged/ragged.cu"
#include "../ragged/ragged.h"

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <vector>

namespace ragged = alit::ragged;

namespace {

#define CHECK(condition) \
  ((condition) ? (void)0 : (std::fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, #condition), std::abort()))

// Memory of exactly `size` bytes, so that the address sanitizer sees the first one beyond it.
struct Memory {
  explicit Memory(i64 bytes, int value = 0xa5) : size(bytes), data(new char[static_cast<std::size_t>(bytes)]) {
    std::memset(data.get(), value, static_cast<std::size_t>(bytes));
  }
  template <typename T>
  static Memory of(const std::vector<T>& values) {
    Memory memory(static_cast<i64>(values.size() * sizeof(T)));
    if (!values.empty()) std::memcpy(memory.data.get(), values.data(), values.size() * sizeof(T));
    return memory;
  }
  i64 address() const { return reinterpret_cast<i64>(data.get()); }
  template <typename T = std::byte>
  T* as() const {
    return reinterpret_cast<T*>(data.get());
  }
  bool operator==(const Memory& other) const {
    return size == other.size && std::memcmp(data.get(), other.data.get(), static_cast<std::size_t>(size)) == 0;
  }
  i64 size;
  std::unique_ptr<char[]> data;
};

Memory floats(i64 count, unsigned seed) {
  std::mt19937 random(seed);
  std::uniform_real_distribution<float> uniform(-1, 1);
  std::vector<float> values(static_cast<std::size_t>(count));
  for (float& value : values) value = uniform(random);
  return Memory::of(values);
}

struct Batch {
  std::vector<i64> lengths;
  i64 width, spare;
};

void test(const Batch& batch) {
  const i64 B = static_cast<i64>(batch.lengths.size()), row = batch.width * 4, added = 3;
  const i64 longest = B ? *std::max_element(batch.lengths.begin(), batch.lengths.end()) : 0;
  const Memory lengths = Memory::of(batch.lengths);
  const Memory narrow = Memory::of(std::vector<std::int32_t>(batch.lengths.begin(), batch.lengths.end()));
  int flags = 0;
  const i64 error = reinterpret_cast<i64>(&flags);

  Memory offsets((B + 1) * 4), offsets2((B + 1) * 4), offsets3((B + 1) * 4);
  ragged::cumulative_offsets({lengths.as<i64>(), 8}, B, offsets.as<ragged::Offset>());
  CHECK(alit_cuda_cumulative_offsets(0, 0, error, lengths.address(), 8, B, offsets2.address()) == 0);
  CHECK(offsets == offsets2);
  ragged::cumulative_offsets({narrow.as<std::int32_t>(), 4}, B, offsets2.as<ragged::Offset>());
  CHECK(offsets == offsets2);
  const i64 total = offsets.as<ragged::Offset>()[B], capacity = total + batch.spare;

  const Memory padded = floats(B * longest * batch.width, 1);
  Memory packed(capacity * row), packed2(capacity * row), packed3(capacity * row);
  ragged::pack({padded.as(), longest * row, row}, longest, offsets.as<ragged::Offset>(), B, packed.as(), capacity, row, 1);
  alit_cuda_pack(0, 0, error, padded.address(), longest * row, row, longest, narrow.address(), 4, B, packed2.address(),
                 offsets3.address(), capacity, row);
  alit_cuda_unpack_backward(0, 0, error, padded.address(), longest * row, row, longest, offsets.address(), B,
                            packed3.address(), capacity, row);
  CHECK(packed == packed2 && packed == packed3 && offsets == offsets3);

  Memory back(B * (longest + 1) * row), back2(B * (longest + 1) * row);
  const Memory fill = Memory::of(std::vector<float>(4, 7.0f));
  ragged::unpack({packed.as(), row}, capacity, offsets.as<ragged::Offset>(), B, fill.as(), 4, back.as(), longest + 1, row, 1);
  alit_cuda_unpack(0, 0, error, packed.address(), row, capacity, offsets.address(), B, fill.as<i64>()[0],
                   fill.as<i64>()[1], back2.address(), longest + 1, row);
  CHECK(back == back2);

  Memory keep(capacity);
  i64 kept = 0;
  for (i64 i = 0; i < capacity; ++i) kept += (keep.as<char>()[i] = (i * 7 + i / 3) % 3 != 0) && i < total;
  const i64 room = kept + batch.spare;
  Memory few(room * row), few2(room * row), source(room * 4), source2(room * 4), shorter((B + 1) * 4), shorter2((B + 1) * 4);
  Memory target(capacity * 4), target2(capacity * 4);
  ragged::compact({packed.as(), row}, capacity, offsets.as<ragged::Offset>(), B, keep.as<std::uint8_t>(), few.as(),
                  shorter.as<ragged::Offset>(), source.as<ragged::Offset>(), target.as<ragged::Offset>(), room, row, 1);
  alit_cuda_compact(0, 0, error, packed.address(), row, capacity, offsets.address(), B, keep.address(), few2.address(),
                    shorter2.address(), source2.address(), target2.address(), room, row);
  CHECK(few == few2 && source == source2 && target == target2 && shorter == shorter2);

  Memory back_again(capacity * row), back_again2(capacity * row);
  ragged::compact_backward({few.as(), row}, room, target.as<ragged::Offset>(), back_again.as(), capacity, row, 1);
  alit_cuda_compact_backward(0, 0, error, few.address(), row, room, target.address(), back_again2.address(), capacity, row);
  CHECK(back_again == back_again2);

  for (const bool shared : {true, false}) {
    const i64 sequence_stride = shared ? 0 : added * row, count = (shared ? 1 : B) * added, more = total + B * added + 2;
    const Memory fresh = floats(count * batch.width, 2);
    Memory select(B);
    for (i64 b = 0; b < B; ++b) select.as<char>()[b] = b % 3 != 1;
    Memory grown(more * row), grown2(more * row), longer((B + 1) * 4), longer2((B + 1) * 4);
    ragged::append({packed.as(), row}, capacity, offsets.as<ragged::Offset>(), B, {fresh.as(), sequence_stride, row}, added,
                   select.as<std::uint8_t>(), grown.as(), longer.as<ragged::Offset>(), more, row, 1);
    alit_cuda_append(0, 0, error, packed.address(), row, capacity, offsets.address(), B, fresh.address(), sequence_stride,
                     row, added, select.address(), grown2.address(), longer2.address(), more, row);
    CHECK(grown == grown2 && longer == longer2);
    Memory old(capacity * row), old2(capacity * row), sum(count * row), sum2(count * row);
    ragged::append_backward({grown.as(), row}, more, offsets.as<ragged::Offset>(), longer.as<ragged::Offset>(), B,
                            select.as<std::uint8_t>(), old.as(), capacity, sum.as(), added, shared, row,
                            alit::Type::float32, 1);
    alit_cuda_append_backward(0, 0, error, grown.address(), row, more, offsets.address(), longer.address(), B,
                              select.address(), old2.address(), capacity, sum2.address(), added, shared, row, 0);
    CHECK(old == old2 && sum == sum2);
    Memory old3(capacity * row), sum3(count * row);
    alit_cuda_append_backward(0, 0, error, grown.address(), row, more, offsets.address(), longer.address(), B,
                              select.address(), old3.address(), capacity, 0, added, shared, row, 0);
    alit_cuda_append_backward(0, 0, error, grown.address(), row, more, offsets.address(), longer.address(), B,
                              select.address(), 0, capacity, sum3.address(), added, shared, row, 0);
    CHECK(old == old3 && sum == sum3);
    const Memory all(B, 1);
    ragged::append({packed.as(), row}, capacity, offsets.as<ragged::Offset>(), B, {fresh.as(), sequence_stride, row}, added,
                   all.as<std::uint8_t>(), grown.as(), longer.as<ragged::Offset>(), more, row, 1);
    alit_cuda_append(0, 0, error, packed.address(), row, capacity, offsets.address(), B, fresh.address(), sequence_stride,
                     row, added, 0, grown2.address(), longer2.address(), more, row);
    CHECK(grown == grown2 && longer == longer2);
  }

  Memory masked(B * longest * row), masked2(B * longest * row), grad(B * longest * row), grad2(B * longest * row);
  const Memory token = floats(batch.width, 3);
  Memory grad_fill(row), grad_fill2(row), partial(B * alit_cuda_sum_blocks(longest) * row);
  std::vector<i64> half = batch.lengths;
  for (i64& length : half) length = length / 2 - 1;
  const Memory halves = Memory::of(half);
  ragged::tail_mask({padded.as(), longest * row, row}, {halves.as(), 8}, B, longest, token.as(), masked.as(), row, 1);
  alit_cuda_tail_mask(0, 0, error, padded.address(), longest * row, row, halves.address(), 8, B, longest, token.address(),
                      masked2.address(), row);
  ragged::tail_mask_backward({padded.as(), longest * row, row}, {halves.as(), 8}, B, longest, grad.as(), grad_fill.as(), row,
                             alit::Type::float32, 1);
  const auto backward = [&](i64 grad_tokens, i64 grad_fill, i64 scratch) {
    alit_cuda_tail_mask_backward(0, 0, error, padded.address(), longest * row, row, halves.address(), 8, B, longest,
                                 grad_tokens, grad_fill, row, 0, scratch);
  };
  backward(grad2.address(), grad_fill2.address(), partial.address());
  CHECK(masked == masked2 && grad == grad2 && grad_fill == grad_fill2);
  Memory grad3(grad.size), grad_fill3(row);
  backward(grad3.address(), 0, 0);
  backward(0, grad_fill3.address(), partial.address());
  CHECK(grad == grad3 && grad_fill == grad_fill3);
  CHECK(flags == 0);
}

// Offsets and rows that lead anywhere: nothing leaves its buffer, and the flag says what is wrong.
[[maybe_unused]] void test_hostile_values() {
  const i64 row = 8, rows = 4;
  const Memory packed = floats(rows * 2, 4), fresh = floats(2, 5), select(2, 1), keep(rows, 1);
  const std::vector<std::vector<ragged::Offset>> hostile = {
      {0, 3, 99}, {0, -5, 2}, {7, 2, 1}, {0, 2147483647, -2147483647}, {-9, -8, -7}, {0, 4, 3}};
  for (const auto& values : hostile) {
    const Memory offsets = Memory::of(values);
    Memory out(3 * row), grown((2 + 1) * 4), source(3 * 4), target(rows * 4), padded(2 * 2 * row), old(rows * row);
    int flags = 0;
    const i64 error = reinterpret_cast<i64>(&flags);
    alit_cuda_pack(0, 0, error, packed.address(), 2 * row, row, 2, offsets.address(), 4, 2, out.address(), grown.address(), 3,
                   row);
    alit_cuda_unpack_backward(0, 0, error, packed.address(), 2 * row, row, 2, offsets.address(), 2, out.address(), 3, row);
    alit_cuda_unpack(0, 0, error, packed.address(), row, rows, offsets.address(), 2, 0, 0, padded.address(), 2, row);
    alit_cuda_compact(0, 0, error, packed.address(), row, rows, offsets.address(), 2, keep.address(), out.address(),
                      grown.address(), source.address(), target.address(), 3, row);
    alit_cuda_append(0, 0, error, packed.address(), row, rows, offsets.address(), 2, fresh.address(), 0, row, 1,
                     select.address(), out.address(), grown.address(), 3, row);
    for (const i64 shared : {0, 1}) {
      Memory both((shared ? 1 : 2) * row);
      alit_cuda_append_backward(0, 0, error, packed.address(), row, rows, offsets.address(), offsets.address(), 2,
                                select.address(), old.address(), rows, both.address(), 1, shared, row, 0);
    }
    CHECK(flags != 0);
    alit_cuda_compact_backward(0, 0, error, packed.address(), row, rows, offsets.address(), out.address(), 3, row);
  }
}

}  // namespace

int main() {
#ifdef ALIT_EMULATE_THREADS
  test({{3, 0, 2}, 2, 1});
#else
  for (const Batch& batch : std::vector<Batch>{{{3, 1, 4}, 5, 0}, {{0, 2, 0, 3, 0}, 4, 3}, {{1}, 1, 0}, {{0, 0}, 3, 2},
                                               {{}, 3, 1}, {{17, 31, 2, 66}, 40, 9}, {{900, 0, 1200, 300}, 1, 7},
                                               {{4096, 0, 4095, 3000}, 1, 1}})
    test(batch);
  test_hostile_values();
#endif
  return 0;
}
