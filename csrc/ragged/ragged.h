// Ragged sequences on the CPU: packing, compaction, growth and masking of rows, forward and backward.
//
// Rows are `row_bytes` bytes each and moved, never interpreted; only gradients that are sums know their element type. B
// sequences; sequence b owns rows offsets[b] to offsets[b + 1] - 1 of packed rows, which lie close together. Every
// function writes every byte of its outputs exactly once, in pieces of equal numbers of rows, so that no input and no
// output is passed over twice. Offsets that do not ascend from 0, or lead out of the given rows, throw
// std::invalid_argument before anything is read through them: these pointers come from outside.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../types.h"

namespace alit::ragged {

using Offset = std::int32_t;
using Size = std::int64_t;

// Lengths of 32 or 64 bits each.
struct Lengths {
  const void* values;
  Size bytes;

  Size operator[](Size b) const {
    return bytes == 8 ? static_cast<const std::int64_t*>(values)[b] : static_cast<const std::int32_t*>(values)[b];
  }
};

// Rows in memory, `stride` bytes apart; stride 0 repeats one row, and without data the rows are zero.
struct Rows {
  const std::byte* data = nullptr;
  Size stride = 0;
};

// Rows of several sequences: row n of sequence b begins at data + b * sequence_stride + n * row_stride (bytes).
struct Padded {
  const std::byte* data;
  Size sequence_stride, row_stride;
};

// offsets[b] = lengths[0] + ... + lengths[b - 1]; throws where a length is negative or the sum is 2^31 or more.
void cumulative_offsets(Lengths lengths, Size sequences, Offset* offsets);

// The first offsets[b + 1] - offsets[b] rows of each sequence, which has `length` of them, close together; then zeros.
void pack(Padded padded, Size length, const Offset* offsets, Size sequences, std::byte* out, Size capacity,
          Size row_bytes, int threads);

// Packed rows to `max_length` rows for each sequence, the element `fill` of `element_bytes` bytes beyond its end.
void unpack(Rows packed, Size rows, const Offset* offsets, Size sequences, const std::byte* fill, Size element_bytes,
            std::byte* out, Size max_length, Size row_bytes, int threads);

// The rows with keep[row] != 0, in order. target_row[row] is the output row that a row becomes, -1 where that is none;
// source_row[i] is the row that output row i came from, -1 beyond the last.
void compact(Rows packed, Size rows, const Offset* offsets, Size sequences, const std::uint8_t* keep, std::byte* out,
             Offset* new_offsets, Offset* source_row, Offset* target_row, Size capacity, Size row_bytes, int threads);

// Gradient of compact: row i is row target_row[i] of `grad`, which has `capacity`, or zero where that is -1.
void compact_backward(Rows grad, Size capacity, const Offset* target_row, std::byte* out, Size rows, Size row_bytes,
                      int threads);

// Every sequence, with `added` more rows at its end where select[b] != 0; null selects all.
void append(Rows packed, Size rows, const Offset* offsets, Size sequences, Padded fresh, Size added,
            const std::uint8_t* select, std::byte* out, Offset* new_offsets, Size capacity, Size row_bytes, int threads);

// Gradients of append from that of its output: of `packed` (rows) and of `fresh` (sequences, added), or, where `shared`,
// their sum over the chosen sequences (added), accumulated in double precision in the order of the sequences. A gradient
// without an address is not computed.
void append_backward(Rows grad, Size capacity, const Offset* offsets, const Offset* new_offsets, Size sequences,
                     const std::uint8_t* select, std::byte* grad_packed, Size rows, std::byte* grad_fresh, Size added,
                     bool shared, Size row_bytes, Type type, int threads);

// The first lengths[b] of `length` rows of each sequence, then the row `fill`.
void tail_mask(Padded tokens, Lengths lengths, Size sequences, Size length, const std::byte* fill, std::byte* out,
               Size row_bytes, int threads);

// Gradients of tail_mask: of `tokens`, and of `fill`, the sum over masked rows. Sums run over blocks of rows in float and
// over the blocks in double precision, so that they do not depend on the thread count. A gradient without an address is not
// computed.
void tail_mask_backward(Padded grad, Lengths lengths, Size sequences, Size length, std::byte* grad_tokens,
                        std::byte* grad_fill, Size row_bytes, Type type, int threads);

}  // namespace alit::ragged
