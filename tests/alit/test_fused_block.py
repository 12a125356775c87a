"""Fused blocks, which GPUs run: results and gradients equal those of the layers, for every use of autograd."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from alit import TransformerConfig
from alit.layers import Transformer
from alit_kernels.nn import SelfAttention
from alit_kernels.nn import block as module

OFFSETS = torch.tensor([0, 4, 4, 10], dtype=torch.int32)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """List that grows by one with each call of a fused block, enabled on the CPU too."""
    seen: list[int] = []
    block = module.block

    def counted(*arguments: Any) -> Any:
        found = block(*arguments)
        seen.extend([1] * (found is not None))
        return found

    monkeypatch.setattr(module, "DEVICES", {"cpu", "cuda"})
    monkeypatch.setattr("alit.layers.block", counted)
    return seen


def transformer(layers: int = 3) -> Transformer:
    torch.manual_seed(0)
    made = Transformer(TransformerConfig(width=16, layers=layers, heads=2))
    for name, p in made.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(p, std=0.1)
    return made


def rows(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).requires_grad_()


def by_layers(monkeypatch: pytest.MonkeyPatch, work: Callable[[], Any]) -> Any:
    with monkeypatch.context() as within:
        within.setattr(module, "DEVICES", set())
        return work()


def recurrent(model: Transformer, x: Tensor, **options: Any) -> Tensor:
    for _ in range(3):
        x = model(x, **options)
    return x.float().square().mean()


@pytest.mark.parametrize("half", (False, True), ids=("float32", "autocast"))
@pytest.mark.parametrize("packed", (False, True), ids=("dense", "packed"))
def test_results_and_gradients(
    packed: bool, half: bool, calls: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = transformer()
    options = {"offsets": OFFSETS, "max_length": 6} if packed else {}

    def run() -> list[Tensor]:
        x = rows(10, 16) if packed else rows(2, 5, 16)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=half):
            loss = recurrent(model, x, **options)
        return [loss, *torch.autograd.grad(loss, [x, *model.parameters()])]

    found = run()
    assert len(calls) == 9
    expected = by_layers(monkeypatch, run)
    assert len(calls) == 9
    largest = max(float(g.abs().max()) for g in expected[1:])
    bounds = {"rtol": 0.05, "atol": 0.02 * largest} if half else {"rtol": 1e-4, "atol": 1e-6}
    torch.testing.assert_close(found, expected, **bounds)


@pytest.mark.parametrize("wanted", (None, slice(1, 4)))
def test_a_part_of_the_positions(
    wanted: slice | None, calls: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last block is not fused if it computes only a part of the positions."""
    model = transformer()

    def run() -> list[Tensor]:
        x = rows(2, 5, 16)
        out = model(x, wanted=wanted)
        return [out, *torch.autograd.grad(out.square().sum(), [x, *model.parameters()])]

    found = run()
    assert len(calls) == (3 if wanted is None else 2)
    torch.testing.assert_close(found, by_layers(monkeypatch, run), rtol=1e-4, atol=1e-5)


def test_no_gradient_is_lost_or_counted_twice(calls: list[int]) -> None:
    """Gradients are right after a partial backward, twice through one graph, and with two graphs sharing parameters."""
    model, x, y = transformer(2), rows(2, 5, 16), rows(2, 5, 16, seed=1)
    parameters = list(model.parameters())
    first, second = recurrent(model, x), recurrent(model, y)
    torch.autograd.grad(first, [x], retain_graph=True)  # leaves sums behind
    once = torch.autograd.grad(first, parameters, retain_graph=True)
    torch.testing.assert_close(torch.autograd.grad(first, parameters), once)
    of_second = torch.autograd.grad(second, parameters)
    both = torch.autograd.grad(recurrent(model, x) + recurrent(model, y), parameters)
    torch.testing.assert_close(both, [a + b for a, b in zip(once, of_second, strict=True)])
    recurrent(model, x).backward()
    recurrent(model, x).backward()
    torch.testing.assert_close([p.grad for p in parameters], [2 * g for g in once])


