// The ragged kernels against plain loops, on odd sizes and thread counts, in buffers of exactly the size they need: made
// to be run under sanitizers. Prints nothing and returns 0 if all is well.

#include "../ragged/ragged.h"

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <random>
#include <stdexcept>
#include <vector>

using namespace alit::ragged;

namespace {

#define CHECK(condition) \
  ((condition) ? (void)0 : (std::fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, #condition), std::abort()))

// A vector whose end is the end of its allocation, so that the address sanitizer sees the first element beyond it.
template <typename T>
struct Exact {
  explicit Exact(Size count) : size(count), data(new T[static_cast<std::size_t>(count)]) {}
  T& operator[](Size i) { return data[static_cast<std::size_t>(i)]; }
  const T& operator[](Size i) const { return data[static_cast<std::size_t>(i)]; }
  std::byte* bytes() { return reinterpret_cast<std::byte*>(data.get()); }
  Size size;
  std::unique_ptr<T[]> data;
};

struct Batch {
  std::vector<Size> lengths;
  Size width, spare;
};

constexpr Size kFloat = sizeof(float);
constexpr float kUnwritten = -12345.0f;

Exact<float> numbers(Size count, unsigned seed) {
  std::mt19937 random(seed);
  std::uniform_real_distribution<float> uniform(-1, 1);
  Exact<float> out(count);
  for (Size i = 0; i < count; ++i) out[i] = uniform(random);
  return out;
}

Exact<float> output(Size count) {
  Exact<float> out(count);
  for (Size i = 0; i < count; ++i) out[i] = kUnwritten;
  return out;
}

Exact<Offset> offsets_of(const std::vector<Size>& lengths) {
  Exact<Offset> offsets(static_cast<Size>(lengths.size()) + 1);
  cumulative_offsets({lengths.data(), 8}, static_cast<Size>(lengths.size()), offsets.data.get());
  return offsets;
}

template <typename Call>
void throws(const Call& call) {
  try {
    call();
  } catch (const std::invalid_argument&) {
    return;
  }
  CHECK(!"an invalid argument was accepted");
}

void check_row(const Exact<float>& out, Size row, const float* expected, Size width) {
  for (Size c = 0; c < width; ++c) CHECK(out[row * width + c] == (expected ? expected[c] : 0.0f));
}

void test_pack_and_unpack(const Batch& batch, int threads) {
  const Size sequences = static_cast<Size>(batch.lengths.size()), width = batch.width, row_bytes = width * kFloat;
  Size longest = 0;
  for (const Size length : batch.lengths) longest = std::max(longest, length);
  const Exact<Offset> offsets = offsets_of(batch.lengths);
  const Size capacity = offsets[sequences] + batch.spare;
  Exact<float> padded = numbers(sequences * longest * width, 1), packed = output(capacity * width);
  pack({padded.bytes(), longest * row_bytes, row_bytes}, longest, offsets.data.get(), sequences, packed.bytes(), capacity,
       row_bytes, threads);
  for (Size b = 0; b < sequences; ++b)
    for (Size n = 0; n < batch.lengths[static_cast<std::size_t>(b)]; ++n)
      check_row(packed, offsets[b] + n, &padded[(b * longest + n) * width], width);
  for (Size row = offsets[sequences]; row < capacity; ++row) check_row(packed, row, nullptr, width);

  Exact<float> back = output(sequences * (longest + 1) * width);
  const float fill = 7.0f;
  unpack({packed.bytes(), row_bytes}, capacity, offsets.data.get(), sequences, reinterpret_cast<const std::byte*>(&fill),
         kFloat, back.bytes(), longest + 1, row_bytes, threads);
  for (Size b = 0; b < sequences; ++b)
    for (Size n = 0; n <= longest; ++n)
      for (Size c = 0; c < width; ++c)
        CHECK(back[(b * (longest + 1) + n) * width + c] ==
              (n < batch.lengths[static_cast<std::size_t>(b)] ? padded[(b * longest + n) * width + c] : fill));
  if (offsets[sequences] > 0) {
    throws([&] {
      pack({padded.bytes(), longest * row_bytes, row_bytes}, longest, offsets.data.get(), sequences, packed.bytes(),
           offsets[sequences] - 1, row_bytes, threads);
    });
    throws([&] {
      unpack({packed.bytes(), row_bytes}, offsets[sequences] - 1, offsets.data.get(), sequences,
             reinterpret_cast<const std::byte*>(&fill), kFloat, back.bytes(), longest, row_bytes, threads);
    });
  }
}

void test_compact(const Batch& batch, int threads) {
  const Size sequences = static_cast<Size>(batch.lengths.size()), width = batch.width, row_bytes = width * kFloat;
  const Exact<Offset> offsets = offsets_of(batch.lengths);
  const Size rows = offsets[sequences];
  Exact<float> packed = numbers(rows * width, 2);
  Exact<std::uint8_t> keep(rows);
  std::vector<Size> kept;
  for (Size row = 0; row < rows; ++row)
    if ((keep[row] = static_cast<std::uint8_t>((row * 7 + row / 3) % 3 != 0))) kept.push_back(row);
  const Size count = static_cast<Size>(kept.size()), capacity = count + batch.spare;
  Exact<float> out = output(capacity * width);
  Exact<Offset> new_offsets(sequences + 1), source_row(capacity), target_row(rows);
  compact({packed.bytes(), row_bytes}, rows, offsets.data.get(), sequences, keep.data.get(), out.bytes(),
          new_offsets.data.get(), source_row.data.get(), target_row.data.get(), capacity, row_bytes, threads);
  CHECK(new_offsets[sequences] == count);
  for (Size i = 0; i < capacity; ++i) {
    CHECK(source_row[i] == (i < count ? kept[static_cast<std::size_t>(i)] : -1));
    check_row(out, i, i < count ? &packed[kept[static_cast<std::size_t>(i)] * width] : nullptr, width);
  }
  for (Size i = 0; i < count; ++i) CHECK(target_row[kept[static_cast<std::size_t>(i)]] == i);
  Exact<float> back = output(rows * width);
  compact_backward({out.bytes(), row_bytes}, capacity, target_row.data.get(), back.bytes(), rows, row_bytes, threads);
  for (Size row = 0; row < rows; ++row) CHECK(keep[row] || target_row[row] == -1);
  for (Size row = 0; row < rows; ++row) check_row(back, row, keep[row] ? &packed[row * width] : nullptr, width);
  if (count > 0) {
    throws([&] {
      compact({packed.bytes(), row_bytes}, rows, offsets.data.get(), sequences, keep.data.get(), out.bytes(),
              new_offsets.data.get(), source_row.data.get(), target_row.data.get(), count - 1, row_bytes, threads);
    });
    throws([&] {
      compact({packed.bytes(), row_bytes}, rows, offsets.data.get(), sequences, keep.data.get(), out.bytes(),
              new_offsets.data.get(), source_row.data.get(), target_row.data.get(), capacity, row_bytes, threads);
      compact_backward({out.bytes(), row_bytes}, count - 1, target_row.data.get(), back.bytes(), rows, row_bytes, threads);
    });
  }
}

void test_append(const Batch& batch, bool shared, int threads) {
  constexpr Size kAdded = 3;
  const Size sequences = static_cast<Size>(batch.lengths.size()), width = batch.width, row_bytes = width * kFloat;
  const Exact<Offset> offsets = offsets_of(batch.lengths);
  const Size rows = offsets[sequences], capacity = rows + kAdded * sequences + batch.spare;
  const Size fresh_count = (shared ? 1 : sequences) * kAdded;
  Exact<float> packed = numbers(rows * width, 3), fresh = numbers(fresh_count * width, 4);
  Exact<std::uint8_t> select(sequences);
  for (Size b = 0; b < sequences; ++b) select[b] = static_cast<std::uint8_t>(b % 3 != 1);
  Exact<float> out = output(capacity * width);
  Exact<Offset> grown(sequences + 1);
  append({packed.bytes(), row_bytes}, rows, offsets.data.get(), sequences,
         {fresh.bytes(), shared ? 0 : kAdded * row_bytes, row_bytes}, kAdded, select.data.get(), out.bytes(),
         grown.data.get(), capacity, row_bytes, threads);
  Size row = 0;
  for (Size b = 0; b < sequences; ++b) {
    CHECK(grown[b] == row);
    for (Size old = offsets[b]; old < offsets[b + 1]; ++old) check_row(out, row++, &packed[old * width], width);
    for (Size i = 0; select[b] && i < kAdded; ++i)
      check_row(out, row++, &fresh[((shared ? 0 : b * kAdded) + i) * width], width);
  }
  CHECK(grown[sequences] == row);
  for (; row < capacity; ++row) check_row(out, row, nullptr, width);

  Exact<float> grad_packed = output(rows * width), grad_fresh = output(fresh_count * width);
  append_backward({out.bytes(), row_bytes}, capacity, offsets.data.get(), grown.data.get(), sequences, select.data.get(),
                  grad_packed.bytes(), rows, nullptr, kAdded, shared, row_bytes, alit::Type::float32, threads);
  append_backward({out.bytes(), row_bytes}, capacity, offsets.data.get(), grown.data.get(), sequences, select.data.get(),
                  nullptr, rows, grad_fresh.bytes(), kAdded, shared, row_bytes, alit::Type::float32, threads);
  for (Size i = 0; i < rows; ++i) check_row(grad_packed, i, &packed[i * width], width);
  for (Size i = 0; i < fresh_count * width; ++i) {
    double expected = 0;  // `out` is its own gradient here: every chosen sequence gives its fresh rows back
    for (Size b = 0; b < sequences; ++b)
      if (select[b] && (shared || i / (kAdded * width) == b)) expected += fresh[i];
    CHECK(grad_fresh[i] == static_cast<float>(expected));
  }
  if (capacity > batch.spare && grown[sequences] > 0)
    throws([&] {
      append({packed.bytes(), row_bytes}, rows, offsets.data.get(), sequences, {fresh.bytes(), 0, row_bytes}, kAdded,
             select.data.get(), out.bytes(), grown.data.get(), grown[sequences] - 1, row_bytes, threads);
    });
}

void test_tail_mask(const Batch& batch, int threads) {
  const Size sequences = static_cast<Size>(batch.lengths.size()), width = batch.width, row_bytes = width * kFloat;
  const Size length = 70;
  std::vector<Size> lengths = batch.lengths;
  if (!lengths.empty()) lengths[0] = -3;
  Exact<float> tokens = numbers(sequences * length * width, 5), fill = numbers(width, 6);
  Exact<float> out = output(sequences * length * width), grad = output(sequences * length * width);
  Exact<float> grad_fill = output(width);
  const Padded view{tokens.bytes(), length * row_bytes, row_bytes};
  tail_mask(view, {lengths.data(), 8}, sequences, length, fill.bytes(), out.bytes(), row_bytes, threads);
  tail_mask_backward(view, {lengths.data(), 8}, sequences, length, grad.bytes(), grad_fill.bytes(), row_bytes,
                     alit::Type::float32, threads);
  Exact<float> alone = output(sequences * length * width), alone_fill = output(width);
  tail_mask_backward(view, {lengths.data(), 8}, sequences, length, alone.bytes(), nullptr, row_bytes, alit::Type::float32,
                     threads);
  tail_mask_backward(view, {lengths.data(), 8}, sequences, length, nullptr, alone_fill.bytes(), row_bytes,
                     alit::Type::float32, threads);
  for (Size i = 0; i < alone.size; ++i) CHECK(alone[i] == grad[i]);
  for (Size c = 0; c < width; ++c) CHECK(alone_fill[c] == grad_fill[c]);
  std::vector<double> sum(static_cast<std::size_t>(width), 0.0);
  for (Size b = 0; b < sequences; ++b)
    for (Size n = 0; n < length; ++n) {
      const Size row = b * length + n;
      const bool inside = n < lengths[static_cast<std::size_t>(b)];
      check_row(out, row, inside ? &tokens[row * width] : &fill[0], width);
      check_row(grad, row, inside ? &tokens[row * width] : nullptr, width);
      for (Size c = 0; c < width && !inside; ++c) sum[static_cast<std::size_t>(c)] += tokens[row * width + c];
    }
  for (Size c = 0; c < width; ++c) {
    const double difference = grad_fill[c] - sum[static_cast<std::size_t>(c)];
    CHECK(difference * difference < 1e-8);
  }
}

void test_offsets_that_do_not_fit() {
  const std::vector<std::vector<Offset>> wrong = {{1, 2, 3}, {0, 3, 2}, {0, 2, 5}, {0, -1, 2}};
  Exact<float> packed = numbers(4, 7), out = output(8);
  for (const auto& offsets : wrong)
    throws([&] {
      unpack({packed.bytes(), kFloat}, 4, offsets.data(), 2, packed.bytes(), kFloat, out.bytes(), 4, kFloat, 1);
    });
  Exact<Offset> offsets(3);
  for (const auto& lengths : std::vector<std::vector<Size>>{{1, -1}, {2147483647, 1}, {Size{1} << 62, Size{1} << 62}})
    throws([&] { cumulative_offsets({lengths.data(), 8}, 2, offsets.data.get()); });
}

void test_all(const Batch& batch, int threads) {
  test_pack_and_unpack(batch, threads);
  test_compact(batch, threads);
  test_append(batch, true, threads);
  test_append(batch, false, threads);
  test_tail_mask(batch, threads);
}

}  // namespace

int main() {
  const std::vector<Batch> batches = {
      {{3, 1, 4}, 5, 0}, {{0, 2, 0, 3, 0}, 4, 3}, {{1}, 1, 0}, {{0, 0}, 3, 2}, {{}, 3, 1}, {{17, 31, 2, 66}, 2000, 9}, {{2, 1}, 0, 1},
  };
  for (const Batch& batch : batches)
    for (const int threads : {1, 2, 5}) test_all(batch, threads);
  // Outputs of more than 16 MB, which are written past the caches, in rows that begin anywhere in a line.
  test_all({{500, 1, 600, 0, 550, 549}, 3001, 5}, 3);
  test_offsets_that_do_not_fit();
  return 0;
}
