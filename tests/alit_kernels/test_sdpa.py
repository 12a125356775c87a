"""scaled_dot_product_attention and fused_sdpa: calls computed by us equal torch's, and all others are torch's."""

from __future__ import annotations

import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention as held
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointError, checkpoint

import alit_kernels as ak
from alit_kernels import sdpa
from alit_kernels.attention.op import limit
from alit_kernels.testing import assert_within_budget
from tests.helpers.ops import values
from tests.helpers.watched import watched

Call = Callable[..., Any]


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """List of the calls that our attention computes."""
    return watched(monkeypatch, sdpa, "attention")


@pytest.fixture
def passed(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """List of the calls that are passed on to torch."""
    return watched(monkeypatch, sdpa, "_torch_attention")


def with_gradients(call: Call, *leaves: Tensor, **options: Any) -> list[Tensor]:
    leaves = tuple(x.detach().requires_grad_() for x in leaves)
    out = call(*leaves, **options)
    weight = torch.arange(out.numel(), device=out.device).view(out.shape).cos().to(out.dtype)
    return [out.detach(), *torch.autograd.grad((out * weight).sum(), leaves)]


def check(*tensors: Tensor, **options: Any) -> None:
    ours = with_gradients(ak.scaled_dot_product_attention, *tensors, **options)
    theirs = with_gradients(held, *tensors, **options)
    with torch.autocast("cpu", enabled=False):
        exact = with_gradients(held, *(x.double() for x in tensors), **options)
    assert ours[0].stride() == theirs[0].stride()
    for i, (a, b, c) in enumerate(zip(ours, theirs, exact, strict=True)):
        assert a.dtype == b.dtype
        if i in (1, 2) and not c.any():  # one key is seen: dP - delta cancels up to rounding
            assert bool((a.abs() < 1e-6).all())
        else:
            assert_within_budget(a, b, c, k=3 if i else 2)


SHAPES = (
    (5, 8),
    (2, 5, 8),
    (2, 3, 5, 8),
    (2, 2, 3, 5, 8),
    (2, 3, 1, 8),
    (0, 3, 5, 8),
    (2, 3, 0, 8),
)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16))
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_layouts(shape: tuple[int, ...], dtype: torch.dtype, taken: list[Any]) -> None:
    q = values(*shape).to(dtype)
    k, v = (values(*shape[:-2], 7, 8, seed=i).to(dtype) for i in (1, 2))
    check(q, k, v)
    check(q, k, v, scale=0.3)
    assert len(taken) == 2


def test_memory_of_the_result(taken: list[Any]) -> None:
    """The result has the memory layout of the queries, since callers use ``view``."""
    packed = values(2, 5, 3, 4, 8).permute(2, 0, 3, 1, 4)
    first = values(5, 2, 4, 8).permute(1, 2, 0, 3)
    after = values(2, 5, 4, 8).transpose(1, 2)
    mask = values(2, 1, 1, 5) > -0.5
    for q, k, v in (packed, (first,) * 3, (after,) * 3, (first.contiguous(), after, first)):
        check(q, k, v)
        check(q, k, v, attn_mask=mask)
    assert len(taken) == 8


def test_large_values_and_views(taken: list[Any]) -> None:
    q, k, v = (values(2, 70, 3, 40, seed=i)[..., 4:36].transpose(1, 2) for i in range(3))
    check(q * 30, k, v)
    check(q, k[:1].expand(2, -1, -1, -1), v.flip(-1)[:1].expand(2, -1, -1, -1))
    assert len(taken) == 2


MASKS = {
    "batch": (2, 1, 1, 7),
    "all": (1, 1, 1, 7),
    "no queries": (1, 7),
    "without a batch": (1, 1, 7),
    "one for all keys": (2, 1, 1, 1),
}


@pytest.mark.parametrize("shape", MASKS.values(), ids=list(MASKS))
def test_key_masks(shape: tuple[int, ...], taken: list[Any]) -> None:
    q, (k, v) = values(2, 3, 5, 8), (values(2, 3, 7, 8, seed=i) for i in (1, 2))
    mask = values(*shape) > -0.5
    check(q, k, v, attn_mask=mask)
    check(q, k, v, attn_mask=mask.expand(2, 3, 5, 7))
    assert len(taken) == 2


@pytest.mark.parametrize(
    "shape, mask",
    (((2, 5, 8), (2, 1, 7)), ((5, 8), (1, 7)), ((2, 3, 4, 5, 8), (1, 3, 1, 1, 7))),
    ids=str,
)
def test_key_masks_of_other_layouts(
    shape: tuple[int, ...], mask: tuple[int, ...], taken: list[Any]
) -> None:
    k, v = (values(*shape[:-2], 7, 8, seed=i) for i in (1, 2))
    check(values(*shape), k, v, attn_mask=values(*mask) > -0.5)
    assert taken


