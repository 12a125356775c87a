"""nn.MultiheadAttention in place of torch's: calls that it computes, and calls that it leaves to its parent."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import distribute_module, distribute_tensor

from alit_kernels import sdpa
from alit_kernels.nn import MultiheadAttention, multihead_attention
from alit_kernels.testing import assert_within_budget
from tests.helpers.ops import values
from tests.helpers.watched import watched

WIDTH, HEADS = 16, 4
CAUSAL = torch.ones(5, 5).triu(1) > 0  # True where a key is hidden


def pair(**options: Any) -> tuple[MultiheadAttention, nn.MultiheadAttention]:
    """Our module with the state of torch's, and torch's module, with biases other than zero."""
    theirs = nn.MultiheadAttention(WIDTH, HEADS, **options)
    for name, p in theirs.named_parameters():
        if "bias" in name:
            nn.init.normal_(p)
    ours = MultiheadAttention(WIDTH, HEADS, **options)
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """List of the calls that our attention computes."""
    return watched(monkeypatch, multihead_attention, "scaled_dot_product_attention")


def results(module: nn.Module, inputs: tuple[Tensor, ...], **options: Any) -> list[Tensor]:
    """Output and gradients of inputs and parameters; a tensor given twice has one gradient."""
    leaves = {id(x): x.detach().clone().requires_grad_() for x in inputs}
    out, weights = module(*(leaves[id(x)] for x in inputs), **options)
    assert weights is None
    total = (out * values(*out.shape, seed=3).to(out.dtype)).sum()
    return [out.detach(), *torch.autograd.grad(total, [*leaves.values(), *module.parameters()])]


def check(ours: nn.Module, theirs: nn.Module, *inputs: Tensor, **options: Any) -> None:
    found, expected = (results(x, inputs, **options) for x in (ours, theirs))
    wide = {id(x): x.double() for x in inputs}
    exact = results(copy.deepcopy(theirs).double(), tuple(wide[id(x)] for x in inputs), **options)
    for i, (a, b, c) in enumerate(zip(found, expected, exact, strict=True)):
        assert a.dtype == b.dtype
        assert_within_budget(a, b, c, k=3 if i else 2)


@pytest.mark.parametrize("bias", (True, False))
@pytest.mark.parametrize("batch_first", (True, False))
@pytest.mark.parametrize("masked", (True, False))
@pytest.mark.parametrize("training", (True, False))
def test_equals_the_parent(
    bias: bool, batch_first: bool, masked: bool, training: bool, taken: list[Any]
) -> None:
    ours, theirs = pair(bias=bias, batch_first=batch_first)
    ours.train(training), theirs.train(training)
    q, k, v = values(2, 5, WIDTH), values(2, 7, WIDTH), values(2, 7, WIDTH, seed=1)
    if not batch_first:
        q, k, v = (x.transpose(0, 1) for x in (q, k, v))
    for inputs in ((q, q, q), (q, k, k), (q, k, v)):
        keys = inputs[1].shape[1 if batch_first else 0]
        mask = values(2, keys) > 0.3 if masked else None
        check(ours, theirs, *inputs, key_padding_mask=mask, need_weights=False)
    assert len(taken) == 3


def test_large_values_empty_batches_and_views(taken: list[Any]) -> None:
    ours, theirs = pair(batch_first=True)
    x = values(2, 5, 2 * WIDTH)[..., ::2]
    for inputs in (x * 100, x[:0], x[:, :1], x[:1].expand(3, -1, -1)):
        check(ours, theirs, inputs, inputs, inputs, need_weights=False)
    assert len(taken) == 4


@pytest.mark.filterwarnings("ignore:.*mismatched key_padding_mask")
@pytest.mark.parametrize(
    "options, call",
    (
        ({}, {"need_weights": True}),
        ({}, {"need_weights": True, "average_attn_weights": False}),
        ({}, {"attn_mask": torch.ones(5, 5).triu(1) > 0}),
        ({}, {"attn_mask": CAUSAL, "is_causal": True, "need_weights": True}),
        ({}, {"attn_mask": CAUSAL, "is_causal": True, "key_padding_mask": torch.zeros(2, 5) > 0}),
        ({}, {"attn_mask": CAUSAL.expand(8, 5, 5), "is_causal": True}),
        ({"dropout": 0.5}, {"attn_mask": CAUSAL, "is_causal": True}),
        ({}, {"key_padding_mask": torch.zeros(2, 5)}),
        ({"dropout": 0.5}, {}),
        ({"add_bias_kv": True}, {}),
        ({"add_zero_attn": True}, {}),
        ({"kdim": WIDTH, "vdim": 8}, {}),
    ),
    ids=str,
)
def test_left_to_the_parent(
    options: dict[str, Any], call: dict[str, Any], taken: list[Any]
) -> None:
    ours, theirs = pair(batch_first=True, **options)
    x = values(2, 5, WIDTH)
    v = x[..., : options.get("vdim", WIDTH)]
    found = []
    for module in (ours, theirs):
        torch.manual_seed(1)
        found.append(module(x, x, v, **{"need_weights": False, **call}))
    (a, a_weights), (b, b_weights) = found
    assert torch.equal(a, b) and not taken
    assert (a_weights is None) == (b_weights is None)
    if a_weights is not None:
        assert torch.equal(a_weights, b_weights)


@pytest.mark.parametrize("batch_first", (True, False))
@pytest.mark.parametrize("additive", (True, False))
@pytest.mark.parametrize("stops", (True, False))
def test_masks_of_pairs(
    batch_first: bool,
    additive: bool,
    stops: bool,
    taken: list[Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Masks of pairs that are stops are recognized on a CPU; others are left to torch's attention."""
    ours, theirs = pair(batch_first=batch_first)
    q, k = values(2, 260, WIDTH), values(2, 300, WIDTH)
    q, k = (x if batch_first else x.transpose(0, 1).contiguous() for x in (q, k))
    by_ours, attention = [], sdpa.attention
    monkeypatch.setattr(
        sdpa, "attention", lambda *a, **b: (by_ours.append(1), attention(*a, **b))[1]
    )
    for inputs in ((q, q, q), (q, k, k), (k, q, q)):
        queries, keys = (x.shape[1 if batch_first else 0] for x in inputs[:2])
        hidden = torch.ones(queries, keys).triu(1) > 0
        hidden[:, 7] |= not stops
        hidden[:, 0] = False
        mask = torch.zeros(queries, keys).masked_fill(hidden, -torch.inf) if additive else hidden
        options = {"attn_mask": mask, "need_weights": False}
        found, expected = (results(m, inputs, **options) for m in (ours, theirs))
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    assert len(taken) == 3 and len(by_ours) == (3 if stops else 0)


