// Nearest codebook row of each vector, exact up to the rounding of direct differences.
#pragma once

#include <cstdint>

#include "../instruction_set.h"
#include "../rows.h"

namespace alit {

// index[i] = the row of `codebook` nearest to row i of `z`; 0 where mask (may be null) is false, without a search.
//
// With d the squared distance by direct differences in float64: d(index) <= (1 + 2 (dim + 2) 2^-24) min d; ties in d take
// the lowest index; a NaN distance never wins; a row of NaN distances gives 0. Memory beside the output: the codebook
// once more in float32, and two blocks of at most 48 vectors for each thread.
void nearest_codeword(const Rows& z, const Rows& codebook, const bool* mask, std::int64_t* index, int threads,
                      InstructionSet set);

}  // namespace alit
