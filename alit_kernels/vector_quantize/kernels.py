"""Vector quantization in Triton: search, then one pass for gather and losses; backward one pass for z, sorted runs for
the codebook (see codebook_statistics/kernels.py).

Losses are summed in two stages of fixed order, block sums and their sum. The codebook's gradient uses no
atomics: the sort is the price of short keys, and nothing has shown atomics to be faster.
Under "cosine" vectors and codes are normalised by torch before the search, bit for bit as in the reference, since the
exactness bound speaks of the normalised vectors.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._triton import TYPES, as_rows, cdiv, device_of
from .._vectors import unit
from ..aot import Build
from ..codebook_statistics import kernels as statistics
from ..codebook_statistics.kernels import sum_of_code, tile
from ..nearest_codeword.kernels import search

EPSILON = tl.constexpr(1e-12)


@triton.jit(do_not_specialize=["rows"])
def _gather(
    p_z,
    p_codes,
    p_index,
    p_mask,
    p_quantized,
    p_partial,
    p_count,
    rows,
    z_pitch,
    D: tl.constexpr,
    MASKED: tl.constexpr,
    BM: tl.constexpr,
    BD: tl.constexpr,
):
    """Quantized rows, and a block's sum of (q - z)^2 and number of rows that take part."""
    block = tl.program_id(0).to(tl.int64)
    o_row = block * BM + tl.arange(0, BM)
    o_dim = tl.arange(0, BD)
    m_stored = o_row < rows
    m_row = m_stored
    if MASKED:
        m_row &= tl.load(p_mask + o_row, mask=m_row, other=0) != 0
    m_tile = m_row[:, None] & (o_dim < D)[None, :]
    o_code = tl.load(p_index + o_row, mask=m_row, other=0)
    b_q = tl.load(p_codes + o_code[:, None] * D + o_dim[None, :], mask=m_tile, other=0.0)
    b_z = tl.load(p_z + o_row[:, None] * z_pitch + o_dim[None, :], mask=m_tile, other=0.0)
    b_step = b_q.to(tl.float32) - b_z.to(tl.float32)
    tl.store(p_partial + block, tl.sum(tl.sum(b_step * b_step, 1), 0))
    tl.store(p_count + block, tl.sum(m_row.to(tl.int32), 0))
    m_tile = m_stored[:, None] & (o_dim < D)[None, :]
    p_tile = p_quantized + o_row[:, None] * D + o_dim[None, :]
    tl.store(p_tile, b_q.to(p_quantized.dtype.element_ty), mask=m_tile)


@triton.jit(do_not_specialize=["blocks"])
def _losses(
    p_partial,
    p_count,
    p_loss,
    p_commitment,
    p_codebook,
    blocks,
    dim,
    commitment,
    BLOCK: tl.constexpr,
):
    """The three losses from the blocks' sums, in one program."""
    o_block = tl.arange(0, BLOCK)
    b_sum = tl.zeros([BLOCK], tl.float32)
    b_count = tl.zeros([BLOCK], tl.int64)
    for start in range(0, blocks, BLOCK):
        m_block = start + o_block < blocks
        b_sum += tl.load(p_partial + start + o_block, mask=m_block, other=0.0)
        b_count += tl.load(p_count + start + o_block, mask=m_block, other=0)
    elements = tl.maximum(tl.sum(b_count, 0) * dim, 1).to(tl.float32)
    codebook_loss = tl.sum(b_sum, 0) / elements
    tl.store(p_codebook, codebook_loss)
    tl.store(p_commitment, commitment * codebook_loss)
    tl.store(p_loss, commitment * codebook_loss + codebook_loss)


@triton.jit
def _through_unit(b_grad, b_x, b_norm):
    """Gradient through x / max(norm, eps) of rows: (g - u (u . g)) / norm, and g / eps where the norm is below eps."""
    b_safe = tl.broadcast_to(tl.maximum(b_norm, EPSILON)[:, None], b_x.shape)
    b_u = tl.div_rn(b_x, b_safe)  # in one dimension exactly 1 or -1, and the gradient exactly 0
    b_along = tl.where(b_norm > EPSILON, tl.sum(b_u * b_grad, 1), 0.0)[:, None]
    return (b_grad - b_u * b_along) / b_safe


@triton.jit
def _slope(p_count, elements, dim, MASKED: tl.constexpr):
    """2 / M, M the number of elements that take part."""
    if MASKED:
        return 2.0 / tl.maximum(tl.load(p_count) * dim, 1).to(tl.float32)
    else:
        return 2.0 / elements


