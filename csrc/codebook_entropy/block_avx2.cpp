// AVX2 with FMA: vectors of 8.
namespace {
constexpr int kLanes = 8;
}

#include "block_loops.h"

const alit::entropy::Blocks alit::entropy::blocks_avx2 = {forward, grad_rows, grad_codes};