def test_copies_live_as_long_as_graphs(calls: list[int]) -> None:
    model = transformer(2)
    before = len(module._known)
    loss = recurrent(model, rows(2, 5, 16))
    assert len(module._known) == before + 2
    loss.backward()
    del loss
    gc.collect()
    assert len(module._known) == before


def test_parameters_that_change(calls: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Parameters may change between two calls while the first graph is kept; half-precision copies are renewed."""
    model, x = transformer(2), rows(2, 5, 16)

    def run() -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return model(x).float()

    held = run()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.5)
    again = run()
    assert calls and not torch.equal(held, again)
    expected = by_layers(monkeypatch, run)
    torch.testing.assert_close(again, expected, rtol=0.05, atol=0.05)


def test_where_layers_are_called(calls: list[int]) -> None:
    """Layers are called instead with hooks, other layers, frozen parameters, no gradient, compiling and transforms."""
    x, seen = rows(2, 5, 16), []
    hooked = transformer(1)
    hooked.transformer[0].mlp.c_fc.register_forward_hook(lambda *_: seen.append(1))
    hooked(x)
    assert seen
    around = transformer(1)
    around.transformer[0].register_forward_pre_hook(lambda *_: seen.append(1))
    around(x)
    other = transformer(1)
    other.transformer[0].mlp.c_fc = nn.Linear(16, 64)
    other(x)
    frozen = transformer(1)
    frozen.transformer[0].ln_1.weight.requires_grad_(False)
    frozen(x)
    model = transformer(1)
    with torch.no_grad():
        model(x)
    torch.func.vjp(model, x.detach())[0]
    torch.compile(model, fullgraph=True, backend="eager")(x)
    assert not calls
    model(x)
    assert calls


@pytest.mark.parametrize(
    "options",
    ({"qk_norm": nn.RMSNorm}, {"scale": 0.3}, {"qkv_bias": "qv"}, {"bias": False}),
    ids=str,
)
def test_attention_of_other_options_is_called(options: dict[str, Any], calls: list[int]) -> None:
    model, x = transformer(2), rows(2, 5, 16)
    model.transformer[0].attn = SelfAttention(16, 2, **options)
    seen: list[int] = []
    forward = model.transformer[0].attn.forward
    model.transformer[0].attn.forward = lambda *a, **k: (seen.append(1), forward(*a, **k))[1]
    model(x).sum().backward()
    assert len(seen) == 1 and calls == [1]
    assert all(p.grad is not None for p in model.parameters())


def test_a_parameter_that_is_frozen_later_gets_no_gradient(calls: list[int]) -> None:
    model, x = transformer(1), rows(2, 5, 16)
    held = model(x)
    weight = model.transformer[0].attn.in_proj_weight.requires_grad_(False)
    model(x).sum().backward()
    assert weight.grad is None and held.requires_grad and len(calls) == 1


def test_recomputed_activations(calls: list[int]) -> None:
    model, results = transformer(2), []
    for again in (False, True):
        x = rows(2, 5, 16)
        call = (lambda y: checkpoint(model, y, use_reentrant=False)) if again else model
        loss = call(call(x)).square().mean()
        results.append(torch.autograd.grad(loss, [x, *model.parameters()]))
    assert len(calls) > 4 + 4
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-7)


def test_gradients_that_are_themselves_recorded(calls: list[int]) -> None:
    """Gradients with ``create_graph`` are right; a second derivative raises NotImplementedError, as attention's."""
    model, x = transformer(1), rows(2, 5, 16)
    leaves = [x, *model.parameters()]
    plain = torch.autograd.grad(recurrent(model, x), leaves)
    recorded = torch.autograd.grad(recurrent(model, x), leaves, create_graph=True)
    torch.testing.assert_close([g.detach() for g in recorded], list(plain))
    with pytest.raises(NotImplementedError, match="has no derivative"):
        recorded[0].square().sum().backward()
