// The steps after the search in a vector quantizer, and their gradients.
#pragma once

#include <cstdint>

#include "../rows.h"

namespace alit {

// quantized row i (contiguous, of type `out`) = row index[i] of codes, zero where mask (may be null) is false.
// losses = {a + b, a, b}, a = commitment m, b = codebook_weight m, m the mean of (u - codes[index])^2 over the unmasked
// elements, 0 where there are none. u and codes have one type; under the cosine metric they are the normalized float32
// rows.
void gather_and_losses(const Rows& u, const Rows& codes, const std::int64_t* index, const bool* mask, float commitment,
                       float codebook_weight, Type out, void* quantized, float* losses, int threads);

struct QuantizeGradients {
  const Rows& quantized;                  // of the type of z
  float loss, commitment_loss, codebook_loss;
};

// Gradients of gather_and_losses with straight-through `quantized`, contiguous and of the types of z and codebook; the
// codebook's where grad_codebook is not null. Under `cosine` both are taken through x / max(|x|, 1e-12). Codebook
// gradients are added in the order of the rows in float64, whatever the thread count.
void quantize_backward(const QuantizeGradients& grad, const Rows& z, const Rows& codebook, const std::int64_t* index,
                       const bool* mask, bool cosine, float commitment, float codebook_weight, void* grad_z,
                       void* grad_codebook, int threads);

}  // namespace alit
