#include "ragged.h"

#include <algorithm>
#include <cstring>
#include <limits>
#include <stdexcept>
#include <string>
#include <vector>

#include "../count_bytes.h"
#include "../huge_pages.h"
#include "../parallel.h"

#ifdef __SSE2__
#include <emmintrin.h>
#endif

namespace alit::ragged {
namespace {

// Work below this size costs less than waking a thread.
constexpr Size kGrainBytes = 1 << 16;
// Rows whose gradients are summed in float before the sum is carried on in double.
constexpr Size kSumRows = 64;

Size grain(Size row_bytes) { return std::max<Size>(1, kGrainBytes / std::max<Size>(row_bytes, 1)); }

// Outputs from this size on leave the caches before anyone reads them, so their lines are written past the caches: an
// ordinary store would read each line first. memcpy does that for single large pieces, but rows come in small ones.
constexpr Size kStreamBytes = Size{1} << 24;

void copy(std::byte* out, const std::byte* from, Size bytes, bool stream = false) {
  if (bytes <= 0) return;
  COUNT_BYTES(2 * bytes);
#ifdef __SSE2__
  if (stream) {
    const Size head = std::min<Size>(bytes, static_cast<Size>(-reinterpret_cast<std::uintptr_t>(out) % 64));
    std::memcpy(out, from, static_cast<std::size_t>(head));
    Size i = head;
    for (; i + 64 <= bytes; i += 64) {
      __m128i line[4];
      for (int k = 0; k < 4; ++k) line[k] = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i) + k);
      for (int k = 0; k < 4; ++k) _mm_stream_si128(reinterpret_cast<__m128i*>(out + i) + k, line[k]);
    }
    if (i < bytes) std::memcpy(out + i, from + i, static_cast<std::size_t>(bytes - i));
    return;
  }
#endif
  (void)stream;
  std::memcpy(out, from, static_cast<std::size_t>(bytes));
}

// To be called by a thread that streamed, before others may read.
void fence() {
#ifdef __SSE2__
  _mm_sfence();
#endif
}

void write_rows(std::byte* out, Rows rows, Size first, Size count, Size row_bytes, bool stream) {
  if (count <= 0 || row_bytes == 0) return;
  if (rows.data == nullptr) {
    std::memset(out, 0, static_cast<std::size_t>(count * row_bytes));
    COUNT_BYTES(count * row_bytes);
  } else if (rows.stride == row_bytes) {
    copy(out, rows.data + first * row_bytes, count * row_bytes, stream);
  } else {
    for (Size i = 0; i < count; ++i)
      copy(out + i * row_bytes, rows.data + (first + i) * rows.stride, row_bytes, stream);
  }
}

// Contents of one output sequence: `split` rows of `head`, then rows of `tail` up to its end.
struct Sequence {
  Rows head;
  Size split;
  Rows tail;
};

// Writes rows [0, total). Sequence b has the rows from start(b) to start(b + 1) and looks as sequence(b) says; rows from
// start(sequences) on are zero. Threads get equal numbers of rows, however long the sequences are.
template <typename Start, typename Describe>
void write_sequences(std::byte* out, Size total, Size row_bytes, Size sequences, const Start& start,
                     const Describe& sequence, int threads) {
  prefer_huge_pages(out, total * row_bytes);
  const bool stream = total * row_bytes >= kStreamBytes;
  parallel_for(total, grain(row_bytes), threads, [&](Size begin, Size end) {
    Size low = 0, high = sequences;  // the first sequence that ends behind `begin`
    while (low < high) {
      const Size middle = (low + high) / 2;
      if (start(middle + 1) > begin) {
        high = middle;
      } else {
        low = middle + 1;
      }
    }
    Size row = begin;
    for (Size b = low; b < sequences && row < end; ++b) {
      const Size first = start(b), stop = std::min(start(b + 1), end);
      if (row >= stop) continue;
      const Sequence s = sequence(b);
      const Size middle = std::clamp(first + s.split, row, stop);
      write_rows(out + row * row_bytes, s.head, row - first, middle - row, row_bytes, stream);
      write_rows(out + middle * row_bytes, s.tail, middle - first - s.split, stop - middle, row_bytes, stream);
      row = stop;
    }
    write_rows(out + row * row_bytes, Rows{}, 0, end - row, row_bytes, stream);
    fence();
  });
}

