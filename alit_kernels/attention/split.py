"""Products of float32 tiles by tensor cores: each factor split into three bfloat16 parts, six products of parts.

``x = high + middle + low`` exactly: the parts take 8 bits each of the 24 of a significand. Products of two parts are
exact in float32. Three of them, whose share of the whole is below 2^-21 (middle low, low middle, low low), are left
out; the small ones are summed first.

Why not three products of two TF32 parts, which would take the tensor cores as long? Two parts are not exact, which
shows where scores are large. And ``wgmma`` takes TF32 only with the summed dimension last: values would be transposed
in shared memory, with bank conflicts, and probabilities shuffled among threads to become its operand. Operands of
bfloat16 are taken either way, and probabilities are where they are needed. How much of the error budget is used,
``tests/alit_kernels/test_attention_split.py`` prints and holds, with sums that are rounded as tensor cores do it.
It has not been measured on a GPU.

Tensor cores round sums towards zero. A sum over all keys or queries is therefore not left to them: the product of each
step begins with zero, and is added in float32.
"""

from __future__ import annotations

import triton
import triton.language as tl

#: The interpreter has no product of bfloat16. The parts are the same, and float32 holds their products exactly.
PART = tl.constexpr(tl.float32 if triton.knobs.runtime.interpret else tl.bfloat16)


#: Largest float32.
LARGEST = tl.constexpr(3.4028234663852886e38)


@triton.jit
def operand(b_x, SPLIT: tl.constexpr, FINITE: tl.constexpr = False):
    """Operand of ``product``: the tile alone, or where SPLIT its three parts, none of which has the other sign.

    Inf and NaN are in the low part, which meets no part of another factor but the high one: that is 0 for 0 alone (and
    below 2^-133), so a product with Inf is NaN where it should be. FINITE says that there is no Inf.
    """
    if SPLIT:
        b_near = b_x
        if not FINITE:
            b_near = tl.minimum(tl.maximum(b_x, -LARGEST), LARGEST)
        # The 8 leading bits of each significand.
        b_high = (b_near.to(tl.int32, bitcast=True) & -0x10000).to(tl.float32, bitcast=True)
        b_near -= b_high
        b_middle = (b_near.to(tl.int32, bitcast=True) & -0x10000).to(tl.float32, bitcast=True)
        b_low = (b_x - b_high) - b_middle
        parts = b_high.to(PART), b_middle.to(PART), b_low.to(PART)
    else:
        parts = (b_x,)  # type: ignore[assignment]
    return parts


@triton.jit
def factor(b_x, other, FINITE: tl.constexpr = False):
    """A computed float32 tile as a factor of a product with ``other``: split like it, or in its dtype."""
    return operand(b_x, True, FINITE) if len(other) == 3 else (b_x.to(other[0].dtype),)


@triton.jit
def product(a, b, b_sum=None, TRANSPOSED: tl.constexpr = False, SWAPPED: tl.constexpr = False):
    """``b_sum + A B``, or ``A B^T`` where TRANSPOSED. SWAPPED adds in such an order that A B^T rounds as the B A^T that
    is not SWAPPED.
    """
    b_0 = tl.trans(b[0]) if TRANSPOSED else b[0]
    if len(a) == 3:
        b_1 = tl.trans(b[1]) if TRANSPOSED else b[1]
        b_2 = tl.trans(b[2]) if TRANSPOSED else b[2]
        if SWAPPED:
            b_ab = tl.dot(a[0], b_2)
            b_ab = tl.dot(a[1], b_1, b_ab)
            b_ab = tl.dot(a[2], b_0, b_ab)
            b_ab = tl.dot(a[0], b_1, b_ab)
            b_ab = tl.dot(a[1], b_0, b_ab)
        else:
            b_ab = tl.dot(a[2], b_0)
            b_ab = tl.dot(a[1], b_1, b_ab)
            b_ab = tl.dot(a[0], b_2, b_ab)
            b_ab = tl.dot(a[1], b_0, b_ab)
            b_ab = tl.dot(a[0], b_1, b_ab)
        b_ab = tl.dot(a[0], b_0, b_ab)
        if b_sum is not None:
            b_ab = b_sum + b_ab
    else:
        b_ab = tl.dot(a[0], b_0, b_sum, input_precision="ieee")
    return b_ab


@triton.jit
def operands(chunks, SPLIT: tl.constexpr):
    """Operands of all chunks of some rows (a tuple, each of some of their channels)."""
    return [operand(b_x, SPLIT) for b_x in chunks]


@triton.jit
def factors(chunks, SPLIT: tl.constexpr):
    """Operands of loaded chunks: a single chunk is split here; several are left whole until multiplied (``_parts``)."""
    return operands(chunks, SPLIT and len(chunks) == 1)


@triton.jit
def _parts(b, a):
    """A chunk of ``factors`` as an operand, split where ``a`` is."""
    return operand(b[0], len(a) == 3) if len(b) == 1 else b


@triton.jit
def scores(a, b, SWAPPED: tl.constexpr = False):
    """A B^T, the sum over chunks, whose order does not depend on which of the factors is A."""
    b_s = product(a[0], _parts(b[0], a[0]), None, True, SWAPPED)
    for i in tl.static_range(1, len(a)):
        b_s = product(a[i], _parts(b[i], a[i]), b_s, True, SWAPPED)
    return b_s


@triton.jit
def added(sums, a, b):
    """Chunks of sums + A B; ``a`` has no channels, so it is one factor for all chunks."""
    chunks = ()
    for i in tl.static_range(len(b)):
        chunks += (product(a, _parts(b[i], a), sums[i]),)
    return chunks