@pytest.mark.parametrize("batch_first", (True, False))
@pytest.mark.parametrize("training", (True, False))
@pytest.mark.parametrize("additive", (True, False))
def test_causal(batch_first: bool, training: bool, additive: bool, taken: list[Any]) -> None:
    """With ``is_causal`` the mask is not read, as by torch, whatever it holds."""
    ours, theirs = pair(batch_first=batch_first)
    ours.train(training), theirs.train(training)
    q, k = values(2, 5, WIDTH), values(2, 7, WIDTH)
    q, k = (x if batch_first else x.transpose(0, 1).contiguous() for x in (q, k))
    for inputs in ((q, q, q), (q, k, k), (k, q, q)):
        queries, keys = (x.shape[1 if batch_first else 0] for x in inputs[:2])
        hidden = torch.ones(queries, keys).triu(1) > 0
        options = {"is_causal": True, "need_weights": False}
        if not additive:
            check(ours, theirs, *inputs, attn_mask=hidden, **options)
            check(ours, theirs, *inputs, attn_mask=~hidden, **options)
            continue
        mask = torch.zeros(queries, keys).masked_fill(hidden, -torch.inf)
        found, expected = (results(m, inputs, attn_mask=mask, **options) for m in (ours, theirs))
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b)
    assert len(taken) == (3 if additive else 6)


def test_masks_of_the_fast_path_are_read(taken: list[Any]) -> None:
    """Torch's fast path (evaluation, no gradients, self-attention) reads the mask, not ``is_causal``; so do we."""
    ours, theirs = pair(batch_first=True)
    ours.eval(), theirs.eval()
    x, mask = values(2, 5, WIDTH), torch.ones(5, 5).tril(-2) > 0
    options = {"attn_mask": mask, "is_causal": True, "need_weights": False}
    with torch.no_grad():
        found, expected = (m(x, x, x, **options)[0] for m in (ours, theirs))
        assert torch.equal(found, expected) and not taken
        other = (m(x, x.clone(), x, **options)[0] for m in (ours, theirs))
        torch.testing.assert_close(*other)
    assert len(taken) == 1
    with_gradients = ours(x, x, x, **options)[0]
    assert len(taken) == 2 and not torch.allclose(with_gradients, expected)


@pytest.mark.parametrize("mask", (None, CAUSAL[:, :4], CAUSAL.int(), CAUSAL[None, None]))
def test_wrong_causal_calls_are_left_to_the_parent(mask: Tensor | None, taken: list[Any]) -> None:
    x = values(2, 5, WIDTH)
    errors = [error_of(m, x, attn_mask=mask, is_causal=True) for m in pair(batch_first=True)]
    assert errors[0] == errors[1] and not taken
    assert errors[0] is not None or mask is not None