// Output row i is row source[i] of `rows`, or zero where that is -1; runs of neighbors move in one piece.
void gather(Rows rows, const Offset* source, std::byte* out, Size total, Size row_bytes, int threads) {
  prefer_huge_pages(out, total * row_bytes);
  const bool stream = total * row_bytes >= kStreamBytes;
  parallel_for(total, grain(row_bytes), threads, [&](Size begin, Size end) {
    for (Size row = begin; row < end;) {
      const Offset from = source[row];
      Size stop = row + 1;
      while (stop < end && source[stop] == (from < 0 ? from : from + static_cast<Offset>(stop - row))) ++stop;
      write_rows(out + row * row_bytes, from < 0 ? Rows{} : rows, from, stop - row, row_bytes, stream);
      row = stop;
    }
    fence();
  });
}

void require(bool condition, const char* message) {
  if (!condition) throw std::invalid_argument(message);
}

void check_offsets(const Offset* offsets, Size sequences, Size rows) {
  require(offsets[0] == 0, "offsets: expected a start at 0");
  for (Size b = 0; b < sequences; ++b) require(offsets[b] <= offsets[b + 1], "offsets: expected an ascending sequence");
  require(offsets[sequences] <= rows, "offsets: expected at most as many rows as are packed");
}

bool chosen(const std::uint8_t* select, Size b) { return select == nullptr || select[b] != 0; }

Rows at(Rows rows, Size row) { return {rows.data + row * rows.stride, rows.stride}; }

Rows at(Padded padded, Size b) { return {padded.data + b * padded.sequence_stride, padded.row_stride}; }

template <typename T>
void add_row(float* sum, const std::byte* row, Size width) {
  const T* values = reinterpret_cast<const T*>(row);
  for (Size c = 0; c < width; ++c) sum[c] += load(values[c]);
  COUNT_BYTES(width * static_cast<Size>(sizeof(T)));
}

// out[row] = sum over the chosen sequences of their added row number `row`.
template <typename T>
void sum_fresh(Rows grad, const Offset* new_offsets, Size sequences, const std::uint8_t* select, std::byte* out,
               Size added, Size row_bytes, int threads) {
  const Size width = row_bytes / static_cast<Size>(sizeof(T));
  parallel_for(added, grain(row_bytes * std::max<Size>(sequences, 1)), threads, [&](Size begin, Size end) {
    std::vector<double> sum(static_cast<std::size_t>(width));
    for (Size row = begin; row < end; ++row) {
      std::fill(sum.begin(), sum.end(), 0.0);
      for (Size b = 0; b < sequences; ++b) {
        if (!chosen(select, b)) continue;
        const T* values = reinterpret_cast<const T*>(at(grad, new_offsets[b + 1] - added + row).data);
        for (Size c = 0; c < width; ++c) sum[static_cast<std::size_t>(c)] += load(values[c]);
        COUNT_BYTES(row_bytes);
      }
      T* to = reinterpret_cast<T*>(out + row * row_bytes);
      for (Size c = 0; c < width; ++c) to[c] = store<T>(static_cast<float>(sum[static_cast<std::size_t>(c)]));
      COUNT_BYTES(row_bytes);
    }
  });
}

// Writes the first lengths[b] of `length` rows of each sequence, then those of `tail`.
void write_masked(Padded padded, Lengths lengths, Size sequences, Size length, Rows tail, std::byte* out, Size row_bytes,
                  int threads) {
  const auto sequence = [&](Size b) { return Sequence{at(padded, b), std::clamp<Size>(lengths[b], 0, length), tail}; };
  write_sequences(out, sequences * length, row_bytes, sequences, [&](Size b) { return b * length; }, sequence, threads);
}

