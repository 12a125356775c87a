// AVX-512: vectors of 16.
namespace {
constexpr int kLanes = 16;
}

#include "block_loops.h"

const alit::entropy::Blocks alit::entropy::blocks_avx512 = {forward, grad_rows, grad_codes};
