"""Public function, schema, checks and autograd of vector_quantize."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling

from .._calls import Public
from .._checks import accumulation_dtype, check_number, check_same, check_tensor
from .._library import Op
from ..nearest_codeword.op import check_codebook, for_search
from . import reference


class VectorQuantized(NamedTuple):
    """Result of :func:`vector_quantize`.

    Attributes:
        quantized: (..., D), the codebook row of each vector (normalized under "cosine"); its gradient passes straight
            through to the (normalized) vector. Zero where masked.
        index: (...) int64, the row; 0 where masked.
        loss: scalar, ``commitment_loss + codebook_loss``.
        commitment_loss: scalar, ``commitment * mean((u - sg(q))^2)`` over unmasked elements.
        codebook_loss: scalar, ``codebook_weight * mean((sg(u) - q)^2)`` over unmasked elements.
        mask: (...) bool, the mask that was given, or None.
    """

    quantized: Tensor
    index: Tensor  # type: ignore[assignment]
    loss: Tensor
    commitment_loss: Tensor
    codebook_loss: Tensor
    mask: Tensor | None = None


def vector_quantize(
    z: Tensor,
    codebook: Tensor,
    *,
    metric: str = "euclidean",
    commitment: float = 0.25,
    codebook_weight: float = 1.0,
    mask: Tensor | None = None,
    precision: str = "ieee",
    implementation: str = "auto",
) -> VectorQuantized:
    """Replace each vector by its nearest codebook row, with the losses of VQ-VAE (van den Oord et al., 2017).

    Args:
        z: (..., D) float32, bfloat16 or float16 (float64 in the reference).
        codebook: (K, D), dtype of ``z``.
        metric: "euclidean", or "cosine": both sides are divided by max(norm, 1e-12), and gradients pass through that.
        commitment: weight of the commitment loss, beta in the paper.
        codebook_weight: weight of the codebook loss, 1 in the paper. taming-transformers' ``legacy`` quantizers have
            their beta here, and a commitment of 1.
        mask: (...) bool, True where a vector takes part; others are outside loss, search and gradient.
        precision: of the search, see :func:`nearest_codeword`.

    Returns:
        :class:`VectorQuantized`; losses are float32 scalars (float64 for float64), 0 if nothing takes part. Under
        autocast everything is computed and returned in float32; float64 stays.

    Raises:
        TypeError, ValueError: wrong dtype, shape, device or option.
    """
    arguments = z, codebook, mask, metric, commitment, codebook_weight, precision, implementation
    found: Any = None if is_dynamo_compiling() else _known.call(*arguments)
    if found is None:
        check_codebook(z, codebook, metric, precision)
        z, codebook = for_search(z, codebook)
        if mask is not None:
            check_tensor("mask", mask, dtype=torch.bool, shape=z.shape[:-1])
            check_same("device", z=z, mask=mask)
        rows = z if z.ndim > 1 else z[None]
        rows_mask = mask if mask is None or mask.ndim else mask[None]
        weights = (
            check_number("commitment", commitment),
            check_number("codebook_weight", codebook_weight),
        )
        values = rows, codebook, rows_mask, metric, *weights, precision
        found = _known.first(arguments, values)
        if z.ndim == 1:
            found = [found[0][0], found[1][0], *found[2:]]
    quantized, index, loss, commitment_loss, codebook_loss = found
    return VectorQuantized(quantized, index, loss, commitment_loss, codebook_loss, mask)


def _fake(z: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    losses = (z.new_empty((), dtype=accumulation_dtype(z)) for _ in range(3))
    return (z.new_empty(z.shape), z.new_empty(z.shape[:-1], dtype=torch.int64), *losses)


_vector_quantize = Op(
    "vector_quantize(Tensor z, Tensor codebook, Tensor? mask, str metric, float commitment,"
    " float codebook_weight, str precision) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    reference=reference.vector_quantize,
    fake=_fake,
    others={
        "cpp": "alit_kernels.vector_quantize.cpp:vector_quantize",
        "triton": "alit_kernels.vector_quantize.triton_:vector_quantize",
    },
)
_vector_quantize_backward = Op(
    # Gradients of z and codebook, empty where they are not wanted: a codebook learned by moving averages has none.
    "vector_quantize_backward(Tensor? grad_quantized, Tensor? grad_loss, Tensor? grad_commitment,"
    " Tensor? grad_codebook, Tensor z, Tensor codebook, Tensor index, Tensor? mask, str metric, float commitment,"
    " float codebook_weight, bool z_wanted, bool codebook_wanted) -> (Tensor, Tensor)",
    reference=reference.vector_quantize_backward,
    fake=lambda grad_quantized, grad_loss, grad_commitment, grad_codebook, z, codebook, *rest: (
        z.new_empty(z.shape if rest[-2] else 0),
        codebook.new_empty(codebook.shape if rest[-1] else 0),
    ),
    others={
        "cpp": "alit_kernels.vector_quantize.cpp:vector_quantize_backward",
        "triton": "alit_kernels.vector_quantize.triton_:vector_quantize_backward",
    },
)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    z, codebook, mask, ctx.metric, *ctx.weights, _, ctx.implementation = inputs
    ctx.save_for_backward(z, codebook, output[1], mask)


def _backward(ctx: Any, grad_quantized: Any, _: Any, *grad_losses: Any) -> tuple[Any, ...]:
    _, codebook, *_ = saved = ctx.saved_tensors
    z_wanted, codebook_wanted, *_ = ctx.needs_input_grad
    moved = codebook_wanted and (grad_losses[0] is not None or grad_losses[2] is not None)
    found: tuple[Tensor | None, ...] = (None, None)
    if z_wanted or moved:
        found = _vector_quantize_backward(
            *(grad_quantized, *grad_losses, *saved, ctx.metric, *ctx.weights),
            *(z_wanted, moved),
            implementation=ctx.implementation,
        )
    still = torch.zeros_like(codebook) if codebook_wanted and not moved else None
    return found[0] if z_wanted else None, found[1] if moved else still, *[None] * 5


_vector_quantize.register_autograd(_backward, _setup)
_known = Public(_vector_quantize)
