"""The op's implementation ``triton``: chooses tiles, allocates, and launches the kernels of ``kernels.py``."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._triton import as_rows, cdiv, launch, next_power_of_2
from . import kernels

#: Programs wanted of the gradients: codes (of the logits' gradient) and rows (of the codebook's) are split to have as
#: many, about four and two per multiprocessor.
LOGITS_PROGRAMS, CODEBOOK_PROGRAMS = 512, 256


class Tile(NamedTuple):
    """Rows, codes and channels of a step, warps, pipeline stages."""

    rows: int
    codes: int
    channels: int
    warps: int
    stages: int


def tile(channels: int, dtype: torch.dtype, kernel: str) -> Tile:
    """Launch table by channels of the codebook, its dtype and kernel ("forward", "logits", "codebook")."""
    width = max(16, min(256, next_power_of_2(max(1, channels))))
    if dtype == torch.float32:  # operands in two parts: small tiles, or registers spill
        if kernel == "logits":
            return Tile(64, 32, min(width, 32), 4, 2)
        if width >= 128:
            return Tile(32, 32, width, 8, 2)
        return Tile(32, 32, width, 4, 2)
    if kernel == "logits":
        return Tile(64, 32, min(width, 64), 4, 2)
    return Tile(64, 64, width, 8 if width >= 128 else 4, 2)


def soft_codebook(
    logits: Tensor, codebook: Tensor, target: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See :func:`alit_kernels.soft_codebook`."""
    logits, codebook = as_rows(logits), as_rows(codebook)
    (rows, codes), channels = logits.shape, codebook.shape[1]
    code = torch.empty(rows, channels, dtype=codebook.dtype, device=logits.device)
    size = 0 if target is None else rows
    nll, p_target, normaliser = (
        torch.empty(shape, dtype=torch.float32, device=logits.device)
        for shape in ((size,), (size,), (2, rows))
    )
    chosen = tile(channels, codebook.dtype, "forward")
    launch(
        kernels.forward_kernel,
        (cdiv(rows, chosen.rows), max(1, cdiv(channels, chosen.channels))),
        p_logits=logits,
        p_codebook=codebook,
        p_target=None if target is None else target.contiguous(),
        p_code=code,
        p_nll=nll,
        p_p_target=p_target,
        p_normaliser=normaliser,
        rows=rows,
        codes=codes,
        channels=channels,
        logits_pitch=logits.stride(0),
        codebook_pitch=codebook.stride(0),
        TARGET=target is not None,
        **_options(chosen),
    )
    return code, nll, p_target, normaliser


def soft_codebook_backward(
    grad_code: Tensor,
    grad_nll: Tensor,
    grad_p_target: Tensor,
    logits: Tensor,
    codebook: Tensor,
    target: Tensor | None,
    code: Tensor,
    normaliser: Tensor,
    codebook_wanted: bool,
) -> tuple[Tensor, Tensor]:
    """See the reference for the formulas."""
    logits, codebook = as_rows(logits), as_rows(codebook)
    grad_code = as_rows(grad_code.to(codebook.dtype))
    (rows, codes), channels = logits.shape, codebook.shape[1]
    grad_logits = torch.empty(rows, codes, dtype=logits.dtype, device=logits.device)
    if rows == 0:
        return grad_logits, codebook.new_zeros(codebook.shape if codebook_wanted else 0)
    code, normaliser = code.contiguous(), normaliser.contiguous()
    chosen = tile(channels, codebook.dtype, "logits")
    split = _split(codes, LOGITS_PROGRAMS // cdiv(rows, chosen.rows), chosen.codes)
    launch(
        kernels.grad_logits_kernel,
        (cdiv(rows, chosen.rows), cdiv(codes, split)),
        p_logits=logits,
        p_codebook=codebook,
        p_target=None if target is None else target.contiguous(),
        p_code=code,
        p_grad_code=grad_code,
        p_grad_nll=grad_nll.contiguous(),
        p_grad_p_target=grad_p_target.contiguous(),
        p_normaliser=normaliser,
        p_result=grad_logits,
        rows=rows,
        codes=codes,
        channels=channels,
        logits_pitch=logits.stride(0),
        codebook_pitch=codebook.stride(0),
        grad_pitch=grad_code.stride(0),
        split=split,
        TARGET=target is not None,
        **_options(chosen),
    )
    if not codebook_wanted:
        return grad_logits, codebook.new_empty(0)
    chosen = tile(channels, codebook.dtype, "codebook")
    tiles = (cdiv(codes, chosen.codes), max(1, cdiv(channels, chosen.channels)))
    split = _split(rows, CODEBOOK_PROGRAMS // (tiles[0] * tiles[1]), chosen.rows)
    parts = cdiv(rows, split)
    partial = torch.empty(parts, codes, channels, dtype=torch.float32, device=logits.device)
    launch(
        kernels.grad_codebook_kernel,
        (*tiles, parts),
        p_logits=logits,
        p_grad_code=grad_code,
        p_normaliser=normaliser,
        p_partial=partial,
        rows=rows,
        codes=codes,
        channels=channels,
        logits_pitch=logits.stride(0),
        grad_pitch=grad_code.stride(0),
        split=split,
        **_options(chosen),
    )
    return grad_logits, partial.sum(0).to(codebook.dtype)


def _options(chosen: Tile) -> dict[str, Any]:
    return {
        "BM": chosen.rows,
        "BV": chosen.codes,
        "BC": chosen.channels,
        "num_warps": chosen.warps,
        "num_stages": chosen.stages,
    }


def _split(size: int, parts: int, step: int) -> int:
    """How many of ``size`` a program takes, for about so many parts: a multiple of its step."""
    return cdiv(cdiv(size, max(1, parts)), step) * step