template <typename T>
void mask_gradients(Padded grad, Lengths lengths, Size sequences, Size length, std::byte* grad_tokens,
                    std::byte* grad_fill, Size row_bytes, int threads) {
  const Size width = row_bytes / static_cast<Size>(sizeof(T));
  const Size blocks = (length + kSumRows - 1) / kSumRows;  // of each sequence
  if (grad_tokens != nullptr) prefer_huge_pages(grad_tokens, sequences * length * row_bytes);
  std::vector<float> partial(static_cast<std::size_t>(sequences * blocks * width), 0.0f);
  parallel_for(sequences * blocks, grain(row_bytes * kSumRows), threads, [&](Size begin, Size end) {
    for (Size block = begin; block < end; ++block) {
      const Size b = block / blocks, first = block % blocks * kSumRows, stop = std::min(first + kSumRows, length);
      const Size middle = std::clamp(lengths[b], first, stop);
      const Rows rows = at(grad, b);
      if (grad_tokens != nullptr) {
        std::byte* const out = grad_tokens + b * length * row_bytes;
        write_rows(out + first * row_bytes, rows, first, middle - first, row_bytes, false);
        write_rows(out + middle * row_bytes, Rows{}, 0, stop - middle, row_bytes, false);
      }
      float* const sum = partial.data() + block * width;
      for (Size row = middle; row < stop; ++row) add_row<T>(sum, at(rows, row).data, width);
    }
  });
  std::vector<double> sum(static_cast<std::size_t>(width));
  for (Size block = 0; block < sequences * blocks; ++block)
    for (Size c = 0; c < width; ++c) sum[static_cast<std::size_t>(c)] += partial[static_cast<std::size_t>(block * width + c)];
  T* out = reinterpret_cast<T*>(grad_fill);
  for (Size c = 0; c < width; ++c) out[c] = store<T>(static_cast<float>(sum[static_cast<std::size_t>(c)]));
  COUNT_BYTES((2 * sequences * blocks * static_cast<Size>(sizeof(float)) + static_cast<Size>(sizeof(T))) * width);
}

}  // namespace

void cumulative_offsets(Lengths lengths, Size sequences, Offset* offsets) {
  Size sum = 0;
  offsets[0] = 0;
  for (Size b = 0; b < sequences; ++b) {
    const Size length = lengths[b];
    require(length >= 0, "lengths: expected at least 0");
    require(length <= std::numeric_limits<Offset>::max() - sum, "lengths: expected a sum below 2^31");
    sum += length;
    offsets[b + 1] = static_cast<Offset>(sum);
  }
}

void pack(Padded padded, Size length, const Offset* offsets, Size sequences, std::byte* out, Size capacity,
          Size row_bytes, int threads) {
  check_offsets(offsets, sequences, capacity);
  for (Size b = 0; b < sequences; ++b)
    require(offsets[b + 1] - offsets[b] <= length, "lengths: expected at most as many as there are positions");
  const auto sequence = [&](Size b) { return Sequence{at(padded, b), length, Rows{}}; };
  write_sequences(out, capacity, row_bytes, sequences, [&](Size b) { return Size{offsets[b]}; }, sequence, threads);
}

void unpack(Rows packed, Size rows, const Offset* offsets, Size sequences, const std::byte* fill, Size element_bytes,
            std::byte* out, Size max_length, Size row_bytes, int threads) {
  check_offsets(offsets, sequences, rows);
  std::vector<std::byte> fill_row(static_cast<std::size_t>(row_bytes));
  for (Size byte = 0; byte < row_bytes; byte += element_bytes) copy(fill_row.data() + byte, fill, element_bytes);
  const bool zero = std::all_of(fill, fill + element_bytes, [](std::byte value) { return value == std::byte{0}; });
  const Rows tail = zero ? Rows{} : Rows{fill_row.data(), 0};
  const auto sequence = [&](Size b) {
    return Sequence{at(packed, offsets[b]), offsets[b + 1] - offsets[b], tail};
  };
  write_sequences(out, sequences * max_length, row_bytes, sequences, [&](Size b) { return b * max_length; }, sequence,
                  threads);
}

void compact(Rows packed, Size rows, const Offset* offsets, Size sequences, const std::uint8_t* keep, std::byte* out,
             Offset* new_offsets, Offset* source_row, Offset* target_row, Size capacity, Size row_bytes, int threads) {
  check_offsets(offsets, sequences, rows);
  Size kept = 0;
  new_offsets[0] = 0;
  for (Size b = 0; b < sequences; ++b) {
    for (Offset row = offsets[b]; row < offsets[b + 1]; ++row) {
      target_row[row] = -1;
      if (!keep[row]) continue;
      require(kept < capacity, "capacity: expected at least as many rows as are kept");
      target_row[row] = static_cast<Offset>(kept);
      source_row[kept++] = row;
    }
    new_offsets[b + 1] = static_cast<Offset>(kept);
  }
  std::fill(source_row + kept, source_row + capacity, Offset{-1});
  std::fill(target_row + offsets[sequences], target_row + rows, Offset{-1});
  gather(packed, source_row, out, capacity, row_bytes, threads);
}

