"""Our quantizers against those of vector-quantize-pytorch: values, indices, losses, gradients, state."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import vector_quantize_pytorch as theirs
from torch import Tensor, nn

from alit_kernels import vector_quantize
from alit_kernels.nn import GroupedVQ, ResidualVQ, VectorQuantizer

CODES, DIM, LEVELS = 64, 16, 3
#: Options like theirs: their codes are averages over smoothed counts, and the commitment has weight 1.
OPTIONS: dict[str, Any] = {"commitment": 1.0, "ema_decay": 0.8, "ema_rewrites_all": True}


def with_the_codes_of(ours: nn.Module, other: nn.Module) -> None:
    """Set the same random codebook, averages and counts in both, quantizer by quantizer."""
    torch.manual_seed(0)
    books = {id(m): m for m in other.modules() if hasattr(m, "embed_avg")}.values()
    mine = [m for m in ours.modules() if isinstance(m, VectorQuantizer)]
    for book, quantizer in zip(books, mine, strict=True):
        codes = torch.randn(CODES, book.embed.shape[-1])
        codes = nn.functional.normalize(codes, dim=-1) if quantizer.metric == "cosine" else codes
        quantizer.set_codebook(codes)
        book.embed.data.copy_(codes)
        book.embed_avg.data.copy_(codes)
        book.cluster_size.data.fill_(1)


def agree(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("metric", ("euclidean", "cosine"))
@pytest.mark.parametrize("gradient", ("straight_through", "rotation"))
def test_estimators(gradient: str, metric: str) -> None:
    """Both gradient estimators equal theirs, with moving averages over three steps."""
    other = theirs.VectorQuantize(
        dim=DIM,
        codebook_size=CODES,
        use_cosine_sim=metric == "cosine",
        rotation_trick=gradient == "rotation",
    )
    ours = VectorQuantizer(CODES, DIM, gradient=gradient, metric=metric, **OPTIONS)
    with_the_codes_of(ours, other)
    for _ in range(3):
        z, g = torch.randn(4, 50, DIM, requires_grad=True), torch.randn(4, 50, DIM)
        quantized, index, loss = other(z)
        result = ours(z)
        assert torch.equal(result.index, index)
        agree(result.quantized, quantized)
        agree(result.loss, loss.squeeze())
        totals = [
            (q * g).sum() + 10 * each
            for q, each in ((result.quantized, result.loss), (quantized, loss.sum()))
        ]
        grads = [torch.autograd.grad(total, z)[0] for total in totals]
        agree(*grads)
        if metric == "euclidean":  # theirs normalizes codes again in every update
            agree(ours.embedding.weight, other._codebook.embed[0])
        else:
            agree(nn.functional.normalize(ours.embedding.weight, dim=-1), other._codebook.embed[0])


@pytest.mark.parametrize("shared", (False, True))
def test_residual(shared: bool) -> None:
    """Residual quantizers are equal, except that theirs has L times the straight-through gradient, once a level."""
    other = theirs.ResidualVQ(
        dim=DIM,
        codebook_size=CODES,
        num_quantizers=LEVELS,
        shared_codebook=shared,
        rotation_trick=False,
    )
    ours = ResidualVQ(LEVELS, CODES, DIM, shared=shared, **OPTIONS)
    with_the_codes_of(ours, other)
    z, g = torch.randn(4, 50, DIM, requires_grad=True), torch.randn(4, 50, DIM)
    # Theirs updates a shared codebook once for all levels, ours at every level.
    quantized, index, losses = other(z, freeze_codebook=shared)
    result = (ours.eval() if shared else ours)(z)
    assert torch.equal(result.index, index)
    agree(result.quantized, quantized)
    agree(result.loss, losses.sum())
    agree(
        torch.autograd.grad(result.loss, z, retain_graph=True)[0],
        torch.autograd.grad(losses.sum(), z, retain_graph=True)[0],
    )
    (found,) = torch.autograd.grad(result.quantized, z, g)
    agree(found, g)
    agree(LEVELS * found, torch.autograd.grad(quantized, z, g)[0])
    if not shared:
        for level, layer in zip(ours.levels, other.layers, strict=True):
            agree(level.embedding.weight, layer._codebook.embed[0])
    agree(ours.codes(index), other.get_output_from_indices(index))


@pytest.mark.parametrize("image", (False, True))
def test_grouped_residual(image: bool) -> None:
    other = theirs.GroupedResidualVQ(
        dim=DIM, codebook_size=CODES, num_quantizers=LEVELS, groups=2
    ).eval()
    channel_dim = 1 if image else -1
    ours = GroupedVQ(2, CODES, DIM, num_levels=LEVELS, channel_dim=channel_dim, **OPTIONS).eval()
    with_the_codes_of(ours, other)
    z = torch.randn(3, 30, DIM)
    quantized, index, _ = other(z)
    result = ours(z.movedim(-1, channel_dim))
    assert torch.equal(result.index, index.movedim(0, -2))
    agree(result.quantized.movedim(channel_dim, -1), quantized)
    agree(ours.codes(result.index), result.quantized)


def test_sim_vq() -> None:
    """The SimVQ recipe of docs/your-tokenizer.md, our default loss with a projected codebook, equals theirs."""
    other = theirs.SimVQ(dim=DIM, codebook_size=CODES, rotation_trick=False)
    z = torch.randn(4, 50, DIM, requires_grad=True)
    quantized, index, loss = other(z)
    result = vector_quantize(z, other.code_transform(other.frozen_codebook))
    assert torch.equal(result.index, index)
    agree(result.quantized, quantized)
    agree(result.loss, loss)
    leaves = [z, *other.code_transform.parameters()]
    for a, b in zip(
        torch.autograd.grad(result.loss, leaves), torch.autograd.grad(loss, leaves), strict=True
    ):
        agree(a, b)
