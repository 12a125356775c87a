"""nn.SelfAttention against torch.nn.MultiheadAttention, in every layout, and under the wrappers of training."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from alit_kernels.nn import SelfAttention, self_attention
from alit_kernels.nn import linear as linear_layers

LENGTHS = torch.tensor([5, 0, 7])


def pair(bias: bool = True) -> tuple[SelfAttention, nn.MultiheadAttention]:
    """Our module with the state of torch's, and torch's module."""
    theirs = nn.MultiheadAttention(16, 4, bias=bias, batch_first=True)
    ours = SelfAttention(16, 4, bias=bias)
    ours.load_state_dict(theirs.state_dict())
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    return ours, theirs


def compare(ours: nn.Module, theirs: nn.Module, a: Tensor, b: Tensor) -> None:
    """Check that outputs and the gradients of all parameters are equal."""
    torch.testing.assert_close(a, b)
    weight = torch.randn_like(a)
    for out in (a, b):
        (out * weight).sum().backward()
    for (name, p), (_, q) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("bias", (True, False))
def test_dense(bias: bool) -> None:
    ours, theirs = pair(bias)
    x = torch.randn(3, 7, 16)
    compare(ours, theirs, ours(x), theirs(x, x, x, need_weights=False)[0])


def test_one_layout() -> None:
    """``batch_first`` and positional keys, as of torch's module, are refused; a transposed batch gives the same."""
    x = torch.randn(3, 7, 16)
    with pytest.raises(TypeError, match="batch_first"):
        SelfAttention(16, 4, batch_first=False)  # type: ignore[call-arg]
    ours, _ = pair()
    with pytest.raises(TypeError, match="positional"):
        ours(x, x, x)
    lying_first = x.transpose(0, 1).contiguous().transpose(0, 1)
    torch.testing.assert_close(ours(lying_first), ours(x))


@pytest.mark.parametrize("bias", (True, False))
def test_some_queries(bias: bool) -> None:
    """With ``queries``, outputs are computed for these positions; the others are only keys and values."""
    ours, theirs = pair(bias)
    x = torch.randn(3, 7, 16)
    for wanted in (slice(1, 5), slice(6, None), slice(0, 0)):
        part = x[:, wanted]
        expected = theirs(part, x, x, need_weights=False)[0]
        out = ours(x, queries=wanted)
        assert out.shape == part.shape
        if part.numel():
            compare(ours, theirs, out, expected)


@pytest.mark.parametrize("bias", (True, False))
def test_some_queries_of_packed_rows(bias: bool) -> None:
    ours, theirs = pair(bias)
    x, ends = torch.randn(16, 16), [0, 5, 8, 14]  # the last two rows belong to no sequence
    offsets = torch.tensor(ends, dtype=torch.int32)
    wanted = slice(1, 3)
    alone = [x[None, a:b] for a, b in itertools.pairwise(ends)]
    expected = [theirs(each[:, wanted], each, each, need_weights=False)[0] for each in alone]
    out = ours(x, offsets=offsets, max_length=6, queries=wanted)
    assert out.shape == (3, 2, 16)
    compare(ours, theirs, out, torch.cat(expected))
    assert ours(x, offsets=offsets, max_length=6, queries=slice(2, 2)).shape == (3, 0, 16)
    for bad in (slice(1, None), slice(None, 2), slice(3, 1), slice(-2, 3), slice(0, 3, 2)):
        with pytest.raises(ValueError, match="queries: expected start <= stop"):
            ours(x, offsets=offsets, max_length=6, queries=bad)


def test_lengths() -> None:
    """Positions beyond a length in padded input are not read, and give zeros."""
    ours, theirs = pair()
    x = torch.randn(3, 7, 16)
    used = torch.arange(7) < LENGTHS[:, None]
    expected = torch.zeros_like(x)
    for b in (0, 2):
        one = x[b : b + 1, : LENGTHS[b]]
        expected[b, : LENGTHS[b]] = theirs(one, one, one, need_weights=False)[0][0]
    padded = torch.where(used[..., None], x, torch.nan)
    compare(ours, theirs, ours(padded, lengths=LENGTHS), expected)


def test_packed() -> None:
    ours, _ = pair()
    x = torch.randn(3, 7, 16)
    offsets = torch.tensor([0, 5, 5, 12], dtype=torch.int32)
    packed = torch.cat([x[0, :5], x[2], torch.full((2, 16), torch.nan)])
    out = ours(packed, offsets=offsets, max_length=7)
    padded = ours(x, lengths=LENGTHS)
    torch.testing.assert_close(out[:12], torch.cat([padded[0, :5], padded[2]]))
    with pytest.raises(ValueError, match="heads: expected a divisor"):
        SelfAttention(16, 3)