def test_a_query_without_keys_gives_zeros(taken: list[Any]) -> None:
    q, k, v = (values(2, 3, 5, 8, seed=i) for i in range(3))
    mask = torch.tensor([False, True])[:, None, None, None].expand(2, 1, 1, 5)
    out, *grads = with_gradients(ak.scaled_dot_product_attention, q, k, v, attn_mask=mask)
    assert taken and not any(x[0].any() for x in (out, *grads))
    check(q, k, v, attn_mask=mask)


@pytest.mark.parametrize("heads, shared", ((4, 2), (6, 1), (3, 3)))
def test_shared_keys(heads: int, shared: int, taken: list[Any]) -> None:
    k, v = (values(2, shared, 7, 8, seed=i) for i in (1, 2))
    mask = values(2, 1, 1, 7) > -0.5
    for q in (values(2, heads, 5, 8), values(2, 5, heads, 8).transpose(1, 2)):
        check(q, k, v, enable_gqa=True)
        check(q, k, v, enable_gqa=True, attn_mask=mask)
    assert len(taken) == 4


def test_autocast(taken: list[Any]) -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        check(*(values(2, 3, 5, 8, seed=i) for i in range(3)))
    assert taken


CAUSAL_SHAPES = (*((shape, 7) for shape in SHAPES), ((2, 3, 9, 8), 4), ((2, 3, 70, 8), 0))


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16))
@pytest.mark.parametrize("shape, keys", CAUSAL_SHAPES, ids=str)
def test_causal(shape: tuple[int, ...], keys: int, dtype: torch.dtype, taken: list[Any]) -> None:
    """Query i sees keys 0 to i, for any numbers of queries and keys."""
    q = values(*shape).to(dtype)
    k, v = (values(*shape[:-2], keys, 8, seed=i).to(dtype) for i in (1, 2))
    check(q, k, v, is_causal=True)
    check(q * 4, k, v, is_causal=True, scale=0.3)
    assert len(taken) == 2


