#include "attention.h"

#ifdef __SSE__
#include <xmmintrin.h>
#endif

#include <algorithm>
#include <atomic>
#include <cmath>
#include <memory>
#include <new>
#include <stdexcept>
#include <string>
#include <vector>

#include "../parallel.h"
#include "block.h"

namespace alit::attention {

namespace {

using std::int64_t;

const Blocks& blocks_for(InstructionSet set) {
#if defined(__x86_64__)
  if (set == InstructionSet::avx512) return blocks_avx512;
  if (set == InstructionSet::avx2) return blocks_avx2;
#endif
  (void)set;
  return blocks_baseline;
}

int64_t rounded(int64_t count, int64_t unit) { return (count + unit - 1) / unit * unit; }

void check(const Side& side, int64_t sequences, const char* name) {
  if (side.offsets == nullptr) return;
  bool fits = side.offsets[0] == 0 && side.offsets[sequences] <= side.length;
  for (int64_t b = 0; b < sequences; ++b) fits &= side.offsets[b] <= side.offsets[b + 1];
  if (!fits) throw std::invalid_argument(std::string(name) + ": expected to ascend from 0 to at most the number of rows");
}

struct Range {
  int64_t first, count;
};

Range rows_of(const Side& side, int64_t sequence) {
  if (side.offsets == nullptr) return {0, side.length};
  return {side.offsets[sequence], side.offsets[sequence + 1] - side.offsets[sequence]};
}

// One head of one sequence, and the queries of it to work on.
struct Task {
  int64_t sequence, head, first, count;
};

// One for each head of each sequence, or, where these are few and `divisible`, several, cut between blocks of queries.
std::vector<Task> tasks_of(const Problem& problem, bool divisible, int threads) {
  constexpr int64_t kTasks = 4, kGroup = 3 * kQueries;  // tasks wanted for each thread; queries worth packing keys for
  const bool cut = divisible && threads > 1 && problem.sequences * problem.heads < kTasks * threads;
  std::vector<int64_t> order(problem.sequences);
  for (int64_t b = 0; b < problem.sequences; ++b) order[b] = b;
  const auto cost = [&](int64_t b) { return rows_of(problem.queries, b).count * rows_of(problem.keys, b).count; };
  std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return cost(a) > cost(b); });
  std::vector<Task> tasks;
  for (const int64_t b : order) {
    const int64_t count = rows_of(problem.queries, b).count, group = cut ? kGroup : std::max<int64_t>(count, 1);
    for (int64_t head = 0; head < problem.heads; ++head) {
      // A sequence without queries has key gradients to clear.
      for (int64_t first = 0; first == 0 || first < count; first += group) {
        tasks.push_back({b, head, first, std::min(group, count - first)});
      }
    }
  }
  return tasks;
}

// Memory of one thread, used anew by each of its tasks.
class Workspace {
 public:
  explicit Workspace(int64_t size) : data_(new (std::align_val_t{64}) float[static_cast<std::size_t>(size)]) {}

  // `count` elements; every piece begins at a cache line.
  float* take(int64_t count) {
    float* piece = data_.get() + used_;
    used_ += rounded(count, kUnit);
    return piece;
  }

  void reset() { used_ = 0; }

  std::vector<int64_t> kept;

 private:
  struct Free {
    void operator()(float* p) const { ::operator delete[](p, std::align_val_t{64}); }
  };
  std::unique_ptr<float[], Free> data_;
  int64_t used_ = 0;
};

// Whoever is free takes the next task; which thread that is does not matter to the result.
template <typename Body>
void run(const std::vector<Task>& tasks, int64_t workspace, int threads, const Body& body) {
  std::atomic<std::size_t> next{0};
  const int workers = static_cast<int>(std::min<std::size_t>(std::max(threads, 1), tasks.size()));
  ThreadPool::instance().run(workers, threads, [&](int) {
    std::size_t task = next++;
    if (task >= tasks.size()) return;
    Workspace memory(workspace);
    for (; task < tasks.size(); task = next++) {
      memory.reset();
      body(tasks[task], memory);
    }
  });
}