def test_nothing_is_copied(monkeypatch: pytest.MonkeyPatch) -> None:
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
    SelfAttention(16, 4)(torch.randn(5, 2, 16))
    _, projection, qkv, out, read, _ = memory
    assert projection == qkv and out == read


HEADS, WIDTH, CONTEXT = 4, 16, 12


def rope(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """Rotary embedding of (B, N, H, D) by position, and of packed rows by row."""

    def turned(x: Tensor) -> Tensor:
        angle = torch.arange(x.shape[-3], dtype=x.dtype)[:, None, None] * torch.tensor([1.0, 0.1])
        a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
        cos, sin = angle.cos(), angle.sin()
        return torch.stack((a * cos - b * sin, a * sin + b * cos), -1).flatten(-2)

    return turned(q), turned(k)


def written_out(
    m: SelfAttention,
    x: Tensor,
    context: Tensor | None = None,
    mask: Tensor | None = None,
    **call: Any,
) -> Tensor:
    """Reference output of the module for dense batches, with torch's attention and a mask."""
    if m.context_width is None:
        weights: Any = m.in_proj_weight.chunk(3)
    else:
        weights = m.q_proj_weight, m.k_proj_weight, m.v_proj_weight
    biases: Any = (None,) * 3
    if m.qkv_bias == "qv":
        biases = m.q_bias, None, m.v_bias
    elif m.in_proj_bias is not None:
        biases = m.in_proj_bias.chunk(3)
    of_keys = x if context is None else context
    rows = x[:, call["queries"]] if "queries" in call else x
    products = map(F.linear, (rows, of_keys, of_keys), weights, biases)
    q, k, v = (y.unflatten(-1, (HEADS, -1)) for y in products)
    if hasattr(m, "q_norm"):
        q, k = m.q_norm(q), m.k_norm(k)
    if "rope" in call:
        q, k = rope(q, k)
    q, k, v = (y.transpose(1, 2) for y in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, mask, scale=m.scale)
    return F.linear(out.transpose(1, 2).flatten(-2), m.out_proj.weight, m.out_proj.bias)


def of_options(**options: Any) -> SelfAttention:
    """Module with these options, and random biases and norms."""
    module = SelfAttention(WIDTH, HEADS, **options)
    for name, p in module.named_parameters():
        if "bias" in name or "norm" in name:
            nn.init.uniform_(p, 0.5, 1.5)
    return module


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rms norm": {"qk_norm": nn.RMSNorm},
    "layer norm": {"qk_norm": nn.LayerNorm, "bias": False},
    "scale": {"scale": 0.3},
    "no bias of the projection": {"qkv_bias": False},
    "no bias of the output": {"out_bias": False},
    "biases of queries and values": {"qkv_bias": "qv", "qk_norm": nn.RMSNorm},
    "context": {"context_width": CONTEXT},
    "context, other biases": {"context_width": CONTEXT, "qkv_bias": "qv", "out_bias": False},
    "context without biases": {"context_width": CONTEXT, "bias": False, "qk_norm": nn.LayerNorm},
}
SEEN = torch.arange(7) < torch.tensor([[7], [3], [5]])
STOPS = torch.tensor([1, 1, 3, 7, 7, 2, 6], dtype=torch.int32)
UNTIL = torch.arange(7) < STOPS[:, None]


@pytest.mark.parametrize(
    "call, mask",
    (
        ({}, None),
        ({"key_mask": SEEN}, SEEN[:, None, None]),
        ({"key_stop": STOPS}, UNTIL),
        ({"key_stop": STOPS, "key_mask": SEEN}, UNTIL & SEEN[:, None, None]),
        ({"rope": rope}, None),
        ({"rope": rope, "key_mask": SEEN, "key_stop": STOPS.repeat(3, 1)}, UNTIL & SEEN[:, None, None]),
        ({"queries": slice(2, 5), "rope": rope, "key_stop": STOPS[2:5]}, UNTIL[2:5]),
    ),
    ids=lambda x: " ".join(x) if isinstance(x, dict) else "",
)  # fmt: skip
@pytest.mark.parametrize("options", OPTIONS.values(), ids=list(OPTIONS))
def test_options(options: dict[str, Any], call: dict[str, Any], mask: Tensor | None) -> None:
    """Options of the constructor and of the call give the reference's results, with a context and without."""
    module = of_options(**options)
    x, context = torch.randn(3, 7, WIDTH), None
    if module.context_width is not None:
        if "queries" in call:
            return
        context = torch.randn(3, 7, CONTEXT)
        call = {**call, "context": context}
    theirs = copy.deepcopy(module)
    compare(module, theirs, module(x, **call), written_out(theirs, x, mask=mask, **call))