def test_causal_of_other_memory(taken: list[Any]) -> None:
    packed = values(2, 70, 3, 4, 8).permute(2, 0, 3, 1, 4)
    first = values(70, 2, 4, 8).permute(1, 2, 0, 3)
    after = values(2, 70, 4, 16)[..., 4:12].transpose(1, 2)
    for q, k, v in (packed, (first,) * 3, (after,) * 3, (first.contiguous(), after, first)):
        check(q, k, v, is_causal=True)
    check(packed[0] * 30, *packed[1:], is_causal=True)
    check(packed[0], *(x[:1].expand(2, -1, -1, -1) for x in packed[1:]), is_causal=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        check(*packed, is_causal=True)
    assert len(taken) == 7


@pytest.mark.parametrize("heads, shared", ((4, 2), (6, 1), (3, 3)))
@pytest.mark.parametrize("queries", (0, 5, 9, 70))
def test_causal_with_shared_keys(heads: int, shared: int, queries: int, taken: list[Any]) -> None:
    k, v = (values(2, shared, 7, 8, seed=i) for i in (1, 2))
    for q in (values(2, heads, queries, 8), values(2, queries, heads, 8).transpose(1, 2)):
        check(q, k, v, is_causal=True, enable_gqa=True)
    assert len(taken) == 2


def test_causal_is_torchs_where_nothing_of_ours_knows_stops(
    monkeypatch: pytest.MonkeyPatch, taken: list[Any]
) -> None:
    q, mask = values(1, 2, 256, 8), torch.ones(256, 256, dtype=torch.bool).tril()
    monkeypatch.setattr(sdpa, "available", lambda *_: "the extension is not installed")
    for options in ({"is_causal": True}, {"attn_mask": mask}):
        assert torch.equal(
            ak.scaled_dot_product_attention(q, q, q, **options), held(q, q, q, **options)
        )
    assert not taken
    ak.scaled_dot_product_attention(q, q, q)
    assert taken


def test_causal_with_a_mask_raises_as_torch_does() -> None:
    q = values(2, 3, 5, 8)
    for mask in (torch.ones(5, 5) > 0, torch.ones(2, 1, 1, 5) > 0):
        ours, theirs = (
            outcome(call, q, q, q, mask, 0.0, True)
            for call in (ak.scaled_dot_product_attention, held)
        )
        assert ours == theirs


def of_pairs() -> dict[str, Tensor]:
    """Masks (260, 300) in which every query sees a prefix of the keys."""
    stops = {
        "causal": ak.stops_causal(260),
        "prefix": ak.stops_prefix(260, 33),
        "blocks": ak.stops_blocks([1, 4, 9, 246]),
        "any order, none": (torch.arange(260, dtype=torch.int32) * 77) % 301,
        "all": torch.full((260,), 300),
    }
    return {name: torch.arange(300) < stop[:, None] for name, stop in stops.items()}


@pytest.mark.parametrize("name", of_pairs())
def test_masks_that_are_stops(name: str, taken: list[Any]) -> None:
    """Masks that are stops are recognized by their values on a CPU."""
    mask, q = of_pairs()[name], values(2, 4, 260, 8)
    k, v = (values(2, 4, 300, 8, seed=i) for i in (1, 2))
    for given in (mask, mask[None, None], mask.expand(2, 4, -1, -1), mask[None].expand(4, -1, -1)):
        check(q, k, v, attn_mask=given)
    shared = (x[:, :2].contiguous() for x in (k, v))
    check(q, *shared, attn_mask=mask, enable_gqa=True)
    check(q[0], k[0], v[0], attn_mask=mask.t().contiguous().t())
    check(q[0, 0], k[0, 0], v[0, 0], attn_mask=mask)
    if bool(mask.any(-1).all()):  # as an additive mask
        for given in (mask.float().log(), mask.expand(2, 4, -1, -1).float().log()[:1, :1]):
            check(q, k, v, attn_mask=given)
    assert len(taken) == (9 if bool(mask.any(-1).all()) else 7)


def test_masks_that_are_not_stops(taken: list[Any], passed: list[Any]) -> None:
    causal = of_pairs()["causal"]
    with_a_hole, other_heads = causal.clone(), causal.expand(2, 4, -1, -1).clone()
    with_a_hole[100, 50] = False
    other_heads[1, 2, 100, 50] = False
    q, k = values(2, 4, 260, 8), values(2, 4, 300, 8)
    window = causal & ~causal.tril(-20)
    added = causal.float().log()
    balanced = torch.ones(
        260, 300, dtype=torch.bool
    )  # a row sees too few as often as another too many
    balanced[50:100, 60:120] = False
    balanced[100:150, 60:120] = balanced[100:150, 240:] = False
    masks = (
        balanced,
        balanced.float().log(),
        with_a_hole,
        causal.flip(1),
        window,
        other_heads,
        ~causal,
        added - 1,
        with_a_hole.float().log(),
    )
    for mask in masks:
        check(q, k, k, attn_mask=mask)
    check(q[..., :8, :], k, k, attn_mask=causal[:8])  # too small to be worth it
    assert len(passed) == 10 and not taken
    nothing_seen = added.clone()
    nothing_seen[100] = -torch.inf
    ours, theirs = (call(q, k, k, nothing_seen) for call in (ak.scaled_dot_product_attention, held))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)
    for mask in (added.double(), added.clone().requires_grad_()):
        ours, theirs = (
            outcome(call, q, k, k, mask) for call in (ak.scaled_dot_product_attention, held)
        )
        assert ours == theirs
    assert len(passed) == 13 and not taken
    for wrong in (causal[:, :299], causal[:259], causal.expand(3, 4, -1, -1)):
        ours, theirs = (
            outcome(call, q, k, k, wrong) for call in (ak.scaled_dot_product_attention, held)
        )
        assert ours == theirs


def test_a_mask_is_read_in_every_call() -> None:
    mask, q = of_pairs()["causal"].clone(), values(1, 1, 260, 8)
    k = values(1, 1, 300, 8)
    before = ak.scaled_dot_product_attention(q, k, k, mask)
    mask[:, :200] = True
    after = ak.scaled_dot_product_attention(q, k, k, mask)
    torch.testing.assert_close(after, held(q, k, k, mask))
    assert not torch.equal(before, after)


