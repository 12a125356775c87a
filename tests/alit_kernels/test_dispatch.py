"""Calls under modes and transforms, missing derivatives, and autocast."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

import alit_kernels as ak
from alit_kernels._library import Op
from tests.helpers.ops import PUBLIC


def test_who_looks_at_a_call_sees_an_op() -> None:
    """Modes, transforms and tensor subclasses see the ops as through the dispatcher."""
    q = torch.randn(1, 3, 1, 4)
    for _ in range(2):  # the second call has a known signature
        ak.attention(q, q, q)

    seen = []

    class Names(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None):
            seen.append(function.name())
            return function(*args, **(kwargs or {}))

    with Names():
        ak.attention(q, q, q)
    assert "alit_kernels::attention" in seen
    with FakeTensorMode() as mode:
        fake = mode.from_tensor(q)
        assert isinstance(ak.attention(fake, fake, fake), FakeTensor)
    graph = make_fx(lambda x: ak.attention(x, x, x))(q).graph
    assert any("alit_kernels.attention" in str(node.target) for node in graph.nodes)
    assert ak.attention(q.to("meta"), q.to("meta"), q.to("meta")).is_meta


def test_transforms_within_other_modes() -> None:
    """Transforms work on fake tensors, in a trace, which holds the op, and under functionalize."""

    def loss(z: Tensor, codebook: Tensor) -> Tensor:
        return ak.vector_quantize(z, codebook).loss

    real = torch.randn(5, 4), torch.randn(6, 4)
    expected = torch.func.grad(loss)(*real)
    with FakeTensorMode() as mode:
        fake = [mode.from_tensor(x) for x in real]
        assert torch.func.grad(loss)(*fake).shape == (5, 4)
        assert torch.vmap(lambda x: x + loss(*fake))(fake[0]).shape == (5, 4)
    graph = make_fx(torch.func.grad(loss), tracing_mode="fake")(*real)
    torch.testing.assert_close(graph(*real), expected)
    assert "vector_quantize_backward" in graph.code
    torch.testing.assert_close(torch.func.functionalize(loss)(*real), loss(*real))


def test_missing_backward_fails() -> None:
    """An op without a backward must not be differentiated through its reference."""
    op = Op(
        "test_no_backward(Tensor x) -> Tensor", reference=lambda x: x * 2, fake=torch.empty_like
    )
    x = torch.ones(2, requires_grad=True)
    out = op(x)
    assert out.requires_grad
    with pytest.raises(RuntimeError, match="test_no_backward"):
        out.sum().backward()
    assert x.grad is None


def test_vmap_and_forward_mode_raise_by_name() -> None:
    q = torch.randn(1, 3, 1, 4)
    with pytest.raises(
        NotImplementedError, match=r"alit_kernels.attention does not support torch.vmap"
    ):
        torch.vmap(lambda x: ak.attention(x, x, x))(torch.randn(2, 1, 3, 1, 4))
    with pytest.raises(
        NotImplementedError, match=r"alit_kernels.attention does not support forward-mode"
    ):
        torch.func.jvp(lambda x: ak.attention(x, x, x), (q,), (torch.ones_like(q),))


@pytest.mark.parametrize(
    "gradients_of_many",
    (
        lambda f, x: torch.autograd.functional.jacobian(f, x, vectorize=True),
        lambda f, x: torch.func.jacrev(f)(x),
        lambda f, x: torch.vmap(torch.func.grad(lambda y: f(y).sum()))(x[None]),
    ),
)
def test_batched_gradients_are_refused_by_name(gradients_of_many: Callable[..., Any]) -> None:
    with pytest.raises(NotImplementedError, match=r"alit_kernels.attention.* torch.vmap"):
        gradients_of_many(lambda x: ak.attention(x, x, x), torch.randn(1, 3, 1, 4))


MODULES = ("SelfAttention", "VectorQuantizer")
DIFFERENTIABLE = [
    name
    for name in PUBLIC
    if name not in (*MODULES, "nearest_codeword", "codebook_statistics", "attention_map")
]


@pytest.mark.parametrize("name", (*DIFFERENTIABLE, *MODULES))
def test_gradients_after_a_transform_has_ended(name: str) -> None:
    """The pullback of ``torch.func.vjp`` gives the right gradients after the transform has ended, plain and nested,
    though tensors that an op makes of the inputs (offsets, say) belong to the transform.
    """
    function, leaves = PUBLIC[name]
    out = function(*leaves)
    cotangent = torch.randn(out.shape)
    expected = torch.autograd.grad(out, leaves, cotangent)
    inputs = tuple(x.detach() for x in leaves)

    def outer(*x: Tensor) -> Tensor:
        return torch.func.vjp(function, *x)[0]

    for transformed in (function, outer):
        found, pullback = torch.func.vjp(transformed, *inputs)
        torch.testing.assert_close(found, out.detach())
        for _ in range(2):
            for ours, theirs in zip(pullback(cotangent), expected, strict=True):
                torch.testing.assert_close(ours, theirs)
    with pytest.raises(NotImplementedError, match=r"alit_kernels\.\w+ .*torch\.vmap"):
        torch.func.jacrev(lambda *x: function(*x).flatten().expand(2, -1))(*inputs)


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_second_derivatives_are_right_or_refused(name: str) -> None:
    """pack and unpack have right second derivatives; all other ops raise."""
    function, leaves = PUBLIC[name]
    inputs = tuple(x.detach().double().requires_grad_() for x in leaves)
    if name in ("pack", "unpack"):
        assert torch.autograd.gradgradcheck(function, inputs)
        return
    out = function(*inputs)
    weights = torch.randn(out.shape, dtype=out.dtype, requires_grad=True)
    gradients = torch.autograd.grad(out, inputs, weights, create_graph=True)
    for gradient in gradients:
        assert gradient.requires_grad
        with pytest.raises(RuntimeError, match=r"alit_kernels\W+\w+_backward\b"):
            torch.autograd.grad(gradient.square().sum(), (*inputs, weights), retain_graph=True)


class NoGradient(torch.autograd.Function):
    """Identity without a gradient: the backward returns None."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> None:
        return None


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_no_gradient_makes_none(name: str) -> None:
    function, leaves = PUBLIC[name]
    for _ in range(2):  # new signature, then a known one
        out = NoGradient.apply(function(*leaves))
        assert torch.autograd.grad(out.sum(), leaves, allow_unused=True) == (None,) * len(leaves)