template <typename T>
T* at(const Rows& rows, const Task& task, int64_t first) {
  return static_cast<T*>(rows.data) + task.sequence * rows.sequence + task.head * rows.head + first * rows.row;
}

float* at(const Sums& sums, const Task& task, int64_t first) {
  return sums.data + task.sequence * sums.sequence + task.head * sums.head + first;
}

// Rows of one head lie far apart, each on a page of its own: without being asked for in advance they come one by one.
template <int Write, typename T>
void prefetch(T* row, int64_t dim) {
  constexpr int64_t kLine = 64 / sizeof(T);
  for (int64_t d = 0; d < dim; d += kLine) __builtin_prefetch(row + d, Write);
}

constexpr int64_t kAhead = 16;  // rows

// Row i of the result, `pitch` wide, is row index[i] (or i, without an index) of `data` times `factor`, then zeros.
template <typename T>
void gather(const T* data, int64_t stride, const int64_t* index, int64_t count, int64_t dim, float factor, float* out,
            int64_t pitch) {
  for (int64_t i = 0; i < count; ++i, out += pitch) {
    const auto at = [&](int64_t j) { return data + (index == nullptr ? j : index[j]) * stride; };
    if (i + kAhead < count) prefetch<0>(at(i + kAhead), dim);
    const T* row = at(i);
    for (int64_t d = 0; d < dim; ++d) out[d] = load(row[d]) * factor;
    std::fill(out + dim, out + pitch, 0.0f);
  }
}

// The opposite of gather; row i of the result is row i times factor(i).
template <typename T, typename Factor>
void scatter(const float* rows, int64_t pitch, const int64_t* index, int64_t count, int64_t dim, const Factor& factor,
             T* out, int64_t stride) {
  for (int64_t i = 0; i < count; ++i, rows += pitch) {
    const auto at = [&](int64_t j) { return out + (index == nullptr ? j : index[j]) * stride; };
    if (i + kAhead < count) prefetch<1>(at(i + kAhead), dim);
    T* row = at(i);
    const float f = factor(i);
    for (int64_t d = 0; d < dim; ++d) row[d] = store<T>(rows[d] * f);
  }
}

// Four rows' elements d to d + 3, transposed. Four rows are `pitch` apart, four columns `panel`.
inline void transpose_4x4(const float* rows, int64_t pitch, float* out, int64_t panel) {
#ifdef __SSE__
  __m128 a = _mm_loadu_ps(rows), b = _mm_loadu_ps(rows + pitch);
  __m128 c = _mm_loadu_ps(rows + 2 * pitch), d = _mm_loadu_ps(rows + 3 * pitch);
  _MM_TRANSPOSE4_PS(a, b, c, d);
  _mm_storeu_ps(out, a);
  _mm_storeu_ps(out + panel, b);
  _mm_storeu_ps(out + 2 * panel, c);
  _mm_storeu_ps(out + 3 * panel, d);
#else
  for (int i = 0; i < 4; ++i) {
    for (int j = 0; j < 4; ++j) out[j * panel + i] = rows[i * pitch + j];
  }
#endif
}

// Rows to panels, see block.h.
void transpose(const float* rows, int64_t count, int64_t dim, int64_t pitch, float* panels, int64_t panel) {
  for (int64_t first = 0; first < count; first += panel, panels += dim * panel) {
    const int64_t here = std::min(panel, count - first), fours = here / 4 * 4, dims = dim / 4 * 4;
    for (int64_t j = 0; j < fours; j += 4) {
      for (int64_t d = 0; d < dims; d += 4) {
        transpose_4x4(rows + (first + j) * pitch + d, pitch, panels + d * panel + j, panel);
      }
    }
    for (int64_t d = 0; d < dim; ++d) {
      for (int64_t j = d < dims ? fours : 0; j < here; ++j) panels[d * panel + j] = rows[(first + j) * pitch + d];
      std::fill(panels + d * panel + here, panels + (d + 1) * panel, 0.0f);
    }
  }
}