def passed_on() -> list[Any]:
    q, k = values(2, 4, 5, 8), values(2, 4, 7, 8)
    causal = torch.ones(5, 7, dtype=torch.bool).tril()
    calls = (
        ("causal and dropout", (q, k, k), {"is_causal": True, "dropout_p": 0.5}),
        ("dropout", (q, k, k), {"dropout_p": 0.5}),
        ("queries differ", (q, k, k, causal), {}),
        ("heads differ", (q, k, k), {"attn_mask": torch.ones(1, 4, 1, 7) > 0}),
        ("an empty mask", (q[:, :, :0], k, k, causal[:0]), {}),
        ("additive", (q, k, k), {"attn_mask": torch.zeros(2, 1, 1, 7)}),
        ("value channels", (q, k, k[..., :4]), {}),
        ("float64", (q.double(), k.double(), k.double()), {}),
        ("batch is broadcast", (q, k[:1], k[:1]), {}),
        ("shared values alone", (q, k, k[:, :2]), {"enable_gqa": True}),
        ("three dimensions of shared keys", (q[0], k[0, :2], k[0, :2]), {"enable_gqa": True}),
        ("type", (q.as_subclass(Other), k, k), {}),
        ("scale", (q, k, k), {"scale": float("nan")}),
    )
    return [pytest.param(args, options, id=name) for name, args, options in calls]


class Other(Tensor):
    pass


@pytest.mark.parametrize("args, options", passed_on())
def test_passed_on(
    args: tuple[Any, ...], options: dict[str, Any], passed: list[Any], taken: list[Any]
) -> None:
    """Calls that are not ours are passed on to torch unchanged, with the same result."""
    torch.manual_seed(1)
    ours = ak.scaled_dot_product_attention(*args, **options)
    assert len(passed) == 1 and not taken
    torch.manual_seed(1)
    theirs = held(*args, **options)
    assert type(ours) is type(theirs)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(
    "args",
    (
        ((2, 4, 5, 8), (2, 4, 7, 6), (2, 4, 7, 6)),
        ((2, 4, 5, 8), (2, 3, 7, 8), (2, 3, 7, 8)),
        ((8,), (8,), (8,)),
    ),
    ids=str,
)
def test_wrong_arguments_raise_as_torch_does(args: tuple[tuple[int, ...], ...]) -> None:
    tensors = [values(*shape) for shape in args]
    for call in (ak.scaled_dot_product_attention, held):
        with pytest.raises((RuntimeError, IndexError)):
            call(*tensors)
    q = values(2, 3, 5, 8)
    for shape in ((3, 1, 1, 5), (1, 1, 1, 1, 5), (2, 1, 1, 4), (5,)):
        mask = torch.ones(shape, dtype=torch.bool)
        ours, theirs = (
            outcome(call, q, q, q, mask) for call in (ak.scaled_dot_product_attention, held)
        )
        assert ours == theirs


def outcome(call: Call, *args: Any) -> Any:
    try:
        return call(*args).shape
    except (RuntimeError, IndexError) as error:
        return str(error)


class Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def test_what_watches_operators_sees_that_of_torch(passed: list[Any]) -> None:
    q = values(2, 3, 5, 8)
    attend = ak.scaled_dot_product_attention
    torch.testing.assert_close(torch.vmap(attend)(q, q, q), held(q, q, q))
    with Recorder() as recorder:
        attend(q, q, q)
    assert any("scaled_dot_product" in name for name in recorder.names)
    with sdpa_kernel(SDPBackend.MATH):
        _, tangent = torch.func.jvp(lambda x: attend(x, x, x), (q,), (q,))
        x = q.clone().requires_grad_()
        (grad,) = torch.autograd.grad(attend(x, x, x).square().sum(), x, create_graph=True)
        grad.sum().backward()
    assert tangent.isfinite().all() and x.grad is not None
    nested = torch.nested.nested_tensor([q[0], q[1]], layout=torch.jagged)
    assert attend(nested.transpose(1, 2), *[nested.transpose(1, 2)] * 2).is_nested
    assert attend(*[q.to("meta")] * 3).is_meta
    assert len(passed) >= 6


def block(x: Tensor) -> Tensor:
    return held(x, x, x) + F.scaled_dot_product_attention(x, x, x[..., :1].contiguous())


def test_context(taken: list[Any]) -> None:
    """Within ``fused_sdpa`` every name of the function is ours; contexts may nest, and end by an exception."""
    x = values(2, 3, 5, 8)
    expected = block(x)
    with ak.fused_sdpa():
        torch.testing.assert_close(block(x), expected)
        assert len(taken) == 1
        with ak.fused_sdpa():
            torch.testing.assert_close(block(x), expected)
        F.scaled_dot_product_attention(query=x, key=x, value=x, attn_mask=None)
        torch._C._nn.scaled_dot_product_attention(x, x, x)
        assert len(taken) == 4
    with pytest.raises(ZeroDivisionError), ak.fused_sdpa():
        raise ZeroDivisionError
    block(x)
    assert len(taken) == 4


def test_context_is_of_its_thread(taken: list[Any]) -> None:
    x = values(2, 3, 5, 8)
    with ak.fused_sdpa():
        thread = threading.Thread(target=block, args=(x,))
        thread.start()
        thread.join()
    assert not taken


