"""Products of float32 tiles by tensor cores: each factor split into three bfloat16 parts, six products of parts.

``x = high + middle + low`` exactly: the parts take 8 bits each of the 24 of a significand. Products of two parts are
exact in float32; the three whose share is below 2^-21 of the whole (middle low, low middle, low low) are left out. The
small ones are summed first.

Why not three TF32 products of two parts, which take the tensor cores as long: machine code of the forward at a head
dimension of 64 on sm_90 (64 x 32 tiles, Triton 3.7.1) needs 201 registers and 80 KiB of shared memory a block against
168 and 64, so two blocks a multiprocessor instead of three. ``wgmma`` takes TF32 only with the summed dimension last,
so values are transposed in shared memory, with eight-fold bank conflicts; probabilities have to be shuffled among
threads to become its operand, and of bfloat16 not. And the parts are not exact: emulated, TF32 used up to 5.9 times the error budget where scores
are large (129 keys, magnitude 30), and bfloat16 0.6 of it.

Tensor cores round sums towards zero. A sum over all keys or queries is therefore not left to them: the product of each step begins
with zero, and is added in float32.
"""

from __future__ import annotations

import triton
import triton.language as tl

#: The interpreter has no product of bfloat16. The parts are the same, and float32 holds their products exactly.
PART = tl.constexpr(tl.float32 if triton.knobs.runtime.interpret else tl.bfloat16)


#: Of float32.
LARGEST = tl.constexpr(3.4028234663852886e38)


@triton.jit
def _leading(b_x):
    """What the 8 leading bits of each significand stand for."""
    return (b_x.to(tl.int32, bitcast=True) & -0x10000).to(tl.float32, bitcast=True)


@triton.jit
def operand(b_x, SPLIT: tl.constexpr, FINITE: tl.constexpr = False):
    """What ``product`` takes: the tile alone, or where SPLIT its three parts, none of which has the other sign.

    Inf and NaN are in the low part, which meets no part of another factor but the high one: that is 0 for 0 alone (and
    below 2^-133), so a product with Inf is NaN where it should be. FINITE says that there is no Inf.
    """
    if SPLIT:
        b_near = b_x
        if not FINITE:
            b_near = tl.minimum(tl.maximum(b_x, -LARGEST), LARGEST)
        b_high = _leading(b_near)
        b_middle = _leading(b_near - b_high)
        b_low = (b_x - b_high) - b_middle
        parts = b_high.to(PART), b_middle.to(PART), b_low.to(PART)
    else:
        parts = (b_x,)
    return parts


@triton.jit
def factor(b_x, other, FINITE: tl.constexpr = False):
    """A computed float32 tile as a factor of a product with ``other``: split like it, or in its dtype."""
    if len(other) == 3:
        parts = operand(b_x, True, FINITE)
    else:
        parts = (b_x.to(other[0].dtype),)
    return parts


@triton.jit
def transposed(parts):
    if len(parts) == 3:
        result = tl.trans(parts[0]), tl.trans(parts[1]), tl.trans(parts[2])
    else:
        result = (tl.trans(parts[0]),)
    return result


@triton.jit
def product(a, b, b_sum=None, SWAPPED: tl.constexpr = False):
    """``b_sum + A B``. SWAPPED adds in such an order that (A B)^T rounds as the product B^T A^T that is not SWAPPED."""
    if len(a) == 3:
        if SWAPPED:
            b_ab = tl.dot(a[0], b[2])
            b_ab = tl.dot(a[1], b[1], b_ab)
            b_ab = tl.dot(a[2], b[0], b_ab)
            b_ab = tl.dot(a[0], b[1], b_ab)
            b_ab = tl.dot(a[1], b[0], b_ab)
        else:
            b_ab = tl.dot(a[2], b[0])
            b_ab = tl.dot(a[1], b[1], b_ab)
            b_ab = tl.dot(a[0], b[2], b_ab)
            b_ab = tl.dot(a[1], b[0], b_ab)
            b_ab = tl.dot(a[0], b[1], b_ab)
        b_ab = tl.dot(a[0], b[0], b_ab)
        if b_sum is not None:
            b_ab = b_sum + b_ab
    else:
        b_ab = tl.dot(a[0], b[0], b_sum, input_precision="ieee")
    return b_ab