@pytest.mark.parametrize("implementation", ("auto", "reference"))
def test_gradients_of_single_results_add_up(implementation: str) -> None:
    """Gradients of single results add up to that of all; an unused result has None as gradient, not zeros."""
    q, z, codebook = torch.randn(1, 5, 2, 4), torch.randn(6, 4), torch.randn(7, 4)
    target, options = torch.arange(6) % 4, {"implementation": implementation}
    calls: tuple[tuple[Callable[..., Any], tuple[Tensor, ...]], ...] = (
        (lambda *x: ak.attention(*x, return_lse=True, **options), (q, q + 1, q - 1)),
        (lambda *x: ak.soft_codebook(*x, target, **options), (z, codebook[:4])),
        (lambda *x: ak.soft_codebook(*x, **options)[:1], (z, codebook[:4])),
        (lambda *x: ak.codebook_entropy(*x, temperature=0.5, **options), (z, codebook)),
        (lambda *x: ak.vector_quantize(*x, **options)[::2], (z, codebook)),
        (lambda *x: ak.vector_quantize(*x, **options)[3:5], (z, codebook)),
    )
    for call, inputs in calls:
        leaves = [x.clone().requires_grad_() for x in inputs]
        results = call(*leaves)
        weights = [torch.randn_like(x) for x in results]

        def of(*which: int) -> list[Tensor]:
            total = sum((results[i] * weights[i]).sum() for i in which)  # noqa: B023
            found = torch.autograd.grad(total, leaves, retain_graph=True, allow_unused=True)  # noqa: B023
            return [torch.zeros_like(x) if g is None else g for g, x in zip(found, leaves)]  # noqa: B023, B905

        each = zip(*(of(i) for i in range(len(results))), strict=True)
        for together, apart in zip(of(*range(len(results))), each, strict=True):
            torch.testing.assert_close(sum(apart), together)


def test_autocast_outside_an_op_stays() -> None:
    op = Op(
        "test_autocast(Tensor x) -> Tensor",
        reference=lambda x: x @ x,
        fake=torch.empty_like,
    )
    x = torch.ones(2, 2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert op(x).dtype == torch.float32
        assert (x @ x).dtype == torch.bfloat16
        with pytest.raises(RuntimeError):
            op(torch.ones(2, 3))
        assert (x @ x).dtype == torch.bfloat16


@pytest.mark.parametrize("name", (*DIFFERENTIABLE, "nearest_codeword"))
def test_double_precision_stays_under_autocast(name: str) -> None:
    function, leaves = PUBLIC[name]
    inputs = tuple(x.detach().double() for x in leaves)
    expected = function(*inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = function(*inputs)
    assert found.dtype == expected.dtype == torch.float64
    assert torch.equal(found, expected)


def test_double_and_single_precision_do_not_mix_under_autocast() -> None:
    x, double = torch.randn(4, 4), torch.randn(4, 4, dtype=torch.float64)
    heads = x[None, :, None]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for call in (ak.nearest_codeword, ak.vector_quantize, ak.soft_codebook):
            with pytest.raises(TypeError, match="codebook: expected dtype"):
                call(double, x)
        with pytest.raises(TypeError, match="k: expected dtype"):
            ak.attention(heads.double(), heads, heads)


def test_zeros_without_memory() -> None:
    """Zero tensors without memory, as made by torch's forward-mode differentiation, are computed with."""
    zeros, q = torch._efficientzerotensor((2, 4, 2, 8)), torch.randn(2, 4, 2, 8)
    torch.testing.assert_close(ak.attention(q, q, zeros), torch.zeros_like(q))


def test_elements_that_begin_between_addresses() -> None:
    data = torch.randn(32).numpy().tobytes()
    odd = torch.frombuffer(bytearray(b"x" + data), dtype=torch.float32, offset=1).view(1, 2, 2, 8)
    even = odd.clone()
    torch.testing.assert_close(ak.attention(odd, odd, odd), ak.attention(even, even, even))


def test_a_sign_that_is_still_to_be_applied() -> None:
    """A tensor with the lazy negative bit, whose memory holds the opposite values, is read correctly."""
    q, v = torch.randn(2, 1, 3, 1, 4)
    torch.testing.assert_close(ak.attention(q, q, torch._neg_view(v)), ak.attention(q, q, -v))