@triton.jit(do_not_specialize=["rows"])
def _grad_z(
    p_grad,
    p_grad_loss,
    p_grad_commitment,
    p_z,
    p_codes,
    p_index,
    p_mask,
    p_count,
    p_norm,
    p_result,
    rows,
    grad_pitch,
    z_pitch,
    elements,
    commitment,
    D: tl.constexpr,
    COSINE: tl.constexpr,
    MASKED: tl.constexpr,
    BM: tl.constexpr,
    BD: tl.constexpr,
):
    """du = dquantized + 2 c (u - q) dcommitment / M; under cosine through the normalisation, norms are stored."""
    o_row = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    o_dim = tl.arange(0, BD)
    m_stored = o_row < rows
    m_row = m_stored
    if MASKED:
        m_row &= tl.load(p_mask + o_row, mask=m_row, other=0) != 0
    m_tile = m_row[:, None] & (o_dim < D)[None, :]
    o_code = tl.load(p_index + o_row, mask=m_row, other=0)
    b_q = tl.load(p_codes + o_code[:, None] * D + o_dim[None, :], mask=m_tile, other=0.0)
    p_tile = p_z + o_row[:, None] * z_pitch + o_dim[None, :]
    b_z = tl.load(p_tile, mask=m_tile, other=0.0).to(tl.float32)
    p_tile = p_grad + o_row[:, None] * grad_pitch + o_dim[None, :]
    b_grad = tl.load(p_tile, mask=m_tile, other=0.0).to(tl.float32)
    scale = _slope(p_count, elements, D, MASKED)
    scale *= commitment * (tl.load(p_grad_loss) + tl.load(p_grad_commitment))
    if COSINE:
        b_norm = tl.sqrt_rn(tl.sum(b_z * b_z, 1))
        b_u = tl.div_rn(b_z, tl.broadcast_to(tl.maximum(b_norm, EPSILON)[:, None], b_z.shape))
        b_grad = _through_unit(b_grad + scale * (b_u - b_q), b_z, b_norm)
        tl.store(p_norm + o_row, tl.maximum(b_norm, EPSILON), mask=m_stored)
    else:
        b_grad += scale * (b_z - b_q)
    m_tile = m_stored[:, None] & (o_dim < D)[None, :]
    b_grad = tl.where(m_row[:, None], b_grad, 0.0)
    p_tile = p_result + o_row[:, None] * D + o_dim[None, :]
    tl.store(p_tile, b_grad.to(p_result.dtype.element_ty), mask=m_tile)


@triton.jit
def _grad_codes(
    p_partial,
    p_bounds,
    p_grad_loss,
    p_grad_codebook,
    p_codebook,
    p_count,
    p_result,
    elements,
    codebook_pitch,
    D: tl.constexpr,
    COSINE: tl.constexpr,
    MASKED: tl.constexpr,
    CHUNK: tl.constexpr,
    BR: tl.constexpr,
    BD: tl.constexpr,
):
    """dq = 2 (q - u) dcodebook / M summed over one code's vectors; under cosine through the normalisation."""
    code = tl.program_id(0)
    o_dim = tl.arange(0, BD)
    scale = _slope(p_count, elements, D, MASKED)
    scale *= tl.load(p_grad_loss) + tl.load(p_grad_codebook)
    _, b_sum = sum_of_code(p_partial, p_bounds, code, D, CHUNK, BR, BD)
    b_grad = b_sum * scale
    if COSINE:
        p_row = p_codebook + code.to(tl.int64) * codebook_pitch + o_dim
        b_code = tl.load(p_row, mask=o_dim < D, other=0.0).to(tl.float32)[None, :]
        b_norm = tl.sqrt_rn(tl.sum(b_code * b_code, 1))
        b_grad = tl.sum(_through_unit(b_grad[None, :], b_code, b_norm), 0)
    b_grad = b_grad.to(p_result.dtype.element_ty)
    tl.store(p_result + code.to(tl.int64) * D + o_dim, b_grad, mask=o_dim < D)


