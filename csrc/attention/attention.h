// Softmax attention over packed sequences or dense batches on the CPU, forward and backward.
#pragma once

#include <cstdint>

#include "../instruction_set.h"
#include "../types.h"

namespace alit::attention {

// Rows of several sequences: element d of head h of row n of sequence b lies at data + b * sequence + n * row + h * head + d
// (elements).
struct Rows {
  void* data;
  std::int64_t sequence, row, head;
};

// A float32 number for each row and head: that of row n of head h of sequence b at data + b * sequence + h * head + n.
struct Sums {
  float* data;
  std::int64_t sequence, head;
};

// One side of the attention. Sequence b begins at row offsets[b] and ends before row offsets[b + 1] <= length; without
// offsets every sequence has `length` rows, and strides of 0 between sequences mean packed rows.
struct Side {
  const std::int32_t* offsets;
  std::int64_t length;
};

struct Problem {
  std::int64_t sequences, heads, dim;
  Type type;  // of all Rows
  Side queries, keys;
  const std::uint8_t* mask;    // of row n of the keys of sequence b at mask[b * mask_sequence + n], 0 if it does not take part; or null
  std::int64_t mask_sequence;
  const std::int32_t* stops;   // query n of sequence b sees the keys before stops[b * stops_sequence + n], within its own; or null
  std::int64_t stops_sequence;
  float scale;
};

// Arithmetic is in float32 whatever the type, but for products of bfloat16 with avx512_bf16: they have factors in bfloat16,
// probabilities included, and sums in float32; subnormal numbers count as zero there. Rows at and beyond the last offset are neither read nor written, nor are
// masked keys read. A query without any key gives zeros and a log-sum-exp of -inf. Offsets that do not ascend from 0, or lead
// beyond `length`, throw std::invalid_argument.
//
// Parallel over sequences and heads, the costliest first; few of them are cut into groups of queries. Results do not
// depend on the thread count, nor on what other sequences there are. Memory beside the outputs, for each thread: keys and
// values of one head of the longest sequence, and scores of at most 64 queries by 256 keys.
void forward(const Problem& problem, Rows q, Rows k, Rows v, Rows out, Sums lse, int threads, InstructionSet set);

// Gradients from those of out and of lse (data null: zeros). Parallel over sequences and heads alone; memory for each thread: six times the
// keys of one head of the longest sequence, and three times the scores.
void backward(const Problem& problem, Rows grad_out, Sums grad_lse, Rows q, Rows k, Rows v, Rows out, Sums lse, Rows grad_q,
              Rows grad_k, Rows grad_v, int threads, InstructionSet set);

}  // namespace alit::attention
