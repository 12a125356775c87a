// AVX2 with FMA: 6 rows by 2 vectors of 8 are 12 sums, 2 vectors and a number of 16 registers.
namespace {
constexpr int kLanes = 8, kRows = 6, kVectors = 2;
}

#include "block_loops.h"

const alit::attention::Blocks<float> alit::attention::blocks_avx2 = {kPanel, forward, backward};
