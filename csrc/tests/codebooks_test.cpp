// The codebook kernels on buffers of exactly their size, with every instruction set of this machine: made to be run
// under sanitizers. Results are compared with plain float64 loops.

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <memory>
#include <random>
#include <vector>

#include "../codebook_statistics/statistics.h"
#include "../nearest_codeword/search.h"
#include "../vector_quantize/quantize.h"

namespace {

using namespace alit;

int failures = 0;

void check(bool condition, const char* what, int line) {
  if (condition) return;
  std::printf("line %d: %s\n", line, what);
  ++failures;
}
#define CHECK(condition) check(condition, #condition, __LINE__)

template <typename T>
std::vector<T> random_values(std::int64_t count, std::mt19937& random, float offset) {
  std::normal_distribution<float> normal;
  std::vector<T> values(static_cast<std::size_t>(count));
  for (auto& value : values) value = store<T>(normal(random) + offset);
  return values;
}

template <typename T>
double distance(const T* a, const T* b, std::int64_t dim) {
  double sum = 0.0;
  for (std::int64_t d = 0; d < dim; ++d) {
    const double difference = static_cast<double>(load(a[d])) - static_cast<double>(load(b[d]));
    sum += difference * difference;
  }
  return sum;
}

template <typename T>
void test_case(Type type, std::int64_t rows, std::int64_t codes, std::int64_t dim, bool masked, float offset) {
  std::mt19937 random(static_cast<unsigned>(rows * 7919 + codes * 31 + dim));
  auto z = random_values<T>(rows * dim, random, offset), codebook = random_values<T>(codes * dim, random, offset);
  if (rows > 2) z[dim] = store<T>(std::numeric_limits<float>::quiet_NaN());
  for (std::int64_t d = 0; rows > 4 && d < dim; ++d) {
    z[3 * dim + d] = store<T>(d == 0 ? std::numeric_limits<float>::max() : 0.0f);  // rounds to infinity in half precision
    z[4 * dim + d] = codebook[(codes - 1) * dim + d];
  }
  if (codes > 3) codebook[3 * dim] = store<T>(std::numeric_limits<float>::infinity());
  std::unique_ptr<bool[]> mask(masked ? new bool[rows] : nullptr);
  for (std::int64_t i = 0; masked && i < rows; ++i) mask[i] = random() % 3 != 0;
  const Rows a{z.data(), type, rows, dim, dim}, b{codebook.data(), type, codes, dim, dim};

  std::vector<std::int64_t> index(rows);
  for (const auto set : kInstructionSets) {
    if (set > best_instruction_set()) continue;
    for (auto& value : index) value = -1;
    nearest_codeword(a, b, mask.get(), index.data(), 3, set);
    for (std::int64_t i = 0; i < rows; ++i) {
      CHECK(index[i] >= 0 && index[i] < codes);
      if (masked && !mask[i]) {
        CHECK(index[i] == 0);
        continue;
      }
      double least = NAN;
      for (std::int64_t k = 0; k < codes; ++k) {
        const double d = distance(a.row<T>(i), b.row<T>(k), dim);
        if (d < least || std::isnan(least)) least = d;
      }
      const double chosen = distance(a.row<T>(i), b.row<T>(index[i]), dim);
      CHECK(std::isnan(least) ? index[i] == 0 : chosen <= least * (1 + 2 * (dim + 2) * 0x1p-24));
    }
  }

  std::vector<float> count(codes), total(codes * dim), losses(3);
  codebook_statistics(index.data(), a, mask.get(), codes, count.data(), total.data(), 2);
  double counted = 0;
  for (const float n : count) counted += n;
  std::int64_t expected = 0;
  for (std::int64_t i = 0; i < rows; ++i) expected += !masked || mask[i];
  CHECK(counted == static_cast<double>(expected));

  std::vector<T> quantized(rows * dim), grad_z(rows * dim), grad_codebook(codes * dim);
  gather_and_losses(a, b, index.data(), mask.get(), 0.25f, 0.5f, type, quantized.data(), losses.data(), 2);
  const Rows incoming{quantized.data(), type, rows, dim, dim};
  for (const bool cosine : {false, true}) {
    quantize_backward({incoming, 1.0f, 2.0f, 3.0f}, a, b, index.data(), mask.get(), cosine, 0.25f, 0.5f, grad_z.data(),
                      grad_codebook.data(), 2);
  }
  bool thrown = false;
  if (rows > 0 && !masked) {
    index[rows - 1] = codes;
    try {
      codebook_statistics(index.data(), a, mask.get(), codes, count.data(), total.data(), 2);
    } catch (const std::out_of_range&) {
      thrown = true;
    }
    CHECK(thrown);
  }
}

}  // namespace

int main() {
  const std::int64_t shapes[][3] = {{0, 1, 1},    {1, 1, 1},   {5, 3, 2},    {49, 17, 12},
                                    {97, 64, 16}, {33, 9, 47}, {50, 23, 48}, {20, 5, 256}};
  for (const auto& [rows, codes, dim] : shapes) {
    for (const bool masked : {false, true}) {
      for (const float offset : {0.0f, 1000.0f}) {
        test_case<float>(Type::float32, rows, codes, dim, masked, offset);
        test_case<bfloat16>(Type::bfloat16, rows, codes, dim, masked, offset);
        test_case<float16>(Type::float16, rows, codes, dim, masked, offset);
      }
    }
  }
  if (failures == 0) std::puts("codebook kernels: all as expected");
  return failures == 0 ? EXIT_SUCCESS : EXIT_FAILURE;
}
