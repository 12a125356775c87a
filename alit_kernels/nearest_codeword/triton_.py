"""The op's implementation ``triton``: chooses tiles, allocates, and launches the kernels of ``kernels.py``."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._triton import architecture, as_rows, cdiv, launch, next_power_of_2
from . import kernels

#: Multiprocessors of the GPUs that tiles are chosen for: the codebook is cut into parts so that programs fill them.
MULTIPROCESSORS = 132
#: Most parts of the codebook, unless it has more than PARTS * STEPS tiles.
PARTS = 8
#: Most tiles of codes in a part: the number of a tile is kept in the last bits of a score.
STEPS = 32
CODES = 64  # codes in a tile
#: The largest D in which the vectors of a program stay in shared memory.
RESIDENT = 256
#: The largest D in which the exact search takes three products; above, one costs less, with what it leaves in doubt.
THREE = 32


def tile(dim: int, gpu: int) -> dict[str, Any]:
    """Launch table of ``propose_kernel``: vectors, codes and channels of a step, and launch options.

    Chosen by the machine code; no GPU has measured it.

    Args:
        gpu: 10 times the compute capability. 128 vectors of 256 channels take 128 KiB of shared memory, which smaller
            chips do not have.
    """
    small = gpu in (86, 89) or gpu >= 120
    wide = 128 < dim <= RESIDENT and not small
    return {
        "BM": 128 if wide else 64,
        "BK": CODES,
        "BD": channels(dim) if dim <= RESIDENT else 64,
        "num_warps": 8 if wide else 4,
        "num_stages": 2 if dim <= RESIDENT or small else 3,
    }


def channels(dim: int) -> int:
    """D padded for products, to one step or to steps of 64."""
    return max(16, next_power_of_2(dim)) if dim <= RESIDENT else cdiv(dim, 64) * 64


def rounding(dim: int, steps: int) -> float:
    """The part of a score's error that is relative to |z| R + R^2 / 2: see ``kernels.py``."""
    sums = (dim + 4) * 2.0**-22
    return sums + dim**0.5 * 2.0**-27 + (dim + 5) * 2.0**-24 + steps * 2.0**-23


class Parts(NamedTuple):
    """Vectors and codes as products take them: around a center, in parts of float16.

    Attributes:
        rows: (1, N, DP) float16, or with low parts (2, N, DP); DP is ``channels(D)``, beyond D zeros.
        row_norms: (3, N) float32: |z|^2 / 2, the power, and the squared norm of what the high part leaves.
        codes: (1 or 2, K, DP) float16, K padded to a multiple of ``CODES``.
        largest: (2, blocks) float32: the largest |c|^2 / 2 and squared norm of what is left, of some codes each.
    """

    rows: Tensor
    row_norms: Tensor
    codes: Tensor
    largest: Tensor


class Prepared(NamedTuple):
    """Vectors and codes as a search reads them.

    Attributes:
        z: (N, D), what is searched for, normalized under "cosine", and then float32.
        codes: (K, D), contiguous, likewise.
        norms: (1, K) float32, |c|^2 / 2, infinite for codes that are not finite; with ``parts`` as ``row_norms``, the
            first 2^126 for those, and for the codes to which K is padded.
        parts: None where no products were asked for.
    """

    z: Tensor
    codes: Tensor
    norms: Tensor
    parts: Parts | None


