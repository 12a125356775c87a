// Attention against plain loops in float64, with every instruction set of the machine, on odd sizes and thread counts, in
// buffers of exactly the size they need: made to be run under sanitizers. Returns 0 if all is well.

#include "../attention/attention.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <stdexcept>
#include <vector>

using namespace alit;
using namespace alit::attention;
using std::int64_t;

namespace {

#define CHECK(condition) \
  ((condition) ? (void)0 : (std::fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, #condition), std::abort()))

constexpr float kUnwritten = -12345.0f;

// A vector whose end is the end of its allocation, so that the address sanitizer sees the first element beyond it.
template <typename T>
struct Exact {
  Exact(int64_t count, const std::vector<float>& values) : size(count), data(new T[static_cast<std::size_t>(count)]) {
    for (int64_t i = 0; i < count; ++i) (*this)[i] = alit::store<T>(values.empty() ? kUnwritten : values[i]);
  }
  T& operator[](int64_t i) { return data[static_cast<std::size_t>(i)]; }
  const T& operator[](int64_t i) const { return data[static_cast<std::size_t>(i)]; }
  int64_t size;
  std::unique_ptr<T[]> data;
};

std::vector<float> numbers(int64_t count, unsigned seed) {
  std::mt19937 random(seed);
  std::uniform_real_distribution<float> uniform(-1, 1);
  std::vector<float> out(static_cast<std::size_t>(count));
  for (float& x : out) x = uniform(random);
  return out;
}

struct Case {
  std::vector<int64_t> lengths, key_lengths;
  int64_t heads, dim, spare;
  bool masked, stopped = false;
};

std::vector<std::int32_t> offsets_of(const std::vector<int64_t>& lengths) {
  std::vector<std::int32_t> offsets{0};
  for (const int64_t length : lengths) offsets.push_back(offsets.back() + static_cast<std::int32_t>(length));
  return offsets;
}

// (T, heads, dim), packed.
template <typename T>
Rows rows(Exact<T>& x, int64_t heads, int64_t dim) {
  return {x.data.get(), 0, heads * dim, dim};
}

template <typename T>
struct Result {
  Exact<T> out, grad_q, grad_k, grad_v;
  Exact<float> lse;
};

template <typename T>
struct Inputs {
  Inputs(const Case& c, Type type)
      : offsets(offsets_of(c.lengths)),
        key_offsets(offsets_of(c.key_lengths)),
        count(offsets.back() + c.spare),
        key_count(key_offsets.back() + c.spare),
        q(count * c.heads * c.dim, numbers(count * c.heads * c.dim, 1)),
        k(key_count * c.heads * c.dim, numbers(key_count * c.heads * c.dim, 2)),
        v(key_count * c.heads * c.dim, numbers(key_count * c.heads * c.dim, 3)),
        grad_out(count * c.heads * c.dim, numbers(count * c.heads * c.dim, 4)),
        grad_lse(c.heads * count, numbers(c.heads * count, 5)),
        mask(static_cast<std::size_t>(key_count)),
        stops(static_cast<std::size_t>(count)) {
    std::mt19937 random(6);
    for (auto& m : mask) m = random() % 3 != 0;
    if (!c.key_lengths.empty()) std::fill_n(mask.begin(), c.key_lengths[0], 0);  // the first sequence is left without a key
    for (auto& s : stops) s = static_cast<std::int32_t>(random() % 100) - 9;
    problem = {static_cast<int64_t>(c.lengths.size()),
               c.heads,
               c.dim,
               type,
               {offsets.data(), count},
               {key_offsets.data(), key_count},
               c.masked ? mask.data() : nullptr,
               0,
               c.stopped ? stops.data() : nullptr,
               0,
               0.7f};
  }

  Result<T> run(int threads, InstructionSet set, bool of_lse = true) {
    const int64_t heads = problem.heads, dim = problem.dim;
    Result<T> r{{q.size, {}}, {q.size, {}}, {k.size, {}}, {k.size, {}}, {heads * count, {}}};
    const Sums lse{r.lse.data.get(), 0, count}, gradient{of_lse ? grad_lse.data.get() : nullptr, 0, count};
    const auto at = [&](Exact<T>& x) { return rows(x, heads, dim); };
    forward(problem, at(q), at(k), at(v), at(r.out), lse, threads, set);
    backward(problem, at(grad_out), gradient, at(q), at(k), at(v), at(r.out), lse, at(r.grad_q), at(r.grad_k),
             at(r.grad_v), threads, set);
    return r;
  }

  std::vector<std::int32_t> offsets, key_offsets;
  int64_t count, key_count;
  Exact<T> q, k, v, grad_out;
  Exact<float> grad_lse;
  std::vector<std::uint8_t> mask;
  std::vector<std::int32_t> stops;
  Problem problem;
};

template <typename T>
void check(const Exact<T>& actual, const std::vector<double>& expected, double tolerance) {
  for (int64_t i = 0; i < actual.size; ++i) {
    const double e = expected[static_cast<std::size_t>(i)], a = alit::load(actual[i]);
    CHECK(std::isinf(e) ? a == e : std::fabs(a - e) <= tolerance * (1 + std::fabs(e)));
  }
}

// Softmax written out. Rows that belong to no sequence or key keep kUnwritten.
template <typename T>
void check_case(const Case& c, Type type, double tolerance) {
  Inputs<T> x(c, type);
  const int64_t heads = c.heads, dim = c.dim;
  const auto unwritten = [](int64_t n) { return std::vector<double>(static_cast<std::size_t>(n), kUnwritten); };
  std::vector<double> out = unwritten(x.q.size), dq = out, dk = unwritten(x.k.size), dv = dk, lse = unwritten(heads * x.count);
  const auto at = [&](int64_t row, int64_t h, int64_t d) { return static_cast<std::size_t>((row * heads + h) * dim + d); };
  const auto value = [&](const Exact<T>& t, std::size_t i) {
    return static_cast<double>(alit::load(t[static_cast<int64_t>(i)]));
  };
  for (std::size_t b = 0; b < c.lengths.size(); ++b) {
    for (int64_t h = 0; h < heads; ++h) {
      for (int64_t j = x.key_offsets[b]; j < x.key_offsets[b + 1]; ++j) {
        for (int64_t d = 0; d < dim; ++d) dk[at(j, h, d)] = dv[at(j, h, d)] = 0;
      }
      for (int64_t i = x.offsets[b]; i < x.offsets[b + 1]; ++i) {
        std::vector<int64_t> keys;
        std::vector<double> p;
        double sum = 0, delta = 0;
        for (int64_t j = x.key_offsets[b]; j < x.key_offsets[b + 1]; ++j) {
          if (c.masked && !x.mask[static_cast<std::size_t>(j)]) continue;
          if (c.stopped && j - x.key_offsets[b] >= x.stops[static_cast<std::size_t>(i)]) continue;
          double s = 0;
          for (int64_t d = 0; d < dim; ++d) s += value(x.q, at(i, h, d)) * value(x.k, at(j, h, d));
          keys.push_back(j);
          p.push_back(std::exp(static_cast<double>(x.problem.scale) * s));
          sum += p.back();
        }
        const auto row = static_cast<std::size_t>(h * x.count + i);
        lse[row] = std::log(sum);
        for (int64_t d = 0; d < dim; ++d) out[at(i, h, d)] = dq[at(i, h, d)] = 0;
        for (std::size_t n = 0; n < keys.size(); ++n) {
          p[n] /= sum;
          for (int64_t d = 0; d < dim; ++d) out[at(i, h, d)] += p[n] * value(x.v, at(keys[n], h, d));
        }
        for (int64_t d = 0; d < dim; ++d) delta += out[at(i, h, d)] * value(x.grad_out, at(i, h, d));
        for (std::size_t n = 0; n < keys.size(); ++n) {
          double dp = 0;
          for (int64_t d = 0; d < dim; ++d) dp += value(x.grad_out, at(i, h, d)) * value(x.v, at(keys[n], h, d));
          const double ds = x.problem.scale * p[n] * (dp - delta + x.grad_lse[static_cast<int64_t>(row)]);
          for (int64_t d = 0; d < dim; ++d) {
            dv[at(keys[n], h, d)] += p[n] * value(x.grad_out, at(i, h, d));
            dk[at(keys[n], h, d)] += ds * value(x.q, at(i, h, d));
            dq[at(i, h, d)] += ds * value(x.k, at(keys[n], h, d));
          }
        }
      }
    }
  }
  for (const InstructionSet set : kInstructionSets) {
    if (set > best_instruction_set()) continue;
    const Result<T> one = x.run(1, set), three = x.run(3, set);
    check(one.lse, lse, 1e-5);
    check(one.out, out, tolerance);
    check(one.grad_q, dq, 4 * tolerance);
    check(one.grad_k, dk, 4 * tolerance);
    check(one.grad_v, dv, 4 * tolerance);
    const auto same = [](const auto& a, const auto& b) {
      CHECK(std::memcmp(a.data.get(), b.data.get(), static_cast<std::size_t>(a.size) * sizeof a[0]) == 0);
    };
    same(one.lse, three.lse);
    same(one.out, three.out);
    same(one.grad_q, three.grad_q);
    same(one.grad_k, three.grad_k);
    same(one.grad_v, three.grad_v);
  }
  std::fill_n(x.grad_lse.data.get(), x.grad_lse.size, 0.0f);
  const Result<T> zeros = x.run(1, InstructionSet::baseline), none = x.run(1, InstructionSet::baseline, false);
  for (int64_t i = 0; i < zeros.grad_q.size; ++i) CHECK(alit::load(zeros.grad_q[i]) == alit::load(none.grad_q[i]));
}

void check_wrong_offsets() {
  const Case c{{2, 3}, {2, 3}, 1, 4, 0, false};
  for (const std::vector<std::int32_t>& wrong : {std::vector<std::int32_t>{1, 2, 5}, {0, 3, 2}, {0, 2, 6}}) {
    Inputs<float> x(c, Type::float32);
    x.offsets = wrong;
    x.problem.queries.offsets = x.offsets.data();
    bool thrown = false;
    try {
      x.run(1, InstructionSet::baseline);
    } catch (const std::invalid_argument&) {
      thrown = true;
    }
    CHECK(thrown);
  }
}

}  // namespace

int main() {
  const std::vector<Case> cases = {
      {{}, {}, 2, 4, 1, false},
      {{0, 0}, {0, 0}, 1, 8, 2, false},
      {{5, 0, 17, 1}, {5, 0, 17, 1}, 2, 20, 3, false},
      {{2, 0, 5}, {4, 3, 0}, 2, 7, 1, false},
      {{9, 33, 66}, {9, 33, 66}, 1, 64, 5, true},
      {{3, 70}, {300, 530}, 1, 16, 0, true},  // several blocks of keys
      {{200}, {65}, 1, 128, 0, false},        // several blocks of queries; too few tasks: cut between them
      {{9, 33, 66}, {66, 9, 300}, 2, 20, 5, true, true},
      {{200}, {65}, 1, 16, 0, false, true},
      {{200}, {530}, 1, 16, 0, false},        // too few tasks backward: cut between blocks of keys
  };
  for (const Case& c : cases) {
    check_case<float>(c, Type::float32, 1e-5);
    check_case<bfloat16>(c, Type::bfloat16, 2e-2);
    check_case<float16>(c, Type::float16, 3e-3);
  }
  check_wrong_offsets();
  return 0;
}