def test_options_of_gradients() -> None:
    """Gradients of all parameters and both inputs equal the reference's, for all options."""
    for options in OPTIONS.values():
        module = of_options(**options)
        x = torch.randn(3, 7, WIDTH, requires_grad=True)
        context = torch.randn(3, 5, module.context_width or WIDTH, requires_grad=True)
        leaves = (x, context, *module.parameters())
        call = {"context": context, "rope": rope}
        found, expected = module(x, **call), written_out(module, x, **call)
        torch.testing.assert_close(found, expected)
        weight = torch.randn_like(found)
        for a, b in zip(
            torch.autograd.grad((found * weight).sum(), leaves),
            torch.autograd.grad((expected * weight).sum(), leaves),
            strict=True,
        ):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=list(OPTIONS))
def test_options_of_packed_rows(options: dict[str, Any]) -> None:
    """Packed rows equal single sequences: with masks and stops, padded input, a packed context, some queries."""
    module = of_options(**options)
    ends, key_ends = [0, 5, 5, 12], [0, 2, 9, 10]
    x = torch.randn(14, WIDTH)
    context = torch.randn(11, module.context_width or WIDTH)
    kept, stops = torch.rand(14) > 0.3, torch.randint(0, 8, (14,), dtype=torch.int32)
    rows, keys = (torch.tensor(e, dtype=torch.int32) for e in (ends, key_ends))
    crossed = module(
        x, offsets=rows, max_length=7, context=context, context_offsets=keys, max_context_length=7,
        key_mask=kept[:11], key_stop=stops,
    )  # fmt: skip
    bounds = {"offsets": rows, "context": context, "context_offsets": keys}
    torch.testing.assert_close(module(x, **bounds, key_mask=kept[:11], key_stop=stops), crossed)
    for (a, b), (c, d) in zip(itertools.pairwise(ends), itertools.pairwise(key_ends), strict=True):
        alone = module(
            x[None, a:b], context=context[None, c:d], key_mask=kept[None, c:d], key_stop=stops[a:b]
        )
        torch.testing.assert_close(crossed[a:b], alone[0])
    if module.context_width is not None:
        return
    itself = module(x, offsets=rows, max_length=7, key_mask=kept, key_stop=stops)
    plain = module(x, offsets=rows, max_length=7)
    lengths = torch.tensor([5, 0, 7])
    padded = torch.stack(
        [F.pad(x[a:b], (0, 0, 0, 7 - b + a), value=torch.nan) for a, b in itertools.pairwise(ends)]
    )
    out = module(padded, lengths=lengths)
    for i, (a, b) in enumerate(itertools.pairwise(ends)):
        one = module(x[None, a:b], key_mask=kept[None, a:b], key_stop=stops[a:b])
        torch.testing.assert_close(itself[a:b], one[0])
        torch.testing.assert_close(plain[a:b], module(x[None, a:b])[0])
        torch.testing.assert_close(out[i, : b - a], plain[a:b])
        assert not out[i, b - a :].any()
    assert not itself[12:].sub(itself[13]).any()
    both = torch.tensor([0, 5, 12], dtype=torch.int32)
    some = module(x, offsets=both, queries=slice(1, 3), key_stop=stops[:4], key_mask=kept)
    for i, (a, b) in enumerate(itertools.pairwise(both.tolist())):
        one = module(
            x[None, a:b],
            queries=slice(1, 3),
            key_stop=stops[2 * i : 2 * i + 2],
            key_mask=kept[None, a:b],
        )
        torch.testing.assert_close(some[i], one[0])


@pytest.mark.parametrize("channels", (CONTEXT, WIDTH))
def test_parameters_of_a_context_are_torchs(channels: int) -> None:
    theirs = nn.MultiheadAttention(WIDTH, HEADS, kdim=channels, vdim=channels, batch_first=True)
    ours = SelfAttention(WIDTH, HEADS, context_width=channels)
    ours.load_state_dict(theirs.state_dict())
    assert list(ours.state_dict()) == list(theirs.state_dict())
    x, context = torch.randn(3, 7, WIDTH), torch.randn(3, 5, channels)
    expected = theirs(x, context, context, need_weights=False)[0]
    compare(ours, theirs, ours(x, context=context), expected)


