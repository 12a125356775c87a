// codebook_entropy's kernels on buffers of exactly their size, with every instruction set of this machine: made to be
// run under sanitizers. Results are compared with plain float64 loops.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <limits>
#include <random>
#include <vector>

#include "../codebook_entropy/entropy.h"

namespace {

using namespace alit;
using std::int64_t;

int failures = 0;

void check(double found, double expected, double scale, const char* what, int line) {
  if (std::abs(found - expected) <= 1e-4 * scale) return;
  std::printf("line %d: %s: %g, expected %g\n", line, what, found, expected);
  ++failures;
}
#define CHECK(found, expected, scale) check(found, expected, scale, #found, __LINE__)

// Rows and codes of `dim` coordinates; the last panel is filled with codes of score -infinity.
void test_case(int64_t count, int64_t size, int64_t dim) {
  std::mt19937 random(static_cast<unsigned>(count * 7919 + size * 31 + dim));
  std::normal_distribution<float> normal;
  const int64_t panels = (size + entropy::kPanel - 1) / entropy::kPanel, all = panels * entropy::kPanel;
  std::vector<float> rows(count * dim), codes(size * dim), packed(all * dim), slope(all);
  for (auto& x : rows) x = normal(random);
  for (int64_t i = 0; i < count; ++i) rows[(i + 1) * dim - 1] = -1.0f;
  for (auto& x : codes) x = normal(random);
  for (int64_t k = 0; k < size; ++k) slope[k] = normal(random);
  const auto place = [&](int64_t k, int64_t d) { return (k / entropy::kPanel * dim + d) * entropy::kPanel + k % entropy::kPanel; };
  for (int64_t k = 0; k < all; ++k)
    for (int64_t d = 0; d < dim; ++d)
      packed[place(k, d)] = k < size ? codes[k * dim + d] : d == dim - 1 ? std::numeric_limits<float>::infinity() : 0.0f;

  std::vector<double> mean(all), grad_rows(count * dim), grad_codes(size * dim), entropies(count);
  const float sample = -0.7f, batch = 1.3f;
  for (int64_t i = 0; i < count; ++i) {
    std::vector<double> x(size), p(size);
    double most = -std::numeric_limits<double>::infinity(), sum = 0, shift = 0;
    for (int64_t k = 0; k < size; ++k) {
      for (int64_t d = 0; d < dim; ++d) x[k] += static_cast<double>(rows[i * dim + d]) * codes[k * dim + d];
      most = std::max(most, x[k]);
    }
    for (int64_t k = 0; k < size; ++k) sum += std::exp(x[k] - most);
    for (int64_t k = 0; k < size; ++k) {
      p[k] = std::exp(x[k] - most) / sum;
      mean[k] += p[k];
      entropies[i] -= p[k] * std::log(p[k]);
      shift += p[k] * slope[k];
    }
    for (int64_t k = 0; k < size; ++k) {
      const double grad = p[k] * (sample * (std::log(p[k]) + entropies[i]) + batch * (slope[k] - shift));
      for (int64_t d = 0; d < dim; ++d) {
        if (d < dim - 1) grad_rows[i * dim + d] += grad * codes[k * dim + d];
        grad_codes[k * dim + d] += grad * rows[i * dim + d];
      }
    }
  }

  for (const auto set : kInstructionSets) {
    if (set > best_instruction_set()) continue;
    const entropy::Codes given{packed.data(), panels, dim};
    std::vector<float> largest(count), sum(count), entropy(count), total(all), to_rows(count * dim), to_codes(all * dim);
    entropy::forward(given, rows.data(), count, largest.data(), sum.data(), entropy.data(), total.data(), 3, set);
    for (int64_t i = 0; i < count; ++i) CHECK(entropy[i], entropies[i], 1);
    for (int64_t k = 0; k < all; ++k) CHECK(total[k], mean[k], 1);
    const entropy::Slopes slopes{sample, batch, slope.data()};
    entropy::backward(given, rows.data(), count, slopes, largest.data(), sum.data(), entropy.data(), to_rows.data(),
                      to_codes.data(), 3, set);
    for (int64_t i = 0; i < count * dim; ++i) CHECK(to_rows[i], grad_rows[i], 10);
    for (int64_t k = 0; k < size; ++k)
      for (int64_t d = 0; d < dim; ++d) CHECK(to_codes[place(k, d)], grad_codes[k * dim + d], 10);
    entropy::backward(given, rows.data(), count, slopes, largest.data(), sum.data(), entropy.data(), nullptr, nullptr, 3, set);
  }
}

}  // namespace

int main() {
  test_case(0, 3, 4);
  test_case(1, 1, 1);
  test_case(7, 32, 2);
  test_case(130, 33, 9);
  test_case(301, 1100, 4);
  if (failures == 0) std::puts("entropies: all right");
  return failures == 0 ? 0 : 1;
}
