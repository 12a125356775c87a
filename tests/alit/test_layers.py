"""The transformer's layers."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import gelu, linear
from torch.utils._python_dispatch import TorchDispatchMode

from alit import TransformerConfig
from alit.layers import MLP, Transformer


class Activations(TorchDispatchMode):
    """Dispatch mode that keeps weak references to the results of all GELUs."""

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


@pytest.mark.parametrize("lengths", ([5, 5], [4, 5]), ids=("dense", "packed"))
def test_last_block_computes_what_is_wanted(lengths: list[int]) -> None:
    """Results and gradients are equal, and the last block computes only the wanted positions after its attention."""
    transformer = Transformer(TransformerConfig(width=16, layers=2, heads=2))
    rows: list[int] = []
    last: Any = transformer.transformer[1]
    last.mlp.c_fc.register_forward_hook(lambda *calls: rows.append(calls[2].shape[:-1].numel()))
    wanted, offsets = slice(1, 4), torch.tensor([0, lengths[0], sum(lengths)], dtype=torch.int32)
    results = []
    for some in (True, False):
        x = torch.randn(sum(lengths), 16, generator=torch.Generator().manual_seed(0))
        x.requires_grad_()
        if not some:
            parts = x.split(lengths)
            out = torch.stack([transformer(part[None])[0, wanted] for part in parts])
        elif lengths == [5, 5]:
            out = transformer(x.view(2, 5, 16), wanted=wanted)
        else:
            out = transformer(x, offsets, max_length=5, wanted=wanted)
        leaves = [x, *transformer.parameters()]
        results.append([out, *torch.autograd.grad(out.square().sum(), leaves)])
    assert rows == [6, *lengths]
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected)
