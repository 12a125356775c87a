"""Public function, schema, checks and autograd of codebook_entropy."""

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


class CodebookEntropy(NamedTuple):
    """Result of :func:`codebook_entropy`: two scalars, in nats.

    Attributes:
        sample: mean entropy of the vectors' distributions over the codes; low where each is certain of its code.
        batch: entropy of the mean distribution; high, up to log K, where all codes are used alike.
    """

    sample: Tensor
    batch: Tensor


def codebook_entropy(
    z: Tensor,
    codebook: Tensor,
    *,
    temperature: float,
    metric: str = "euclidean",
    mask: Tensor | None = None,
    epsilon: float = 0.0,
    implementation: str = "auto",
) -> CodebookEntropy:
    """Entropies of the soft assignment of vectors to codes, without its N x K matrix.

    A vector's distribution is softmax(-d / temperature), d its squared distances to the codes. An entropy loss is
    ``weight * (sample - batch)``, as in MaskGIT (Chang et al., 2022), MAGVIT-v2 (Yu et al., 2023) and LlamaGen (Sun et
    al., 2024); LlamaGen's has ``temperature=0.01, epsilon=1e-5``.

    Args:
        z: (..., D) float32, bfloat16 or float16 (float64 in the reference), N vectors.
        codebook: (K, D), dtype of ``z``.
        temperature: above 0.
        metric: "euclidean", or "cosine": both sides are divided by max(norm, 1e-12), and gradients pass through that.
        mask: (...) bool, True where a vector takes part; others may hold anything.
        epsilon: at least 0, added within the logarithm of the mean, ``batch = -sum(mean log(mean + epsilon))``.

    Returns:
        :class:`CodebookEntropy` of float32 scalars (float64 for float64), 0 if nothing takes part, differentiable with
        respect to z and codebook. Memory is O(N + K D), forward and backward: the backward computes the distributions
        again. A code that has no probability for any vector has no gradient. Under autocast everything is computed in
        float32; float64 stays. A vector of NaN or infinity makes both NaN.

    Raises:
        TypeError, ValueError: wrong dtype, shape, device or option.
    """
    arguments = z, codebook, mask, metric, temperature, epsilon, implementation
    if not is_dynamo_compiling() and (found := _known.call(*arguments)) is not None:
        return found
    check_codebook(z, codebook, metric, "ieee")
    temperature, epsilon = (
        check_number("temperature", temperature),
        check_number("epsilon", epsilon),
    )
    if temperature <= 0:
        raise ValueError(f"temperature: expected a number above 0, got {temperature}")
    if epsilon < 0:
        raise ValueError(f"epsilon: expected a number of at least 0, got {epsilon}")
    if mask is not None:
        check_tensor("mask", mask, dtype=torch.bool, shape=z.shape[:-1])
        check_same("device", z=z, mask=mask)
    z, codebook = for_search(z, codebook)
    if z.ndim == 1:
        z, mask = z[None], None if mask is None else mask[None]
    return _known.first(arguments, (z, codebook, mask, metric, temperature, epsilon), _entropies)


def _entropies(results: Any) -> CodebookEntropy:
    return CodebookEntropy(*results[:2])


def _fake(z: Tensor, codebook: Tensor, *_: Any) -> tuple[Tensor, ...]:
    rows = z.shape[:-1].numel()
    sizes = (), (), (codebook.shape[0],), (rows,), (2, rows), ()
    return tuple(z.new_empty(size, dtype=accumulation_dtype(z)) for size in sizes)


_codebook_entropy = Op(
    # sample, batch, and for the backward: mean (K,) of the distributions, entropy (N,) of each, normalizer (2, N), the
    # maxima of their logits and sums of exponentials, and how many rows take part, at least 1.
    "codebook_entropy(Tensor z, Tensor codebook, Tensor? mask, str metric, float temperature, float epsilon)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    reference=reference.codebook_entropy,
    fake=_fake,
    others={
        "cpp": "alit_kernels.codebook_entropy.cpp:codebook_entropy",
        "triton": "alit_kernels.codebook_entropy.triton_:codebook_entropy",
    },
)
_codebook_entropy_backward = Op(
    # Gradients of z and codebook, empty where they are not wanted.
    "codebook_entropy_backward(Tensor? grad_sample, Tensor? grad_batch, Tensor z, Tensor codebook, Tensor? mask,"
    " Tensor mean, Tensor entropy, Tensor normalizer, Tensor count, str metric, float temperature, float epsilon,"
    " bool z_wanted, bool codebook_wanted) -> (Tensor, Tensor)",
    reference=reference.codebook_entropy_backward,
    fake=lambda grad_sample, grad_batch, z, codebook, *rest: (
        z.new_empty(z.shape if rest[-2] else 0),
        codebook.new_empty(codebook.shape if rest[-1] else 0),
    ),
    others={
        "cpp": "alit_kernels.codebook_entropy.cpp:codebook_entropy_backward",
        "triton": "alit_kernels.codebook_entropy.triton_:codebook_entropy_backward",
    },
)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    z, codebook, mask, *ctx.options, ctx.implementation = inputs
    ctx.save_for_backward(z, codebook, mask, *output[2:])


def _backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
    z_wanted, codebook_wanted, *_ = ctx.needs_input_grad
    found = _codebook_entropy_backward(
        *(*grads[:2], *ctx.saved_tensors, *ctx.options, z_wanted, codebook_wanted),
        implementation=ctx.implementation,
    )
    return found[0] if z_wanted else None, found[1] if codebook_wanted else None, *[None] * 4


_codebook_entropy.register_autograd(_backward, _setup)
_known = Public(_codebook_entropy)