def test_names_of_parameters() -> None:
    """Parameters are named as in timm's layers."""
    module = SelfAttention(WIDTH, HEADS, qk_norm=nn.RMSNorm, qkv_bias="qv", out_bias=False)
    names = [
        "in_proj_weight",
        "q_bias",
        "v_bias",
        "out_proj.weight",
        "q_norm.weight",
        "k_norm.weight",
    ]
    assert list(module.state_dict()) == names
    assert module.q_norm.weight.shape == (WIDTH // HEADS,) and module.scale is None
    with pytest.raises(AttributeError):
        module.scale = 0.3  # type: ignore[misc]


@pytest.mark.parametrize(
    "call, name",
    (
        ({"lengths": LENGTHS, "queries": slice(1, 5)}, "lengths"),
        ({"lengths": LENGTHS, "offsets": torch.zeros(2, dtype=torch.int32)}, "lengths"),
        ({"lengths": LENGTHS, "key_mask": SEEN}, "lengths"),
        ({"lengths": LENGTHS, "key_stop": STOPS}, "lengths"),
        ({"lengths": LENGTHS, "rope": rope}, "lengths"),
        ({"lengths": LENGTHS, "context": torch.zeros(3, 5, WIDTH)}, "lengths"),
        ({"context": torch.zeros(3, 5, WIDTH), "queries": slice(1, 5)}, "queries"),
        ({"context_offsets": torch.zeros(4, dtype=torch.int32)}, "context_offsets"),
        ({"max_context_length": 7}, "max_context_length"),
        ({"context": torch.zeros(3, 5, WIDTH - 1)}, "context"),
        ({"context": torch.zeros(2, 5, WIDTH)}, "context"),
        ({"context": torch.zeros(5, WIDTH)}, "context"),
        ({"context": torch.zeros(3, 5, WIDTH), "context_offsets": LENGTHS}, "context_offsets"),
        ({"context": torch.zeros(3, 5, WIDTH), "max_context_length": 5}, "max_context_length"),
        ({"offsets": LENGTHS, "context": torch.zeros(5, WIDTH)}, "context_offsets"),
        ({"key_mask": SEEN[:, :5]}, "key_mask"),
        ({"key_stop": STOPS.long()}, "key_stop"),
    ),
    ids=lambda x: " ".join(x) if isinstance(x, dict) else "",
)
def test_wrong_calls_are_named(call: dict[str, Any], name: str) -> None:
    with pytest.raises((TypeError, ValueError), match=f"^{name}: expected"):
        SelfAttention(WIDTH, HEADS)(torch.zeros(3, 7, WIDTH), **call)


def test_wrong_options_are_named() -> None:
    for options, name in (
        ({"qkv_bias": "kv"}, "qkv_bias"),
        ({"scale": float("nan")}, "scale"),
        ({"scale": "1"}, "scale"),
        ({"context_width": 0}, "context_width"),
        ({"context_width": "a"}, "context_width"),
        ({"qk_norm": True}, "qk_norm"),
        ({"heads": 2.0}, "heads"),
        ({"heads": True}, "heads"),
    ):
        with pytest.raises((TypeError, ValueError), match=f"^{name}: expected"):
            SelfAttention(WIDTH, **{"heads": HEADS, **options})
    of_context = SelfAttention(WIDTH, HEADS, context_width=CONTEXT)
    for call in ({}, {"lengths": LENGTHS}):
        with pytest.raises(ValueError, match="context: expected one of 12 channels"):
            of_context(torch.zeros(3, 7, WIDTH), **call)


def test_options_under_autocast() -> None:
    module, x = of_options(qk_norm=nn.RMSNorm, qkv_bias="qv"), torch.randn(2, 7, WIDTH)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = module(x, rope=rope, key_stop=STOPS)
    assert out.dtype == torch.bfloat16
    expected = module(x, rope=rope, key_stop=STOPS)
    torch.testing.assert_close(out.float(), expected, rtol=0.05, atol=0.05)


def test_activation_checkpointing() -> None:
    module = SelfAttention(16, 4)
    offsets = torch.tensor([0, 5, 5, 12], dtype=torch.int32)
    x = torch.randn(14, 16, requires_grad=True)

    def run(recompute: bool) -> list[Tensor]:
        module.zero_grad()
        call = lambda y: module(y, offsets=offsets, max_length=7)  # noqa: E731
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


def test_options_compile() -> None:
    module = of_options(qk_norm=nn.RMSNorm, qkv_bias="qv", context_width=CONTEXT)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    x, context = torch.randn(3, 7, WIDTH), torch.randn(3, 7, CONTEXT)
    rows = {"x": x.flatten(0, 1), "offsets": torch.tensor([0, 5, 5, 12], dtype=torch.int32)}
    packed = {"context": context.flatten(0, 1), "context_offsets": rows["offsets"]}
    for arguments in (
        {"x": x, "context": context, "rope": rope, "key_mask": SEEN, "key_stop": STOPS},
        {**rows, **packed, "max_length": 7, "max_context_length": 7},
    ):
        torch.testing.assert_close(compiled(**arguments), module(**arguments))
