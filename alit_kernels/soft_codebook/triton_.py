"""The op's implementation ``triton``: chooses tiles, allocates, and launches the kernels of ``kernels.py``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._triton import architecture, as_rows, cdiv, launch, next_power_of_2
from . import kernels

#: Programs wanted of the gradients: codes (of the logits' gradient) and rows (of the codebook's) are split to have as
#: many, about four and two per multiprocessor.
LOGITS_PROGRAMS, CODEBOOK_PROGRAMS = 512, 256
SUMMED = 512  # elements of the codebook's gradient that a program sums over parts of the rows


def tile(channels: int, dtype: torch.dtype, kernel: str, architecture: int) -> dict[str, Any]:
    """Launch table: rows, codes and channels of a step, and launch options.

    Chosen by the count of cycles, with bank conflicts. In float32 ``wgmma`` pays where no operand has to be transposed
    in shared memory for it: for the gradient of the logits alone.

    Args:
        channels, dtype: of the codebook.
        kernel: "forward", "logits" or "codebook".
        architecture: 90 for sm_90.
    """
    width, single = max(16, min(256, next_power_of_2(channels))), dtype == torch.float32
    small = width < 128
    if kernel == "logits" and single and architecture in (90, 100):
        rows, codes, most, warps = 128, 64, 32, 8
    elif kernel == "logits":
        rows, codes, most, warps = 64, 32, 32 if single else 64, 4
    else:
        rows, codes, most, warps = (
            32 if single else 64,
            32 if single else 64,
            256,
            4 if small else 8,
        )
    if not single and architecture in (86, 89, 120) and kernel != "codebook":
        warps = 8  # with four, some kernels spill
    sizes = {"BM": rows, "BV": codes, "BC": min(width, most)}
    return {**sizes, "num_warps": warps, "num_stages": 2}


def soft_codebook(
    logits: Tensor, codebook: Tensor, target: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Code, nll, target probability and normalizer, as the op returns them; see :func:`alit_kernels.soft_codebook`."""
    logits, codebook = as_rows(logits), as_rows(codebook)
    (rows, codes), channels = logits.shape, codebook.shape[1]
    code = torch.empty(rows, channels, dtype=codebook.dtype, device=logits.device)
    size = 0 if target is None else rows
    nll, p_target, normalizer = (
        torch.empty(shape, dtype=torch.float32, device=logits.device)
        for shape in ((size,), (size,), (2, rows))
    )
    chosen = tile(channels, codebook.dtype, "forward", architecture(logits.device))
    launch(
        kernels.forward_kernel,
        (cdiv(rows, chosen["BM"]), max(1, cdiv(channels, chosen["BC"]))),
        p_logits=logits,
        p_codebook=codebook,
        p_target=None if target is None else target.contiguous(),
        p_code=code,
        p_nll=nll,
        p_p_target=p_target,
        p_normalizer=normalizer,
        rows=rows,
        codes=codes,
        channels=channels,
        logits_pitch=logits.stride(0),
        codebook_pitch=codebook.stride(0),
        TARGET=target is not None,
        **chosen,
    )
    return code, nll, p_target, normalizer


def soft_codebook_backward(
    grad_code: Tensor | None,
    grad_nll: Tensor | None,
    grad_p_target: Tensor | None,
    logits: Tensor,
    codebook: Tensor,
    target: Tensor | None,
    code: Tensor,
    normalizer: Tensor,
    logits_wanted: bool,
    codebook_wanted: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients of logits and codebook, as the reference returns them; see there for the formulas."""
    logits, codebook = as_rows(logits), as_rows(codebook)
    grad_code = None if grad_code is None else as_rows(grad_code)
    grad_pitch = 0 if grad_code is None else grad_code.stride(0)
    (rows, codes), channels = logits.shape, codebook.shape[1]
    grad_logits = logits.new_empty(logits.shape if logits_wanted else 0)
    grad_codebook = codebook.new_empty(codebook.shape if codebook_wanted else 0)
    normalizer = normalizer.contiguous()
    if logits_wanted:
        chosen = tile(channels, codebook.dtype, "logits", architecture(logits.device))
        split = _split(codes, LOGITS_PROGRAMS // max(1, cdiv(rows, chosen["BM"])), chosen["BV"])
        launch(
            kernels.grad_logits_kernel,
            (cdiv(rows, chosen["BM"]), cdiv(codes, split)),
            p_logits=logits,
            p_codebook=codebook,
            p_target=None if target is None else target.contiguous(),
            p_code=code.contiguous(),
            p_grad_code=grad_code,
            p_grad_nll=None if grad_nll is None else grad_nll.contiguous(),
            p_grad_p_target=None if grad_p_target is None else grad_p_target.contiguous(),
            p_normalizer=normalizer,
            p_result=grad_logits,
            rows=rows,
            codes=codes,
            channels=channels,
            logits_pitch=logits.stride(0),
            codebook_pitch=codebook.stride(0),
            grad_pitch=grad_pitch,
            split=split,
            TARGET=target is not None,
            **chosen,
        )
    if codebook_wanted:
        chosen = tile(channels, codebook.dtype, "codebook", architecture(logits.device))
        tiles = (cdiv(codes, chosen["BV"]), max(1, cdiv(channels, chosen["BC"])))
        split = _split(rows, CODEBOOK_PROGRAMS // (tiles[0] * tiles[1]), chosen["BM"])
        parts = cdiv(rows, max(1, split))
        partial = grad_codebook
        if parts != 1:
            partial = torch.empty(parts, codes, channels, dtype=torch.float32, device=logits.device)
        launch(
            kernels.grad_codebook_kernel,
            (*tiles, parts),
            p_logits=logits,
            p_grad_code=grad_code,
            p_normalizer=normalizer,
            p_partial=partial,
            rows=rows,
            codes=codes,
            channels=channels,
            logits_pitch=logits.stride(0),
            grad_pitch=grad_pitch,
            split=split,
            **chosen,
        )
        if parts != 1:
            elements = codes * channels
            launch(
                kernels.sum_parts_kernel,
                (cdiv(elements, SUMMED),),
                p_partial=partial,
                p_result=grad_codebook,
                parts=parts,
                elements=elements,
                BLOCK=SUMMED,
            )
    return grad_logits, grad_codebook


def _split(size: int, parts: int, step: int) -> int:
    """Number of the ``size`` elements that a program takes, a multiple of its step, for about ``parts`` parts."""
    return cdiv(cdiv(size, max(1, parts)), step) * step