template <typename T>
float dot(const float* a, const T* b, int64_t count) {
  constexpr int kLanes = 8;
  float part[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    for (int l = 0; l < kLanes; ++l) part[l] += a[i + l] * load(b[i + l]);
  }
  for (int l = 0; i < count; ++i, ++l) part[l] += a[i] * load(b[i]);
  return ((part[0] + part[4]) + (part[1] + part[5])) + ((part[2] + part[6]) + (part[3] + part[7]));
}

// Rows, from the first of the sequence, of the keys that take part.
void keep(const Problem& problem, const Task& task, const Range& keys, std::vector<int64_t>& kept) {
  kept.clear();
  for (int64_t j = 0; j < keys.count; ++j) {
    if (problem.mask == nullptr || problem.mask[task.sequence * problem.mask_sequence + keys.first + j]) kept.push_back(j);
  }
}

int64_t longest(const Problem& problem, const Side& side) {
  int64_t result = 0;
  for (int64_t b = 0; b < problem.sequences; ++b) result = std::max(result, rows_of(side, b).count);
  return result;
}

}  // namespace

void forward(const Problem& problem, Rows q, Rows k, Rows v, Rows out, Sums lse, int threads, InstructionSet set) {
  check(problem.queries, problem.sequences, "offsets");
  check(problem.keys, problem.sequences, "key_offsets");
  const Blocks& blocks = blocks_for(set);
  const int64_t dim = problem.dim, pitch = rounded(dim, kUnit), most = rounded(longest(problem, problem.keys), kKeys);
  const int64_t workspace = most * (2 * pitch + rounded(dim, kUnit)) + kQueries * (2 * pitch + 2) + kScores + 8 * kUnit;
  dispatch(problem.type, [&](auto element) {
    using T = decltype(element);
    run(tasks_of(problem, true, threads), workspace, threads, [&](const Task& task, Workspace& memory) {
      const Range queries = rows_of(problem.queries, task.sequence), keys = rows_of(problem.keys, task.sequence);
      keep(problem, task, keys, memory.kept);
      const auto count = static_cast<int64_t>(memory.kept.size());
      float *panels = memory.take(most * dim), *key = memory.take(most * pitch), *value = memory.take(most * pitch);
      gather(at<const T>(k, task, keys.first), k.row, memory.kept.data(), count, dim, 1.0f, key, pitch);
      gather(at<const T>(v, task, keys.first), v.row, memory.kept.data(), count, dim, 1.0f, value, pitch);
      transpose(key, count, dim, pitch, panels, blocks.panel);
      const Keys packed{count, dim, pitch, panels, value};

      float *query = memory.take(kQueries * pitch), *sums = memory.take(kQueries * pitch);
      float *largest = memory.take(kQueries), *sum = memory.take(kQueries), *scores = memory.take(kScores);
      for (int64_t i = 0; i < task.count; i += kQueries) {
        const int64_t rows = std::min(kQueries, task.count - i), first = queries.first + task.first + i;
        gather(at<const T>(q, task, first), q.row, nullptr, rows, dim, problem.scale, query, pitch);
        if (count > 0) {
          blocks.forward(packed, {rows, query}, sums, largest, sum, scores);
        } else {
          std::fill_n(sums, rows * pitch, 0.0f);
          std::fill_n(largest, rows, 0.0f);
          std::fill_n(sum, rows, 0.0f);
        }
        float* logarithm = at(lse, task, first);
        for (int64_t r = 0; r < rows; ++r) logarithm[r] = largest[r] + std::log(sum[r]);
        const auto inverse = [&](int64_t r) { return sum[r] == 0.0f ? 0.0f : 1.0f / sum[r]; };
        scatter(sums, pitch, nullptr, rows, dim, inverse, at<T>(out, task, first), out.row);
      }
    });
  });
}

