// Entropies of softmax(rows codes^T), and their gradients: no matrix of all scores.
#pragma once

#include <cstdint>

#include "../instruction_set.h"
#include "block.h"

namespace alit::entropy {

// Writes for each row the largest score, the sum of exp(score - largest) and the entropy of its distribution, (count)
// each; and the sum of the distributions, (codes()).
void forward(const Codes& codes, const float* rows, std::int64_t count, float* largest, float* sum, float* entropy,
             float* total, int threads, InstructionSet set);

// Gradients of rows (count, dim), whose last coordinate is as block.h says, and of panels, like the codes; null where
// not wanted.
void backward(const Codes& codes, const float* rows, std::int64_t count, const Slopes& slopes, const float* largest,
              const float* sum, const float* entropy, float* grad_rows, float* grad_panels, int threads,
              InstructionSet set);

}  // namespace alit::entropy
