#include "quantize.h"

#include <algorithm>
#include <cmath>
#include <stdexcept>
#include <vector>

#include "../codebook_statistics/assignment.h"
#include "../parallel.h"

namespace alit {

namespace {

constexpr float kLeastNorm = 1e-12f;
// Rows of which a loss is summed in one piece: fixed, so that the sum does not depend on the thread count.
constexpr std::int64_t kChunk = 512;

std::int64_t taking_part(const bool* mask, std::int64_t rows) {
  return mask == nullptr ? rows : std::count(mask, mask + rows, true);
}

// Writes a row in float32, divided by max(norm, kLeastNorm) under the cosine metric. Returns that divisor, or 1.
template <typename T>
float unit(const T* row, std::int64_t dim, bool cosine, float* out, bool* clamped = nullptr) {
  double square = 0.0;
  for (std::int64_t d = 0; d < dim; ++d) {
    out[d] = load(row[d]);
    square += static_cast<double>(out[d]) * out[d];
  }
  if (!cosine) return 1.0f;
  const float norm = static_cast<float>(std::sqrt(square));
  const float divisor = norm < kLeastNorm ? kLeastNorm : norm;  // a NaN norm stays NaN
  if (clamped != nullptr) *clamped = norm <= kLeastNorm;
  for (std::int64_t d = 0; d < dim; ++d) out[d] /= divisor;
  return divisor;
}

// Takes the gradient of u = x / max(|x|, least) to x, in place: (g - u (u . g)) / |x|, or g / least where |x| is below.
void through_unit(float* grad, const float* u, std::int64_t dim, float divisor, bool clamped) {
  double projection = 0.0;
  if (!clamped) {
    for (std::int64_t d = 0; d < dim; ++d) projection += static_cast<double>(u[d]) * grad[d];
  }
  for (std::int64_t d = 0; d < dim; ++d) grad[d] = (grad[d] - u[d] * static_cast<float>(projection)) / divisor;
}

// All rows of a matrix as unit() gives them.
struct Units {
  std::vector<float> values, divisors;
  std::vector<char> clamped;

  Units(const Rows& rows, bool cosine, int threads)
      : values(static_cast<std::size_t>(rows.count * rows.dim)), divisors(rows.count), clamped(rows.count) {
    dispatch(rows.type, [&](auto element) {
      using T = decltype(element);
      parallel_for(rows.count, 1024, threads, [&](std::int64_t begin, std::int64_t end) {
        for (std::int64_t i = begin; i < end; ++i) {
          bool below = false;
          divisors[i] = unit(rows.row<T>(i), rows.dim, cosine, values.data() + i * rows.dim, &below);
          clamped[i] = below;
        }
      });
    });
  }
};

}  // namespace

void gather_and_losses(const Rows& u, const Rows& codes, const std::int64_t* index, const bool* mask, float commitment,
                       float codebook_weight, Type out, void* quantized, float* losses, int threads) {
  if (u.type != codes.type || u.dim != codes.dim) throw std::invalid_argument("codes: type or dim unlike u");
  const std::int64_t dim = u.dim, chunks = (u.count + kChunk - 1) / kChunk;
  std::vector<double> square(static_cast<std::size_t>(chunks), 0.0);
  dispatch(u.type, [&](auto in_element) {
    dispatch(out, [&](auto out_element) {
      using In = decltype(in_element);
      using Out = decltype(out_element);
      parallel_for(chunks, 1, threads, [&](std::int64_t begin, std::int64_t end) {
        for (std::int64_t chunk = begin; chunk < end; ++chunk) {
          for (std::int64_t i = chunk * kChunk; i < std::min(u.count, (chunk + 1) * kChunk); ++i) {
            Out* target = static_cast<Out*>(quantized) + i * dim;
            if (mask != nullptr && !mask[i]) {
              std::fill(target, target + dim, store<Out>(0.0f));
              continue;
            }
            const In *row = u.row<In>(i), *code = codes.row<In>(index[i]);
            for (std::int64_t d = 0; d < dim; ++d) {
              const float value = load(code[d]);
              const float difference = value - load(row[d]);
              square[chunk] += static_cast<double>(difference) * difference;
              target[d] = store<Out>(value);
            }
          }
        }
      });
    });
  });
  double sum = 0.0;
  for (const double part : square) sum += part;
  const std::int64_t elements = std::max<std::int64_t>(1, taking_part(mask, u.count) * dim);
  const float mean = static_cast<float>(sum / static_cast<double>(elements));
  losses[1] = commitment * mean;
  losses[2] = codebook_weight * mean;
  losses[0] = losses[1] + losses[2];
}

void quantize_backward(const QuantizeGradients& grad, const Rows& z, const Rows& codebook, const std::int64_t* index,
                       const bool* mask, bool cosine, float commitment, float codebook_weight, void* grad_z,
                       void* grad_codebook, int threads) {
  if (z.type != codebook.type || z.dim != codebook.dim) throw std::invalid_argument("codebook: type or dim unlike z");
  const std::int64_t dim = z.dim;
  const Assignment assignment(index, mask, z.count, codebook.count);
  const Units codes(codebook, cosine, threads), units(z, cosine, threads);
  const float slope = 2.0f / static_cast<float>(std::max<std::int64_t>(1, taking_part(mask, z.count) * dim));
  const float to_z = slope * commitment * (grad.loss + grad.commitment_loss);
  const float to_codes = slope * codebook_weight * (grad.loss + grad.codebook_loss);
  dispatch(z.type, [&](auto element) {
    using T = decltype(element);
    parallel_for(z.count, 256, threads, [&](std::int64_t begin, std::int64_t end) {
      std::vector<float> g(static_cast<std::size_t>(dim));
      for (std::int64_t i = begin; i < end; ++i) {
        T* target = static_cast<T*>(grad_z) + i * dim;
        if (mask != nullptr && !mask[i]) {
          std::fill(target, target + dim, store<T>(0.0f));
          continue;
        }
        const T* incoming = grad.quantized.row<T>(i);
        const float *u = units.values.data() + i * dim, *q = codes.values.data() + index[i] * dim;
        for (std::int64_t d = 0; d < dim; ++d) g[d] = load(incoming[d]) - to_z * (q[d] - u[d]);
        if (cosine) through_unit(g.data(), u, dim, units.divisors[i], units.clamped[i]);
        for (std::int64_t d = 0; d < dim; ++d) target[d] = store<T>(g[d]);
      }
    });
    if (grad_codebook == nullptr) return;
    parallel_for(codebook.count, 64, threads, [&](std::int64_t begin, std::int64_t end) {
      std::vector<double> sum(static_cast<std::size_t>(dim));
      std::vector<float> g(static_cast<std::size_t>(dim));
      for (std::int64_t k = begin; k < end; ++k) {
        const float* q = codes.values.data() + k * dim;
        std::fill(sum.begin(), sum.end(), 0.0);
        for (std::int64_t i = assignment.start[k]; i < assignment.start[k + 1]; ++i) {
          const float* u = units.values.data() + assignment.row[i] * dim;
          for (std::int64_t d = 0; d < dim; ++d) sum[d] += static_cast<double>(to_codes * (q[d] - u[d]));
        }
        for (std::int64_t d = 0; d < dim; ++d) g[d] = static_cast<float>(sum[d]);
        if (cosine) through_unit(g.data(), q, dim, codes.divisors[k], codes.clamped[k]);
        T* target = static_cast<T*>(grad_codebook) + k * dim;
        for (std::int64_t d = 0; d < dim; ++d) target[d] = store<T>(g[d]);
      }
    });
  });
}

}  // namespace alit