def vector_quantize(
    z: Tensor,
    codebook: Tensor,
    mask: Tensor | None,
    metric: str,
    commitment: float,
    precision: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See :func:`alit_kernels.vector_quantize`."""
    cosine = metric == "cosine"
    u, codes = (unit(z), unit(codebook)) if cosine else (z, codebook.contiguous())
    u, flat_mask = as_rows(u), None if mask is None else mask.reshape(-1).contiguous()
    rows, dim = u.shape
    index = search(u, codes, precision, flat_mask)
    quantized = torch.empty(z.shape, dtype=z.dtype, device=z.device)
    height, width = tile(dim)
    blocks = cdiv(rows, height)
    partial = torch.empty(blocks, dtype=torch.float32, device=z.device)
    count = torch.empty(blocks, dtype=torch.int32, device=z.device)
    losses = [torch.empty((), dtype=torch.float32, device=z.device) for _ in range(3)]
    with device_of(z):
        if blocks:
            _gather[(blocks,)](
                u, codes, index, flat_mask, quantized, partial, count, rows, u.stride(0),
                dim, mask is not None, height, width,
            )  # fmt: skip
        _losses[(1,)](partial, count, *losses, blocks, dim, commitment, 1024)
    loss, commitment_loss, codebook_loss = losses
    return quantized, index.view(z.shape[:-1]), loss, commitment_loss, codebook_loss


def vector_quantize_backward(
    grad_quantized: Tensor,
    grad_loss: Tensor,
    grad_commitment: Tensor,
    grad_codebook: Tensor,
    z: Tensor,
    codebook: Tensor,
    index: Tensor,
    mask: Tensor | None,
    metric: str,
    commitment: float,
    codebook_wanted: bool,
) -> tuple[Tensor, Tensor]:
    """See the reference for the formulas."""
    cosine, masked = metric == "cosine", mask is not None
    codes = unit(codebook) if cosine else codebook.float()
    codes, codebook = codes.contiguous(), as_rows(codebook)
    flat, grad = as_rows(z), as_rows(grad_quantized)
    flat_index = index.reshape(-1).contiguous()
    flat_mask = mask.reshape(-1).contiguous() if mask is not None else None
    (rows, dim), num_codes = flat.shape, codebook.shape[0]
    elements = float(max(1, z.numel()))
    height, width = tile(dim)
    grad_z = torch.empty(z.shape, dtype=z.dtype, device=z.device)
    norm = torch.empty(rows, dtype=torch.float32, device=z.device) if cosine else None
    with device_of(z):
        count = flat_mask.sum() if flat_mask is not None else None
        if rows:
            _grad_z[(cdiv(rows, height),)](
                grad, grad_loss, grad_commitment, flat, codes, flat_index, flat_mask, count, norm,
                grad_z, rows, grad.stride(0), flat.stride(0), elements, commitment,
                dim, cosine, masked, height, width,
            )  # fmt: skip
        if not codebook_wanted:
            return grad_z, codebook.new_empty(0)
        grad_codes = torch.empty(codebook.shape, dtype=codebook.dtype, device=z.device)
        run = statistics.runs(flat_index, num_codes, flat_mask)
        partial = statistics.chunk_sums(flat, run, norm=norm, codes=codes)
        _grad_codes[(num_codes,)](
            partial, run.bounds, grad_loss, grad_codebook, codebook, count, grad_codes, elements,
            codebook.stride(0), dim, cosine, masked, statistics.CHUNK, *tile(dim),
        )  # fmt: skip
    return grad_z, grad_codes


def builds() -> Iterator[Build]:
    for dim in (12, 64, 256):
        for dtype in (torch.float32, torch.bfloat16):
            for cosine, masked in ((True, True), (False, False)):
                yield from _builds(dim, dtype, cosine, masked)
    pointers = {"p_partial": "*fp32", "p_count": "*i32"}
    pointers |= dict.fromkeys(("p_loss", "p_commitment", "p_codebook"), "*fp32")
    sizes = {"blocks": "i32", "dim": "i32", "commitment": "fp32"}
    yield Build(_losses, "", pointers | sizes, {"BLOCK": 1024}, divisible=tuple(pointers))


def _builds(dim: int, dtype: torch.dtype, cosine: bool, masked: bool) -> Iterator[Build]:
    height, width = tile(dim)
    element = f"*{TYPES[dtype]}"
    label = f"d={dim} {TYPES[dtype]}{' cosine' * cosine}{' masked' * masked}"
    absent = {} if masked else {"p_mask": None, "p_count": None}
    shape = {"D": dim, "MASKED": masked, "BM": height, "BD": width}
    vector = "*fp32" if cosine else element

    def build(
        kernel: object, pointers: dict[str, str], sizes: dict[str, str], **constants: object
    ) -> Build:
        divisible = [name for name in pointers if name not in constants]
        divisible += [name for name in sizes if name.endswith("pitch") and dim % 16 == 0]
        return Build(kernel, label, pointers | sizes, constants, divisible=tuple(divisible))

    pointers = {"p_z": vector, "p_codes": vector, "p_index": "*i64", "p_mask": "*i1"}
    pointers |= {"p_quantized": element, "p_partial": "*fp32", "p_count": "*i32"}
    gather_absent = {name: None for name in absent if name == "p_mask"}
    sizes = {"rows": "i32", "z_pitch": "i32"}
    yield build(_gather, pointers, sizes, **shape, **gather_absent)
    pointers = {
        "p_grad": element,
        "p_grad_loss": "*fp32",
        "p_grad_commitment": "*fp32",
        "p_z": element,
    }
    pointers |= {"p_codes": "*fp32", "p_index": "*i64", "p_mask": "*i1", "p_count": "*i64"}
    pointers |= {"p_norm": "*fp32", "p_result": element}
    sizes |= {"grad_pitch": "i32", "elements": "fp32", "commitment": "fp32"}
    no_norm = {} if cosine else {"p_norm": None}
    yield build(_grad_z, pointers, sizes, **shape, **absent, **no_norm, COSINE=cosine)
    rows, width = tile(dim)
    pointers = {"p_partial": "*fp64", "p_bounds": "*i32", "p_grad_loss": "*fp32"}
    pointers |= {"p_grad_codebook": "*fp32", "p_codebook": element, "p_count": "*i64"}
    pointers |= {"p_result": element}
    sizes = {"elements": "fp32", "codebook_pitch": "i32"}
    no_count = {} if masked else {"p_count": None}
    constants = {"D": dim, "COSINE": cosine, "MASKED": masked}
    constants |= {"CHUNK": statistics.CHUNK, "BR": rows, "BD": width}
    yield build(_grad_codes, pointers, sizes, **constants, **no_count)