void compact_backward(Rows grad, Size capacity, const Offset* target_row, std::byte* out, Size rows, Size row_bytes,
                      int threads) {
  for (Size i = 0; i < rows; ++i)
    require(target_row[i] >= -1 && target_row[i] < capacity, "target_row: expected -1 or a row of the gradient");
  gather(grad, target_row, out, rows, row_bytes, threads);
}

void append(Rows packed, Size rows, const Offset* offsets, Size sequences, Padded fresh, Size added,
            const std::uint8_t* select, std::byte* out, Offset* new_offsets, Size capacity, Size row_bytes,
            int threads) {
  check_offsets(offsets, sequences, rows);
  Size total = 0;
  new_offsets[0] = 0;
  for (Size b = 0; b < sequences; ++b) {
    total += offsets[b + 1] - offsets[b] + (chosen(select, b) ? added : 0);
    require(total <= capacity && total <= std::numeric_limits<Offset>::max(),
            "capacity: expected at least as many rows as there are");
    new_offsets[b + 1] = static_cast<Offset>(total);
  }
  const auto sequence = [&](Size b) {
    return Sequence{at(packed, offsets[b]), offsets[b + 1] - offsets[b], at(fresh, b)};
  };
  write_sequences(out, capacity, row_bytes, sequences, [&](Size b) { return Size{new_offsets[b]}; }, sequence, threads);
}

void append_backward(Rows grad, Size capacity, const Offset* offsets, const Offset* new_offsets, Size sequences,
                     const std::uint8_t* select, std::byte* grad_packed, Size rows, std::byte* grad_fresh, Size added,
                     bool shared, Size row_bytes, Type type, int threads) {
  check_offsets(offsets, sequences, rows);
  check_offsets(new_offsets, sequences, capacity);
  for (Size b = 0; b < sequences; ++b)
    require(new_offsets[b + 1] - new_offsets[b] == offsets[b + 1] - offsets[b] + (chosen(select, b) ? added : 0),
            "new_offsets: expected the offsets of the sequences after they have grown");
  const auto old = [&](Size b) { return Sequence{at(grad, new_offsets[b]), rows, Rows{}}; };
  if (grad_packed != nullptr)
    write_sequences(grad_packed, rows, row_bytes, sequences, [&](Size b) { return Size{offsets[b]}; }, old, threads);
  if (grad_fresh == nullptr) return;
  if (shared) {
    dispatch(type, [&](auto element) {
      sum_fresh<decltype(element)>(grad, new_offsets, sequences, select, grad_fresh, added, row_bytes, threads);
    });
    return;
  }
  const auto fresh = [&](Size b) {
    return Sequence{chosen(select, b) ? at(grad, new_offsets[b + 1] - added) : Rows{}, added, Rows{}};
  };
  write_sequences(grad_fresh, sequences * added, row_bytes, sequences, [&](Size b) { return b * added; }, fresh, threads);
}

void tail_mask(Padded tokens, Lengths lengths, Size sequences, Size length, const std::byte* fill, std::byte* out,
               Size row_bytes, int threads) {
  write_masked(tokens, lengths, sequences, length, Rows{fill, 0}, out, row_bytes, threads);
}

void tail_mask_backward(Padded grad, Lengths lengths, Size sequences, Size length, std::byte* grad_tokens,
                        std::byte* grad_fill, Size row_bytes, Type type, int threads) {
  if (grad_fill == nullptr) {
    if (grad_tokens != nullptr)
      write_masked(grad, lengths, sequences, length, Rows{}, grad_tokens, row_bytes, threads);
    return;
  }
  dispatch(type, [&](auto element) {
    mask_gradients<decltype(element)>(grad, lengths, sequences, length, grad_tokens, grad_fill, row_bytes, threads);
  });
}

}  // namespace alit::ragged
