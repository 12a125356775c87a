"""The transformer's layers."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import gelu, linear
from torch.utils._python_dispatch import TorchDispatchMode

from alit import TransformerConfig
from alit.layers import MLP, Transformer


class Activations(TorchDispatchMode):
    """Weak references to everything that a GELU returned."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[weakref.ref[Tensor]] = []

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        if function is torch.ops.aten.gelu.default:
            self.seen.append(weakref.ref(result))
        return result


def test_mlp_keeps_no_activation_for_its_backward() -> None:
    mlp = MLP(8)

    def plain(x: Tensor) -> Tensor:
        return linear(gelu(mlp.c_fc(x)), mlp.c_proj.weight, mlp.c_proj.bias)

    results = []
    for function in (mlp, plain):
        x = torch.randn(3, 8, generator=torch.Generator().manual_seed(0)).requires_grad_()
        with Activations() as activations:
            out = function(x)
        kept = [reference() is not None for reference in activations.seen]
        assert kept == [function is plain]
        results.append([out, *torch.autograd.grad(out.square().sum(), [x, *mlp.parameters()])])
    for ours, expected in zip(*results, strict=True):
        assert torch.equal(ours, expected)


def test_last_block_computes_what_is_wanted() -> None:
    """The same results and gradients, and nothing beyond in what follows its keys and values."""
    transformer = Transformer(TransformerConfig(width=16, layers=2, heads=2))
    rows: list[tuple[int, ...]] = []
    last: Any = transformer.transformer[1]
    last.mlp.c_fc.register_forward_hook(lambda module, inputs, out: rows.append(tuple(out.shape)))
    results = []
    for wanted in (slice(1, 4), None):
        x = torch.randn(2, 9, 16, generator=torch.Generator().manual_seed(0)).requires_grad_()
        out = transformer(x, wanted=wanted)
        out = out if wanted is not None else out[:, 1:4]
        results.append(
            [out, *torch.autograd.grad(out.square().sum(), [x, *transformer.parameters()])]
        )
    assert rows == [(2, 3, 64), (2, 9, 64)]
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected)


def test_last_block_of_packed_rows_computes_what_is_wanted() -> None:
    transformer = Transformer(TransformerConfig(width=16, layers=2, heads=2))
    offsets, wanted, results = torch.tensor([0, 4, 9], dtype=torch.int32), slice(1, 4), []
    for some in (True, False):
        x = torch.randn(9, 16, generator=torch.Generator().manual_seed(0)).requires_grad_()
        if some:
            out = transformer(x, offsets, max_length=5, wanted=wanted)
        else:
            out = torch.stack([transformer(each[None])[0, wanted] for each in x.split([4, 5])])
        leaves = [x, *transformer.parameters()]
        results.append([out, *torch.autograd.grad(out.square().sum(), leaves)])
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected)


def test_transforms_of_an_mlp() -> None:
    mlp, x = MLP(8), torch.randn(3, 8)
    grad = torch.func.grad(lambda x: mlp(x).square().sum())(x)
    leaf = x.clone().requires_grad_()
    (expected,) = torch.autograd.grad(mlp(leaf).square().sum(), leaf)
    torch.testing.assert_close(grad, expected)
