// AVX-512: 4 rows by 4 vectors of 16 are 16 sums, 4 vectors and a number: two thirds of the 32 registers.
namespace {
constexpr int kLanes = 16, kRows = 4, kVectors = 4;
}

#include "block_loops.h"

const alit::attention::Blocks<float> alit::attention::blocks_avx512 = {kPanel, forward, backward};