def test_causal_encoders(taken: list[Any]) -> None:
    """Encoders detect by themselves that their mask is causal, and our attention computes them."""
    layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 32, dropout=0.0, batch_first=True)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    x, mask = values(2, 5, WIDTH), nn.Transformer.generate_square_subsequent_mask(5)
    before = model(x, mask=mask)
    for each in model.layers:
        each.self_attn.__class__ = MultiheadAttention
    torch.testing.assert_close(model(x, mask=mask), before)
    assert len(taken) == 2


def test_dropout_in_evaluation_is_none(taken: list[Any]) -> None:
    ours, theirs = pair(batch_first=True, dropout=0.5)
    x = values(2, 5, WIDTH)
    check(ours.eval(), theirs.eval(), x, x, x, need_weights=False)
    assert taken


def test_other_inputs_are_left_to_the_parent(taken: list[Any]) -> None:
    ours, theirs = pair(batch_first=True)
    x = values(2, 5, WIDTH)
    single = [m(x[0], x[0], x[0], need_weights=False)[0] for m in (ours, theirs)]
    assert torch.equal(*single)
    nested = torch.nested.nested_tensor([x[0], x[1, :3]])
    with torch.no_grad():
        for m in (ours, theirs):
            m.eval()
        both = [m(nested, nested, nested, need_weights=False)[0] for m in (ours, theirs)]
    assert torch.equal(*(y.to_padded_tensor(0.0) for y in both))
    for bad in (x[..., :8], x.double()):
        errors = [error_of(m, bad) for m in (ours, theirs)]
        assert errors[0] == errors[1] is not None
    wrong = torch.zeros(2, 4, dtype=torch.bool)
    errors = [error_of(m, x, key_padding_mask=wrong) for m in (ours.train(), theirs.train())]
    assert errors[0] == errors[1] is not None
    assert not taken or len(taken) == 1  # float64 returns the same shapes


def error_of(module: nn.Module, x: Tensor, **options: Any) -> type[Exception] | None:
    try:
        module(x, x, x, need_weights=False, **options)
    except Exception as error:
        return type(error)
    return None


def test_sharded_weights_are_left_to_the_parent(taken: list[Any]) -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh = dist.init_device_mesh("cpu", (1,))
        x = distribute_tensor(values(2, 5, WIDTH), mesh)
        a, b = (
            distribute_module(m, mesh)(x, x, x, need_weights=False)[0].full_tensor()
            for m in pair(batch_first=True)
        )
    finally:
        dist.destroy_process_group()
    assert torch.equal(a, b) and not taken


def test_a_row_without_keys() -> None:
    """A row without keys gives the output bias, where torch's fast path gives NaN."""
    ours, _ = pair(batch_first=True)
    x, mask = values(2, 5, WIDTH), torch.zeros(2, 5, dtype=torch.bool)
    mask[0] = True
    with torch.no_grad():
        out, _ = ours.eval()(x, x, x, mask, need_weights=False)
    torch.testing.assert_close(out[0], ours.out_proj.bias.expand(5, -1))


def test_state_pickles_and_copies() -> None:
    ours, theirs = pair(batch_first=True)
    assert isinstance(ours, nn.MultiheadAttention)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    x = values(2, 5, WIDTH)
    expected = ours(x, x, x, need_weights=False)[0]
    buffer = io.BytesIO()
    torch.save(ours, buffer)
    buffer.seek(0)
    for other in (
        pickle.loads(pickle.dumps(ours)),
        copy.deepcopy(ours),
        torch.load(buffer, weights_only=False),
    ):
        assert type(other) is MultiheadAttention
        assert torch.equal(other(x, x, x, need_weights=False)[0], expected)


def test_autocast(taken: list[Any]) -> None:
    ours, theirs = pair(batch_first=True)
    x = values(2, 5, WIDTH)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        a, b = (m(x, x, x, need_weights=False)[0] for m in (ours, theirs))
    assert a.dtype == b.dtype == torch.bfloat16 and taken
    torch.testing.assert_close(a, b, rtol=0.03, atol=0.03)


def test_in_encoder_layers(taken: list[Any]) -> None:
    """Torch's encoder layer calls our module in training but not in its fast path, whose results do not change."""
    layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 32, dropout=0.0, batch_first=True)
    x = values(2, 5, WIDTH)
    before = layer(x)
    layer.self_attn.__class__ = MultiheadAttention
    torch.testing.assert_close(layer(x), before)
    assert len(taken) == 1
    with torch.no_grad():
        torch.testing.assert_close(layer.eval()(x), before)
    assert len(taken) == 1


def test_compiles() -> None:
    ours, theirs = pair()
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    x, k = values(5, 2, WIDTH), values(5, 2, WIDTH, seed=1)
    check(compiled, theirs, x, x, x, need_weights=False)
    check(compiled, theirs, x, k, k, key_padding_mask=values(2, 5) > 0.3, need_weights=False)
