"""nn.SelfAttention: against torch.nn.MultiheadAttention, in every layout, and inside what training wraps around it."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from alit_kernels.nn import SelfAttention, self_attention
from alit_kernels.nn import linear as linear_layers

LENGTHS = torch.tensor([5, 0, 7])


def pair(
    bias: bool = True, batch_first: bool = True
) -> tuple[SelfAttention, nn.MultiheadAttention]:
    """Ours with their state."""
    theirs = nn.MultiheadAttention(16, 4, bias=bias, batch_first=batch_first)
    ours = SelfAttention(16, 4, bias=bias, batch_first=batch_first)
    ours.load_state_dict(theirs.state_dict())
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    return ours, theirs


def compare(ours: nn.Module, theirs: nn.Module, a: Tensor, b: Tensor) -> None:
    """Outputs, and the gradients of every parameter."""
    torch.testing.assert_close(a, b)
    weight = torch.randn_like(a)
    for out in (a, b):
        (out * weight).sum().backward()
    for (name, p), (_, q) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("bias", (True, False))
@pytest.mark.parametrize("batch_first", (True, False))
def test_dense(bias: bool, batch_first: bool) -> None:
    ours, theirs = pair(bias, batch_first)
    x = torch.randn(3, 7, 16)
    compare(ours, theirs, ours(x), theirs(x, x, x, need_weights=False)[0])


@pytest.mark.parametrize("bias", (True, False))
@pytest.mark.parametrize("batch_first", (True, False))
def test_some_queries(bias: bool, batch_first: bool) -> None:
    """The others are keys and values alone."""
    ours, theirs = pair(bias, batch_first)
    x = torch.randn(3, 7, 16) if batch_first else torch.randn(7, 3, 16)
    for wanted in (slice(1, 5), slice(6, None), slice(0, 0)):
        part = x[:, wanted] if batch_first else x[wanted]
        expected = theirs(part, x, x, need_weights=False)[0]
        out = ours(x, queries=wanted)
        assert out.shape == part.shape
        if part.numel():
            compare(ours, theirs, out, expected)
    with pytest.raises(ValueError, match="queries: expected None with padded input"):
        ours(x, queries=slice(1, 5), lengths=LENGTHS)


@pytest.mark.parametrize("bias", (True, False))
def test_some_queries_of_packed_rows(bias: bool) -> None:
    ours, theirs = pair(bias)
    x, ends = torch.randn(16, 16), [0, 5, 8, 14]  # the last two rows belong to no sequence
    offsets = torch.tensor(ends, dtype=torch.int32)
    wanted = slice(1, 3)
    alone = [x[None, a:b] for a, b in itertools.pairwise(ends)]
    expected = [theirs(each[:, wanted], each, each, need_weights=False)[0] for each in alone]
    out = ours(x, offsets, max_length=6, queries=wanted)
    assert out.shape == (3, 2, 16)
    compare(ours, theirs, out, torch.cat(expected))
    assert ours(x, offsets, max_length=6, queries=slice(2, 2)).shape == (3, 0, 16)
    for bad in (slice(1, None), slice(None, 2), slice(3, 1), slice(-2, 3), slice(0, 3, 2)):
        with pytest.raises(ValueError, match="queries: expected start <= stop"):
            ours(x, offsets, max_length=6, queries=bad)


@pytest.mark.parametrize("batch_first", (True, False))
def test_lengths(batch_first: bool) -> None:
    """Padded input: what lies beyond a length is not read and gives zeros."""
    ours, theirs = pair(batch_first=batch_first)
    x = torch.randn(3, 7, 16)
    used = torch.arange(7) < LENGTHS[:, None]
    expected = torch.zeros_like(x)
    for b in (0, 2):
        one = x[b : b + 1, : LENGTHS[b]]
        one = one if batch_first else one.transpose(0, 1)
        rows = theirs(one, one, one, need_weights=False)[0]
        expected[b, : LENGTHS[b]] = rows[0] if batch_first else rows[:, 0]
    padded = torch.where(used[..., None], x, torch.nan)
    out = ours(padded if batch_first else padded.transpose(0, 1), lengths=LENGTHS)
    compare(ours, theirs, out if batch_first else out.transpose(0, 1), expected)


def test_packed() -> None:
    ours, _ = pair()
    x = torch.randn(3, 7, 16)
    offsets = torch.tensor([0, 5, 5, 12], dtype=torch.int32)
    packed = torch.cat([x[0, :5], x[2], torch.full((2, 16), torch.nan)])
    out = ours(packed, offsets, max_length=7)
    padded = ours(x, lengths=LENGTHS)
    torch.testing.assert_close(out[:12], torch.cat([padded[0, :5], padded[2]]))
    with pytest.raises(ValueError, match="lengths: expected None with packed input"):
        ours(packed, offsets, lengths=LENGTHS)
    with pytest.raises(ValueError, match="heads: expected a divisor"):
        SelfAttention(16, 3)


@pytest.mark.parametrize("batch_first", (True, False))
def test_nothing_is_copied(batch_first: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention reads the projection's memory, and the output projection reads attention's."""
    memory: list[int] = []
    linear, attend = self_attention.linear, self_attention.self_attention

    def recorded_linear(x: Tensor, *parameters: Tensor) -> Tensor:
        assert x.is_contiguous()
        out = linear(x, *parameters)
        memory.extend(t.untyped_storage().data_ptr() for t in (x, out))
        return out

    def recorded_attention(qkv: Tensor) -> Tensor:
        out = attend(qkv)
        memory.extend(t.untyped_storage().data_ptr() for t in (qkv, out))
        return out

    for module in (self_attention, linear_layers):
        monkeypatch.setattr(module, "linear", recorded_linear)
    monkeypatch.setattr(self_attention, "self_attention", recorded_attention)
    SelfAttention(16, 4, batch_first=batch_first)(torch.randn(5, 2, 16))
    _, projection, qkv, out, read, _ = memory
    assert projection == qkv and out == read


def test_activation_checkpointing() -> None:
    module = SelfAttention(16, 4)
    offsets = torch.tensor([0, 5, 5, 12], dtype=torch.int32)
    x = torch.randn(14, 16, requires_grad=True)

    def run(recompute: bool) -> list[Tensor]:
        module.zero_grad()
        call = lambda y: module(y, offsets, max_length=7)  # noqa: E731
        out = checkpoint(call, x, use_reentrant=False) if recompute else call(x)
        (grad,) = torch.autograd.grad(out.square().sum(), x, retain_graph=False)
        return [out.detach(), grad]

    for a, b in zip(run(True), run(False), strict=True):
        assert torch.equal(a, b)


def test_autocast() -> None:
    module, x = SelfAttention(16, 4), torch.randn(2, 5, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = module(x)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), module(x), rtol=0.05, atol=0.05)


def test_compiles_in_every_layout() -> None:
    module = SelfAttention(16, 4)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    x = torch.randn(3, 7, 16)
    rows = {"x": x.flatten(0, 1), "offsets": torch.tensor([0, 5, 5, 12], dtype=torch.int32)}
    for arguments in (
        {"x": x},
        {"x": x, "lengths": LENGTHS},
        {"x": x, "queries": slice(2, 5)},
        {**rows, "max_length": 7},
        {**rows, "max_length": 7, "queries": slice(0, 0)},
    ):
        torch.testing.assert_close(compiled(**arguments), module(**arguments))
