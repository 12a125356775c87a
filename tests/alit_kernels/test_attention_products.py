"""Wide heads on a CPU, computed with stored probabilities: results, and the calls that take this path."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from alit_kernels import attention
from alit_kernels.attention import products
from alit_kernels.testing import assert_within_budget
from tests.helpers.ops import values
from tests.helpers.watched import watched


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """List of the calls that take this path, which is enabled on any machine."""
    monkeypatch.setattr(products, "mkl_is_slow", lambda: False)
    return watched(monkeypatch, products, "attention")


def written_out(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    return torch.einsum(
        "bhnm,bmhd->bnhd", torch.einsum("bnhd,bmhd->bhnm", q, k).mul(scale).softmax(-1), v
    )


def results(call: Any, leaves: list[Tensor], *options: Any, **named: Any) -> list[Tensor]:
    leaves = [x.detach().clone().requires_grad_() for x in leaves]
    out = call(*leaves, *options, **named)
    weights = values(*out.shape, seed=9).to(out.dtype)
    return [out.detach(), *torch.autograd.grad((out * weights).sum(), leaves)]


@pytest.mark.parametrize("scale", (None, 0.3))
@pytest.mark.parametrize("shape", ((2, 9, 7, 1, 256), (1, 5, 5, 3, 300), (3, 1, 4, 1, 512)))
def test_equals_softmax_written_out(
    shape: tuple[int, ...], scale: float | None, taken: list[Any]
) -> None:
    batch, queries, keys, heads, dim = shape
    q = values(batch, queries, heads, dim)
    k, v = (values(batch, keys, heads, dim, seed=i) for i in (1, 2))
    factor = dim**-0.5 if scale is None else scale
    for size in (1.0, 30.0):
        leaves = [q * size, k, v]
        found = results(attention, leaves, scale=scale)
        eager = results(written_out, leaves, factor)
        exact = results(written_out, [x.double() for x in leaves], factor)
        assert found[0].is_contiguous()
        for i, each in enumerate(zip(found, eager, exact, strict=True)):
            assert_within_budget(*each, k=3 if i else 2)
    assert len(taken) == 2


def test_views_empty_batches_and_parts_that_learn(taken: list[Any]) -> None:
    qkv = values(2, 6, 3, 1, 256).requires_grad_()
    q, k, v = qkv.unbind(2)
    torch.testing.assert_close(attention(q, k, v), written_out(q, k, v, 256**-0.5))
    for x in (q[:0], q[:, :0]):
        assert attention(x, k[: len(x)], v[: len(x)]).shape == x.shape
    assert not attention(q, k[:, :0], v[:, :0]).any()
    for learns in range(3):
        leaves = [x.detach().requires_grad_(i == learns) for i, x in enumerate((q, k, v))]
        attention(*leaves).sum().backward()
        assert [x.grad is not None for x in leaves] == [i == learns for i in range(3)]
    assert len(taken) == 7


@pytest.mark.parametrize("learns", ((0, 1, 2), (2,)))
def test_a_backward_within_autocast(learns: tuple[int, ...], taken: list[Any]) -> None:
    """A backward within autocast is right if the forward ran with autocast disabled, as in a VQGAN's blocks."""
    leaves = [values(2, 8, 1, 256, seed=i).requires_grad_(i in learns) for i in range(3)]
    wanted = [leaves[i] for i in learns]
    expected = torch.autograd.grad(attention(*leaves).sum(), wanted)
    with torch.autocast("cpu", torch.bfloat16):
        with torch.autocast("cpu", enabled=False):
            out = attention(*leaves)
        found = torch.autograd.grad(out.sum(), wanted)
    assert all(map(torch.equal, found, expected)) and len(taken) == 2


def test_other_calls_are_the_kernels(taken: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    q = values(1, 4, 1, 256)
    mask, stops = torch.ones(1, 4, dtype=torch.bool), torch.full((4,), 4, dtype=torch.int32)
    expected = attention(q, q, q)
    assert len(taken) == 1
    options = ({"key_mask": mask}, {"key_stop": stops}, {"implementation": "reference"})
    for named in options:
        torch.testing.assert_close(attention(q, q, q, **named), expected)
    torch.testing.assert_close(attention(q, q, q, return_lse=True)[0], expected)
    attention(*[q.bfloat16()] * 3), attention(*[q.double()] * 3), attention(*[q[..., :255]] * 3)
    with torch.autocast("cpu"):
        attention(q, q, q)
    monkeypatch.setattr(products, "MOST_SCORES", 15)
    attention(q, q, q)
    monkeypatch.undo()
    monkeypatch.setattr(products, "mkl_is_slow", lambda: True)
    torch.testing.assert_close(attention(q, q, q), expected)
    assert len(taken) == 1
