"""The op's implementation ``triton``: chooses tiles, allocates, and launches the kernels of ``kernels.py``."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._triton import as_rows, cdiv, launch, next_power_of_2
from . import kernels

#: Of the GPUs that tiles are chosen for. The codebook is parted to have a program for each place on them.
MULTIPROCESSORS = 132
#: Parts of the codebook at most, unless it has more than so many times STEPS tiles; half of them above D = 128.
PARTS = 8
#: Tiles of codes in a part at most: their number is kept in the last bits of a score.
STEPS = 32
CODES = 64  # in a tile
#: The largest D in which the vectors of a program stay in shared memory.
RESIDENT = 256
#: The largest D in which the exact search takes three products; above, one costs less, with what it leaves in doubt.
THREE = 32


def tile(dim: int) -> dict[str, Any]:
    """Launch table of ``propose_kernel``: vectors, codes and channels of a step, and launch options.

    Chosen by the machine code; no GPU has measured it.
    """
    return {
        "BM": 64,
        "BK": CODES,
        "BD": channels(dim) if dim <= RESIDENT else 64,
        "num_warps": 4,
        "num_stages": 2 if dim <= RESIDENT else 3,
    }


def channels(dim: int) -> int:
    """D as it is padded for products: in one step, or in steps of 64."""
    return max(16, next_power_of_2(dim)) if dim <= RESIDENT else cdiv(dim, 64) * 64


def rounding(dim: int, steps: int) -> float:
    """The part of a score's error that is relative to |z| R + R^2 / 2: see ``kernels.py``."""
    sums = (dim + 4) * 2.0**-22
    return sums + dim**0.5 * 2.0**-27 + (dim + 5) * 2.0**-24 + steps * 2.0**-23


class Parts(NamedTuple):
    """Vectors and codes as products take them: around a centre, in parts of float16.

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
    """What a search reads.

    Attributes:
        z: (N, D), what is searched for, normalised under "cosine", and then float32.
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
    """Of z (N, D) and codebook (K, D), with the parts for so many products, by one launch."""
    z, codebook = as_rows(z), as_rows(codebook) if cosine else codebook.contiguous()
    (rows, dim), codes, device = z.shape, len(codebook), z.device
    width = next_power_of_2(max(16 if products else 1, dim))
    height = max(1, min(128, (8192 if products and dim > 64 else 2048) // width))
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
        NORMALISED=cosine,
        PRODUCTS=products,
        SOME=max(1, min(16, 2048 // width)),
        BK=height,
        BD=width,
    )
    return Prepared(z if u is None else u, codebook if units is None else units, norms, parts)


def nearest_codeword(z: Tensor, codebook: Tensor, metric: str, precision: str) -> Tensor:
    """See :func:`alit_kernels.nearest_codeword`."""
    return search(z, codebook, metric, precision)


def search(
    z: Tensor, codebook: Tensor, metric: str, precision: str, mask: Tensor | None = None
) -> Tensor:
    """Index (N,) int64 of the codeword nearest to each row of ``z`` (N, D), 0 where ``mask`` is False.

    Neighbours in 64 that are all masked are not searched.
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
        score: (3 * parts, N) float32: of the best and of the second, and the least score of all others.
        code: (2 * parts, N) int32: of the best and of the second.
        parts: of the codebook.
        most: as many as there may be with any number of rows, a power of 2.
        steps: as many numbers are in the last bits of a score.
    """

    score: Tensor
    code: Tensor
    parts: int
    most: int
    steps: int


def propose(found: Prepared, mask: Tensor | None, products: int) -> Proposed:
    """Scores of all codes, on tensor cores."""
    (rows, dim), device, parts = found.z.shape, found.z.device, found.parts
    assert parts is not None
    padded = found.norms.shape[1]
    chosen = tile(dim)
    tiles = padded // CODES
    least = cdiv(tiles, STEPS)
    wide = dim > 128
    most = max(least, min(tiles, PARTS // 2 if wide else PARTS))
    places = MULTIPROCESSORS * (2 if wide else 3)
    wanted = min(most, max(least, places // cdiv(rows, chosen["BM"])))
    steps = cdiv(tiles, wanted)
    count = cdiv(tiles, steps)
    score = torch.empty(3 * count, rows, dtype=torch.float32, device=device)
    code = torch.empty(2 * count, rows, dtype=torch.int32, device=device)
    most_steps = min(STEPS, next_power_of_2(tiles))
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
        rows=rows,
        padded=padded,
        steps=steps,
        MASKED=mask is not None,
        PRODUCTS=products,
        STEPS=most_steps,
        DP=parts.rows.shape[2],
        **chosen,
    )
    return Proposed(score, code, count, next_power_of_2(most), most_steps)


def settle(
    found: Prepared,
    mask: Tensor | None,
    proposed: Proposed,
    index: Tensor,
    products: int,
    *,
    exact: bool,
) -> Tensor | None:
    """Into ``index`` (N,) the nearest codes, or without ``exact`` those of the best scores.

    Returns:
        (N,) bool, which rows were in doubt: all codes were scanned for them. None without ``exact``.
    """
    (rows, dim), codes, device, parts = found.z.shape, len(found.codes), found.z.device, found.parts
    assert parts is not None
    portion = max(256, 32768 // max(1, dim))
    portions = min(16, next_power_of_2(cdiv(codes, portion))) if exact else 1
    doubt = distance = nearest = None
    if exact:
        doubt = torch.empty(rows, dtype=torch.bool, device=device)
        distance = torch.empty(portions, rows, dtype=torch.float64, device=device)
        nearest = torch.empty(portions, rows, dtype=torch.int32, device=device)
    width, half = next_power_of_2(max(1, dim)), found.z.element_size() == 2
    launch(
        kernels.settle_kernel,
        (cdiv(rows, 64), portions),
        p_z=found.z,
        p_codes=found.codes,
        p_mask=mask,
        p_row_norms=parts.row_norms,
        p_largest=parts.largest,
        p_score=proposed.score,
        p_code=proposed.code,
        p_index=index,
        p_doubt=doubt,
        p_distance=distance,
        p_nearest=nearest,
        rows=rows,
        codes=codes,
        parts=proposed.parts,
        blocks=parts.largest.shape[1],
        portion=cdiv(codes, portions),
        dim=dim,
        z_pitch=found.z.stride(0),
        linear=1.0 if products == 1 else 2.0**-11,
        rounding=rounding(dim, proposed.steps),
        D=dim,
        MASKED=mask is not None,
        EXACT=exact,
        PARTS=proposed.most,
        ROWS=4,
        BM=64,
        BK=64,
        BD=16,
        TURNS=1 if width <= 16 else 2,
        BL=max(16, min(width, 32 if half and dim > 128 else 64, 1024 // proposed.most)),
    )
    if exact:
        launch(
            kernels.merge_kernel,
            (cdiv(rows, 128),),
            p_doubt=doubt,
            p_distance=distance,
            p_nearest=nearest,
            p_index=index,
            rows=rows,
            PORTIONS=portions,
            BM=128,
        )
    return doubt
