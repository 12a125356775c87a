// Body of scan.h, included by one file for each instruction set, after its `struct Simd`.
//
// Everything here has internal linkage and no function of the standard library is called: an inline function compiled
// for AVX-512 must not be the copy that the linker keeps for all.

#include "scan.h"

namespace {

using alit::kGroup;
using F = Simd::F;
using I = Simd::I;

constexpr int kWidth = Simd::vectors * Simd::lanes;
constexpr int kCodes = 4;  // at a time: with `vectors` vectors of queries their sums fill the registers

// Distances of V vectors of queries to four codes of a group.
template <int V>
inline void distances(const float* queries, const float* codes, std::int64_t dim, F (&sum)[V][kCodes]) {
  for (int v = 0; v < V; ++v)
    for (int c = 0; c < kCodes; ++c) sum[v][c] = Simd::broadcast(0.0f);
#pragma GCC unroll 4
  for (std::int64_t d = 0; d < dim; ++d, queries += kWidth, codes += kGroup) {
    F query[V];
    for (int v = 0; v < V; ++v) query[v] = Simd::load(queries + v * Simd::lanes);
    for (int c = 0; c < kCodes; ++c) {
      const Simd::Code code = Simd::code(codes, c);
      for (int v = 0; v < V; ++v) sum[v][c] = Simd::add_square(Simd::subtract(query[v], code), sum[v][c]);
    }
  }
}

// Least distance of each of V vectors of queries to the codes of a group.
template <int V>
inline void least_distance(const float* queries, const float* group, std::int64_t dim, F (&least)[V]) {
  for (int v = 0; v < V; ++v) least[v] = Simd::broadcast(__builtin_inff());
  for (int half = 0; half < kGroup; half += kCodes) {
    F sum[V][kCodes];
    distances<V>(queries, group + half, dim, sum);
    for (int v = 0; v < V; ++v) {
      const F here = Simd::min(Simd::min(sum[v][0], sum[v][1]), Simd::min(sum[v][2], sum[v][3]));
      least[v] = Simd::min(least[v], here);
    }
  }
}

// The two least of a sequence of distances, and the place of the first of them, for each query of a vector.
struct Least {
  F first = Simd::broadcast(__builtin_inff()), second = first;
  I where = Simd::broadcast(std::int32_t{0});

  void take(F distance, std::int64_t place) {
    where = Simd::where_less(distance, first, Simd::broadcast(static_cast<std::int32_t>(place)), where);
    second = Simd::min(second, Simd::max(distance, first));
    first = Simd::min(distance, first);
  }
};

// ByCode: places are codes, else groups, which costs less arithmetic for each distance.
template <bool ByCode>
void nearest(const float* queries, const float* codes, std::int64_t groups, std::int64_t dim, float* best,
             float* second, std::int32_t* place) {
  constexpr int V = Simd::vectors;
  Least result[V];
  for (std::int64_t g = 0; g < groups; ++g, codes += dim * kGroup) {
    if constexpr (ByCode) {
      for (int half = 0; half < kGroup; half += kCodes) {
        F sum[V][kCodes];
        distances<V>(queries, codes + half, dim, sum);
        for (int v = 0; v < V; ++v)
          for (int c = 0; c < kCodes; ++c) result[v].take(sum[v][c], g * kGroup + half + c);
      }
    } else {
      F least[V];
      least_distance<V>(queries, codes, dim, least);
      for (int v = 0; v < V; ++v) result[v].take(least[v], g);
    }
  }
  for (int v = 0; v < V; ++v) {
    Simd::store(best + v * Simd::lanes, result[v].first);
    Simd::store(second + v * Simd::lanes, result[v].second);
    Simd::store(place + v * Simd::lanes, result[v].where);
  }
}

void within(const float* queries, const float* codes, std::int64_t groups, std::int64_t dim, const float* limit,
            alit::Visit visit, void* context) {
  const F bound = Simd::load(limit);
  for (std::int64_t g = 0; g < groups; ++g, codes += dim * kGroup) {
    F least[1];
    least_distance<1>(queries, codes, dim, least);
    if (const std::uint32_t lanes = Simd::lanes_not_above(least[0], bound)) visit(context, g, lanes);
  }
}

void exact(const float* query, const float* group, std::int64_t dim, double* distance) {
  typedef float Floats __attribute__((vector_size(kGroup * sizeof(float))));
  typedef double Doubles __attribute__((vector_size(kGroup * sizeof(double))));
  Doubles sum = {};
  for (std::int64_t d = 0; d < dim; ++d) {
    Floats code;
    __builtin_memcpy(&code, group + d * kGroup, sizeof code);
    const Doubles difference = static_cast<double>(query[d]) - __builtin_convertvector(code, Doubles);
    sum += difference * difference;
  }
  __builtin_memcpy(distance, &sum, sizeof sum);
}

}  // namespace