def test_context_does_not_reach_into_multi_head_attention_forward(taken: list[Any]) -> None:
    module, x = nn.MultiheadAttention(8, 2, batch_first=True), values(2, 5, 8)
    with ak.fused_sdpa():
        module(x, x, x, need_weights=False)
    assert not taken


def targets(graph: torch.fx.GraphModule) -> list[str]:
    return [str(node.target) for node in graph.graph.nodes]


def test_compiles() -> None:
    graphs: list[list[str]] = []

    def backend(graph: torch.fx.GraphModule, _: Any) -> Call:
        graphs.append(targets(graph))
        return graph.forward

    def within(x: Tensor) -> Tensor:
        with ak.fused_sdpa():
            return block(x)

    compile = lambda f: torch.compile(f, fullgraph=True, backend=backend)  # noqa: E731
    x = values(2, 3, 5, 8)
    expected = block(x)
    torch.testing.assert_close(compile(within)(x), expected)
    compiled = compile(block)
    with ak.fused_sdpa():
        torch.testing.assert_close(compiled(x), expected)
    torch.testing.assert_close(compiled(x), expected)
    inside, around, without = graphs
    for graph, ours in ((inside, 1), (around, 1), (without, 0)):
        assert sum("alit_kernels.attention" in name for name in graph) == ours
        assert sum("scaled_dot_product" in name for name in graph) == 2 - ours


def test_compiles_with_masks_and_gradients() -> None:
    q, (k, v) = values(2, 4, 5, 8), (values(2, 2, 7, 8, seed=i) for i in (1, 2))
    mask = values(2, 1, 1, 7) > -0.5
    options = {"attn_mask": mask, "enable_gqa": True}
    call = torch.compile(ak.scaled_dot_product_attention, fullgraph=True, backend="aot_eager")
    for a, b in zip(
        with_gradients(call, q, k, v, **options),
        with_gradients(held, q, k, v, **options),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


def test_compiles_causal() -> None:
    """A causal call compiles to one graph for two lengths, with gradients."""
    call = torch.compile(
        ak.scaled_dot_product_attention, fullgraph=True, backend="eager", dynamic=True
    )
    options = {"is_causal": True, "enable_gqa": True}
    k, v = (values(2, 2, 7, 8, seed=i) for i in (1, 2))
    for length in (5, 9):
        q = values(2, 4, length, 8)
        torch.testing.assert_close(call(q, k, v, **options), held(q, k, v, **options))
    call = torch.compile(ak.scaled_dot_product_attention, fullgraph=True, backend="aot_eager")
    for a, b in zip(
        with_gradients(call, q, k, v, **options),
        with_gradients(held, q, k, v, **options),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


def test_compiled_calls_do_not_read_masks(passed: list[Any]) -> None:
    q, mask = values(1, 2, 256, 8), torch.ones(256, 256, dtype=torch.bool).tril()
    call = torch.compile(ak.scaled_dot_product_attention, fullgraph=True, backend="eager")
    torch.testing.assert_close(call(q, q, q, mask), held(q, q, q, mask))
    assert passed


def test_checkpointing(taken: list[Any]) -> None:
    """Checkpointing works with the context inside the checkpointed function; outside, torch raises CheckpointError."""
    x = values(2, 3, 5, 8).requires_grad_()

    def within(x: Tensor) -> Tensor:
        with ak.fused_sdpa():
            return held(x, x, x)

    checkpoint(within, x, use_reentrant=False).sum().backward()
    assert len(taken) == 2
    with ak.fused_sdpa():
        out = checkpoint(lambda x: held(x, x, x), x, use_reentrant=False)
        with pytest.raises(CheckpointError):
            out.sum().backward()


@pytest.mark.parametrize(("shared", "widest"), ((99 << 10, 256), (163 << 10, 512)))
def test_wide_heads_are_torchs_where_a_block_has_too_little_memory(
    shared: int, widest: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wide heads go to torch if a block has too little shared memory for our kernel; the limit is attention's own."""
    monkeypatch.setattr(sdpa, "available", lambda name, device: "")
    properties = SimpleNamespace(shared_memory_per_block_optin=shared)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    sdpa._widest.cache_clear()
    try:
        assert sdpa.widest_head("cuda", 0) == widest
        for width in (256, 257, 512, 513):
            assert bool(limit(width, torch.device("cuda", 0))) == (width > widest)
    finally:
        sdpa._widest.cache_clear()
    assert sdpa.widest_head("cpu", None) > 512