def prepare(z: Tensor, codebook: Tensor, *, cosine: bool, products: int = 0) -> Prepared:
    """:class:`Prepared` of z (N, D) and codebook (K, D), with parts for ``products`` products, by one launch."""
    z, codebook = as_rows(z), as_rows(codebook) if cosine else codebook.contiguous()
    (rows, dim), codes, device = z.shape, len(codebook), z.device
    width = next_power_of_2(max(16 if products else 1, dim))
    size = 2048 if not products or dim <= 64 else 4096 if cosine else 16384
    height = max(1, min(128, size // width))
    padded = cdiv(codes, CODES) * CODES if products else codes
    blocks = cdiv(padded, height)
    u, units, parts = None, None, None
    if cosine:
        u = torch.empty(rows, dim, dtype=torch.float32, device=device)
        units = torch.empty(codes, dim, dtype=torch.float32, device=device)
    norms = torch.empty(3 if products else 1, padded, dtype=torch.float32, device=device)
    if products:
        both = 1 if products == 1 else 2
        parts = Parts(
            torch.empty(both, rows, channels(dim), dtype=torch.float16, device=device),
            torch.empty(3, rows, dtype=torch.float32, device=device),
            torch.empty(both, padded, channels(dim), dtype=torch.float16, device=device),
            torch.empty(2, blocks, dtype=torch.float32, device=device),
        )
    launch(
        kernels.prepare_kernel,
        (blocks + (cdiv(rows, height) if cosine or products else 0),),
        p_codebook=codebook,
        p_z=z,
        p_codes=units,
        p_u=u,
        p_code_norms=norms,
        p_row_norms=parts and parts.row_norms,
        p_code_parts=parts and parts.codes,
        p_row_parts=parts and parts.rows,
        p_largest=parts and parts.largest,
        rows=rows,
        codes=codes,
        padded=padded,
        code_blocks=blocks,
        z_pitch=z.stride(0),
        codebook_pitch=codebook.stride(0),
        D=dim,
        DP=channels(dim),
        NORMALIZED=cosine,
        PRODUCTS=products,
        SOME=8,
        BK=height,
        BD=width,
        LINE=min(width, 32),
    )
    return Prepared(z if u is None else u, codebook if units is None else units, norms, parts)


def nearest_codeword(z: Tensor, codebook: Tensor, metric: str, precision: str) -> Tensor:
    """Index (N,) int64 of the nearest codeword; see :func:`alit_kernels.nearest_codeword`."""
    return search(z, codebook, metric, precision)


def search(
    z: Tensor, codebook: Tensor, metric: str, precision: str, mask: Tensor | None = None
) -> Tensor:
    """Index (N,) int64 of the codeword nearest to each row of ``z`` (N, D), 0 where ``mask`` is False.

    Blocks of 64 or 128 rows that are all masked are not searched.
    """
    index = torch.empty(len(z), dtype=torch.int64, device=z.device)
    if not len(z):
        return index
    exact, cosine = precision == "ieee", metric == "cosine"
    products = 3 if exact and z.shape[1] <= THREE else 1
    found = prepare(z, codebook, cosine=cosine, products=products)
    mask = None if mask is None else mask.contiguous()
    proposed = propose(found, mask, products)
    settle(found, mask, proposed, index, products, exact=exact)
    return index


class Proposed(NamedTuple):
    """The best codes of each part of the codebook.

    Attributes:
        score: (2 * parts, N) float32: scores of the best and of the second code.
        code: (2 * parts, N) int32: these codes.
        others: (4 * parts, N) float32: the least score of all others, in each of four cells.
        size: codes of a cell.
        most: number of tile numbers that the last bits of a score can hold.
    """

    score: Tensor
    code: Tensor
    others: Tensor
    size: int
    most: int


def propose(found: Prepared, mask: Tensor | None, products: int) -> Proposed:
    """Best codes of each part of the codebook, by scores of all codes on tensor cores."""
    (rows, dim), device, parts = found.z.shape, found.z.device, found.parts
    assert parts is not None
    padded = found.norms.shape[1]
    chosen = tile(dim, architecture(device))
    tiles = padded // CODES
    least = cdiv(tiles, STEPS)
    places = MULTIPROCESSORS * (3 if dim <= 128 else 8 // chosen["num_warps"])
    wanted = min(max(least, min(tiles, PARTS)), max(least, places // cdiv(rows, chosen["BM"])))
    steps = cdiv(tiles, wanted)
    count = cdiv(tiles, steps)
    score = torch.empty(2 * count, rows, dtype=torch.float32, device=device)
    others = torch.empty(4 * count, rows, dtype=torch.float32, device=device)
    code = torch.empty(2 * count, rows, dtype=torch.int32, device=device)
    most = min(STEPS, next_power_of_2(tiles))
    launch(
        kernels.propose_kernel,
        (cdiv(rows, chosen["BM"]), count),
        p_row_parts=parts.rows,
        p_row_norms=parts.row_norms,
        p_code_parts=parts.codes,
        p_code_norms=found.norms,
        p_mask=mask,
        p_score=score,
        p_code=code,
        p_others=others,
        rows=rows,
        padded=padded,
        steps=steps,
        MASKED=mask is not None,
        PRODUCTS=products,
        STEPS=most,
        DP=parts.rows.shape[2],
        **chosen,
    )
    return Proposed(score, code, others, steps * CODES // 4, most)


def error_bounds(found: Prepared, proposed: Proposed, products: int) -> Tensor:
    """Error bounds of each row's scores, as ``settle_kernel`` computes them; for tests and inspection.

    Returns:
        (2, N) float64: the part that comes from what products leave out, and that of sums and norms.
    """
    assert found.parts is not None
    half, _, left = found.parts.row_norms.double()
    largest_half, largest_left = found.parts.largest.double().amax(1)
    norm, radius = (2 * half).sqrt(), (2 * largest_half).sqrt()
    left, radius_left = left.sqrt(), largest_left.sqrt()
    linear = 1.0 if products == 1 else 2.0**-11
    parts = linear * (left * radius + norm * radius_left) + left * radius_left
    sums = rounding(found.z.shape[1], proposed.most) * (norm * radius + largest_half)
    return torch.stack([parts, sums])


def settle(
    found: Prepared,
    mask: Tensor | None,
    proposed: Proposed,
    index: Tensor,
    products: int,
    *,
    exact: bool,
) -> Tensor | None:
    """Write the nearest codes into ``index`` (N,), or without ``exact`` those of the best scores.

    Returns:
        (N,) float32, the limit of the scores of rows in doubt: cells with others below it were scanned for them. -inf
        for other rows. None without ``exact``.
    """
    (rows, dim), codes, device, parts = found.z.shape, len(found.codes), found.z.device, found.parts
    assert parts is not None
    count, height = len(proposed.others) // 4, 32
    limit = scanned = None
    if exact:
        limit = torch.empty(rows, dtype=torch.float32, device=device)
        scanned = torch.empty(cdiv(rows, height), dtype=torch.int32, device=device)
    width = max(16, next_power_of_2(dim))
    shared: dict[str, Any] = {
        "p_z": found.z,
        "p_codes": found.codes,
        "p_others": proposed.others,
        "p_index": index,
        "p_limit": limit,
        "p_scanned": scanned,
        "rows": rows,
        "dim": dim,
        "z_pitch": found.z.stride(0),
        "D": dim,
        "BM": height,
    }
    launch(
        kernels.settle_kernel,
        (cdiv(rows, height),),
        **shared,
        p_mask=mask,
        p_row_norms=parts.row_norms,
        p_largest=parts.largest,
        p_score=proposed.score,
        p_code=proposed.code,
        parts=count,
        blocks=parts.largest.shape[1],
        linear=1.0 if products == 1 else 2.0**-11,
        rounding=rounding(dim, proposed.most),
        MASKED=mask is not None,
        EXACT=exact,
        BD=min(width, 256),
        num_warps=1,
    )
    if exact:
        launch(
            kernels.scan_kernel,
            (cdiv(rows, height), count),
            **shared,
            p_distance=torch.empty(count, rows, dtype=torch.float64, device=device),
            p_nearest=torch.empty(count, rows, dtype=torch.int32, device=device),
            codes=codes,
            size=proposed.size,
            BK=128,
            BD=min(width, 32),
            SOME=8,
            BL=min(width, 128),
            maxnreg=168,
        )
    return limit
