// Entry points of the ragged CUDA kernels; what each computes is in ragged.h.
//
// C linkage and nothing but 64-bit integers, addresses included, so that the same functions serve the extension and, compiled
// for the CPU, the tests. Strides are in bytes, addresses on the device. Each returns 0 or an error code of CUDA. Nothing
// synchronizes and nothing is allocated: `scratch` comes from the caller. A gradient whose address is 0 is not computed. Values are not trusted: whatever offsets, lengths
// and row numbers say, nothing is read or written out of bounds; rows that do not fit are dropped, rows that are not there
// are zero. Where `error` is not 0, an int there collects the flags below.
#pragma once

#include <cstdint>

extern "C" {

enum AlitRaggedError { kBadOffsets = 1, kCapacityTooSmall = 2, kBadLengths = 4 };

using i64 = std::int64_t;

// length_bytes: 4 or 8, of each length.
int alit_cuda_cumulative_offsets(i64 stream, i64 device, i64 error, i64 lengths, i64 length_bytes, i64 sequences,
                                 i64 offsets);

int alit_cuda_pack(i64 stream, i64 device, i64 error, i64 padded, i64 sequence_stride, i64 row_stride, i64 length,
                   i64 lengths, i64 length_bytes, i64 sequences, i64 out, i64 offsets, i64 capacity, i64 row_bytes);
int alit_cuda_unpack_backward(i64 stream, i64 device, i64 error, i64 grad, i64 sequence_stride, i64 row_stride,
                              i64 length, i64 offsets, i64 sequences, i64 out, i64 rows, i64 row_bytes);

// fill_low and fill_high: 16 bytes, the fill value repeated.
int alit_cuda_unpack(i64 stream, i64 device, i64 error, i64 packed, i64 row_stride, i64 rows, i64 offsets, i64 sequences,
                     i64 fill_low, i64 fill_high, i64 out, i64 max_length, i64 row_bytes);

int alit_cuda_compact(i64 stream, i64 device, i64 error, i64 packed, i64 row_stride, i64 rows, i64 offsets, i64 sequences,
                      i64 keep, i64 out, i64 new_offsets, i64 source_row, i64 target_row, i64 capacity, i64 row_bytes);
int alit_cuda_compact_backward(i64 stream, i64 device, i64 error, i64 grad, i64 row_stride, i64 capacity, i64 target_row,
                               i64 out, i64 rows, i64 row_bytes);

int alit_cuda_append(i64 stream, i64 device, i64 error, i64 packed, i64 row_stride, i64 rows, i64 offsets, i64 sequences,
                     i64 fresh, i64 fresh_sequence_stride, i64 fresh_row_stride, i64 added, i64 select, i64 out,
                     i64 new_offsets, i64 capacity, i64 row_bytes);

int alit_cuda_append_backward(i64 stream, i64 device, i64 error, i64 grad, i64 row_stride, i64 capacity, i64 offsets,
                              i64 new_offsets, i64 sequences, i64 select, i64 grad_packed, i64 rows, i64 grad_fresh,
                              i64 added, i64 shared, i64 row_bytes, i64 type);

int alit_cuda_tail_mask(i64 stream, i64 device, i64 error, i64 tokens, i64 sequence_stride, i64 row_stride, i64 lengths,
                        i64 length_bytes, i64 sequences, i64 length, i64 fill, i64 out, i64 row_bytes);

// scratch: alit_cuda_sum_blocks(length) floats for each sequence and channel, where the gradient of `fill` is wanted.
i64 alit_cuda_sum_blocks(i64 length);
int alit_cuda_tail_mask_backward(i64 stream, i64 device, i64 error, i64 grad, i64 sequence_stride, i64 row_stride,
                                 i64 lengths, i64 length_bytes, i64 sequences, i64 length, i64 grad_tokens,
                                 i64 grad_fill, i64 row_bytes, i64 type, i64 scratch);
}
