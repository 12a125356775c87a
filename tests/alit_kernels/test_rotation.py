"""The rotation trick, an estimator of the quantizer's gradient, against the rotation written out as a matrix."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from alit_kernels.nn import VectorQuantizer
from alit_kernels.nn.codebook import rotated


def rotation(u: Tensor, q: Tensor) -> Tensor:
    """Matrix l R (D, D) for a vector u and its code q: |q| / |u| times the rotation in their plane from u to q."""
    e, t = u / u.norm(), q / q.norm()
    cosine, across = e @ t, t - (e @ t) * e
    sine = across.norm()
    n = across / sine
    plane = torch.outer(e, e) + torch.outer(n, n)
    turn = torch.outer(n, e) - torch.outer(e, n)
    r = torch.eye(len(u), dtype=u.dtype) + (cosine - 1) * plane + sine * turn
    return q.norm() / u.norm() * r


@pytest.mark.parametrize("channel_dim", (-1, 1))
@pytest.mark.parametrize("metric", ("euclidean", "cosine"))
def test_gradient_of_the_rotation_trick(metric: str, channel_dim: int) -> None:
    """The gradient is l R^T g, through the normalization for "cosine"; all else equals straight-through."""
    options: dict[str, Any] = {"metric": metric, "channel_dim": channel_dim}
    module, straight = (
        VectorQuantizer(9, 5, gradient="rotation", **options),
        VectorQuantizer(9, 5, **options),
    )
    with torch.no_grad():
        module.embedding.weight.normal_()
    straight.load_state_dict(module.state_dict())
    z = torch.randn(2, 5, 3, 4) if channel_dim == 1 else torch.randn(2, 3, 4, 5)
    z.requires_grad_()
    mask = torch.rand(2, 3, 4) > 0.3
    z.detach().movedim(channel_dim, -1)[~mask] = torch.nan
    found, expected = module(z, mask), straight(z, mask)
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)
    g = torch.randn_like(z)
    (grad,) = torch.autograd.grad(found.quantized, z, g)
    rows = z.detach().movedim(channel_dim, -1)[mask].double().requires_grad_()
    u = torch.nn.functional.normalize(rows, dim=-1) if metric == "cosine" else rows.clone()
    q = found.quantized.detach().movedim(channel_dim, -1)[mask].double()
    pulled = [
        rotation(x, y).T @ w
        for x, y, w in zip(u.detach(), q, g.movedim(channel_dim, -1)[mask].double(), strict=True)
    ]
    (wanted,) = torch.autograd.grad(u, rows, torch.stack(pulled))
    grad = grad.movedim(channel_dim, -1)
    torch.testing.assert_close(grad[mask], wanted.float(), rtol=1e-4, atol=1e-5)
    assert not grad[~mask].any()
    (grad,) = torch.autograd.grad(module(z, mask).loss, z)
    assert torch.equal(grad, torch.autograd.grad(straight(z, mask).loss, z)[0])


def test_the_rotation_trick_where_there_is_no_rotation() -> None:
    """Without a rotation gradients are finite: zero vectors pass it on, zero codes pass none, opposites reflect it."""
    module = VectorQuantizer(3, 2, gradient="rotation")
    with torch.no_grad():
        module.embedding.weight.copy_(torch.tensor([[0.0, 0.0], [-2.0, 0.0], [5.0, 5.0]]))
    weights = torch.tensor([[1.0, 2.0]])
    for vector, code, expected in (
        ([0.0, 0.0], 0, [1.0, 2.0]),
        ([0.1, 0.0], 0, [0.0, 0.0]),
        ([0.0, 0.0], 1, [1.0, 2.0]),
        ([1.0, 0.0], 1, [-2.0, 4.0]),
        ([-1.0, 0.0], 1, [2.0, 4.0]),
    ):
        z = torch.tensor([vector], requires_grad=True)
        q = module.embedding.weight[code : code + 1]
        rotated(q, z, None, "euclidean").backward(weights)
        assert torch.equal(z.grad, torch.tensor([expected]))


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_the_rotation_trick_compiles(dtype: torch.dtype) -> None:
    module = VectorQuantizer(8, 4, metric="cosine", gradient="rotation").to(dtype)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    z, mask = torch.randn(20, 4, dtype=dtype, requires_grad=True), torch.rand(20) > 0.2
    g = torch.randn(20, 4, dtype=dtype)
    grads = [torch.autograd.grad(f(z, mask).quantized, z, g)[0] for f in (module, compiled)]
    assert grads[0].dtype == dtype and torch.equal(*grads)