void backward(const Problem& problem, Rows grad_out, Sums grad_lse, Rows q, Rows k, Rows v, Rows out, Sums lse, Rows grad_q,
              Rows grad_k, Rows grad_v, int threads, InstructionSet set) {
  check(problem.queries, problem.sequences, "offsets");
  check(problem.keys, problem.sequences, "key_offsets");
  const Blocks& blocks = blocks_for(set);
  const int64_t dim = problem.dim, pitch = rounded(dim, kUnit), most = rounded(longest(problem, problem.keys), kKeys);
  const int64_t workspace = most * (4 * pitch + 2 * rounded(dim, kUnit)) + kQueries * (3 * pitch + 2) + 2 * kScores;
  dispatch(problem.type, [&](auto element) {
    using T = decltype(element);
    run(tasks_of(problem, false, threads), workspace, threads, [&](const Task& task, Workspace& memory) {
      const Range queries = rows_of(problem.queries, task.sequence), keys = rows_of(problem.keys, task.sequence);
      keep(problem, task, keys, memory.kept);
      const auto count = static_cast<int64_t>(memory.kept.size());
      float *key = memory.take(most * pitch), *value = memory.take(most * pitch);
      float *key_panels = memory.take(most * dim), *value_panels = memory.take(most * dim);
      gather(at<const T>(k, task, keys.first), k.row, memory.kept.data(), count, dim, 1.0f, key, pitch);
      gather(at<const T>(v, task, keys.first), v.row, memory.kept.data(), count, dim, 1.0f, value, pitch);
      transpose(key, count, dim, pitch, key_panels, blocks.panel);
      transpose(value, count, dim, pitch, value_panels, blocks.panel);
      const Keys packed{count, dim, pitch, key_panels, nullptr, value_panels, key};
      float* key_gradient = memory.take(most * pitch);
      float* value_gradient = value;  // not needed any more
      std::fill_n(key_gradient, count * pitch, 0.0f);
      std::fill_n(value_gradient, count * pitch, 0.0f);

      float *query = memory.take(kQueries * pitch), *gradient = memory.take(kQueries * pitch);
      float *query_gradient = memory.take(kQueries * pitch), *scores = memory.take(2 * kScores);
      float *sum = memory.take(kQueries), *delta = memory.take(kQueries);
      for (int64_t i = 0; i < task.count; i += kQueries) {
        const int64_t rows = std::min(kQueries, task.count - i), first = queries.first + i;
        gather(at<const T>(q, task, first), q.row, nullptr, rows, dim, problem.scale, query, pitch);
        gather(at<const T>(grad_out, task, first), grad_out.row, nullptr, rows, dim, 1.0f, gradient, pitch);
        const float *logarithm = at(lse, task, first), *its_gradient = at(grad_lse, task, first);
        for (int64_t r = 0; r < rows; ++r) {
          const bool none = logarithm[r] == -INFINITY;  // no key, no gradient, whatever comes in
          sum[r] = none ? INFINITY : logarithm[r];
          delta[r] = dot(gradient + r * pitch, at<const T>(out, task, first + r), dim) - (none ? 0.0f : its_gradient[r]);
        }
        if (count > 0) {
          blocks.backward(packed, {rows, query, gradient, sum, delta}, query_gradient, key_gradient, value_gradient, scores);
        } else {
          std::fill_n(query_gradient, rows * pitch, 0.0f);
        }
        const auto scale = [&](int64_t) { return problem.scale; };
        scatter(query_gradient, pitch, nullptr, rows, dim, scale, at<T>(grad_q, task, first), grad_q.row);
      }
      const auto one = [](int64_t) { return 1.0f; };
      T *grad_key = at<T>(grad_k, task, keys.first), *grad_value = at<T>(grad_v, task, keys.first);
      for (int64_t j = 0; count < keys.count && j < keys.count; ++j) {
        std::fill_n(grad_key + j * grad_k.row, dim, store<T>(0.0f));
        std::fill_n(grad_value + j * grad_v.row, dim, store<T>(0.0f));
      }
      scatter(key_gradient, pitch, memory.kept.data(), count, dim, one, grad_key, grad_k.row);
      scatter(value_gradient, pitch, memory.kept.data(), count, dim, one, grad_value, grad_v.row);
    });
  });
}

}  // namespace alit::attention
