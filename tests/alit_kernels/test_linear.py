"""Linear layers through oneDNN: results and gradients of torch's own, and its use only outside modes and transforms."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import gelu
from torch.utils.flop_counter import FlopCounterMode

import alit_kernels.nn.linear as module
from alit_kernels._cpu import mkl_is_slow
from alit_kernels.nn.linear import GELULinear, Linear, linear, onednn_is_faster
from tests.helpers.watched import watched


@pytest.fixture(params=("torch", "oneDNN"))
def library(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Name of the library that products use: both are tested, whichever this machine prefers."""
    if request.param == "oneDNN" and not torch.backends.mkldnn.is_available():
        pytest.skip("this torch was built without oneDNN")
    monkeypatch.setattr(module, "onednn_is_faster", lambda: request.param == "oneDNN")
    monkeypatch.setattr(module, "LEAST", 1)
    return str(request.param)


@pytest.fixture
def products(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """List of the calls of products through oneDNN."""
    return watched(monkeypatch, module, "_onednn")


def inputs(case: str, rows: int, width: int) -> Tensor:
    """Rows (..., width) in the memory layout named ``case``."""
    x = torch.randn(rows, 2 * width + 1)
    return {
        "contiguous": x[:, :width].contiguous(),
        "every second": x[:, : 2 * width : 2],
        "unaligned": x.flatten()[1 : 1 + rows * width].view(rows, width),
        "transposed": x[:, :width].t().contiguous().t(),
        "expanded": x[:1, :width].expand(rows, width),
        "batched": x[:, :width].contiguous()[None].expand(2, rows, width),
    }[case]


def of_torch(layer: nn.Linear) -> Callable[[Tensor], Tensor]:
    """Function that computes the layer by torch's own functions."""
    before = gelu if isinstance(layer, GELULinear) else nn.Identity()
    return lambda x: torch.nn.functional.linear(before(x), layer.weight, layer.bias)


KINDS = pytest.mark.parametrize("kind", (Linear, GELULinear))
CASES = ("contiguous", "every second", "unaligned", "transposed", "expanded", "batched")


@pytest.mark.parametrize("gelu_first", (False, True), ids=("linear", "gelu"))
@pytest.mark.parametrize("bias", (True, False), ids=("bias", "plain"))
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("rows, width, outputs", ((37, 24, 8), (5, 8, 40), (1, 3, 1), (0, 8, 8)))
def test_results_and_gradients(
    rows: int, width: int, outputs: int, case: str, bias: bool, gelu_first: bool, library: str,
    products: list[Any],
) -> None:  # fmt: skip
    """Errors against float64 are at most twice those of torch, plus roundings of terms of size 1."""
    if rows == 0 and case == "expanded":
        pytest.skip("there is no row to expand")
    x = inputs(case, rows, width)
    layer = (GELULinear if gelu_first else Linear)(width, outputs, bias=bias)
    plain = nn.Sequential(nn.GELU(), nn.Linear(width, outputs, bias=bias))[not gelu_first :]
    plain[-1].load_state_dict(layer.state_dict())
    grad = torch.randn(*x.shape[:-1], outputs)

    def of(function: nn.Module, dtype: torch.dtype) -> list[Tensor]:
        leaf = x.detach().to(dtype).requires_grad_()
        function = function.to(dtype)
        out = function(leaf)
        return [out, *torch.autograd.grad(out, [leaf, *function.parameters()], grad.to(dtype))]

    ours = of(layer, torch.float32)
    assert bool(products) == (library == "oneDNN" and rows > 0)
    theirs, exact = of(plain, torch.float32), of(plain, torch.float64)
    for result, other, right in zip(ours, theirs, exact, strict=True):
        assert result.dtype == torch.float32 and result.shape == right.shape
        if right.numel():
            errors = [float((x - right).detach().abs().max()) for x in (result, other)]
            largest = max(1.0, float(right.detach().abs().max()))
            assert errors[0] <= 2 * errors[1] + 4 * torch.finfo(torch.float32).eps * largest


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float32))
@pytest.mark.parametrize("shape", ((2, 5, 8), (8,)))
@pytest.mark.parametrize("frozen", ("", "weight", "bias", "x"))
@KINDS
def test_gradients_of_what_asks_for_one(
    kind: type[nn.Linear], frozen: str, shape: tuple[int, ...], dtype: torch.dtype, library: str
) -> None:
    """Only wanted gradients are computed, in the dtypes of autocast, as by torch."""
    layer = kind(8, 3)
    results = []
    for function in (layer, of_torch(layer)):
        x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).requires_grad_()
        tensors = {"x": x, "weight": layer.weight, "bias": layer.bias}
        for name, tensor in tensors.items():
            tensor.requires_grad_(name != frozen)
        wanted = [tensor for name, tensor in tensors.items() if name != frozen]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = function(x.to(dtype))
        results.append([out, *torch.autograd.grad(out.float().square().sum(), wanted)])
    torch.testing.assert_close(*results)  # dtypes too


@KINDS
def test_nan_and_infinity_stay_in_their_rows(kind: type[nn.Linear], library: str) -> None:
    layer, x = kind(8, 3), torch.randn(4, 8)
    x[1, 2], x[2, 3] = torch.nan, torch.inf
    finite = layer(x).isfinite().all(1)
    assert finite.tolist() == [True, False, False, True]


def test_what_looks_sees_a_linear_layer_of_torch(
    monkeypatch: pytest.MonkeyPatch, products: list[Any]
) -> None:
    monkeypatch.setattr(module, "onednn_is_faster", lambda: True)
    monkeypatch.setattr(module, "LEAST", 2**16)
    layer, x = Linear(256, 32), torch.randn(8, 256)
    with FlopCounterMode(display=False) as counter:
        layer(x)
    assert counter.get_total_flops() == 2 * 8 * 256 * 32
    torch.func.vmap(lambda row: linear(row, layer.weight, layer.bias))(x)
    torch.func.jvp(layer, (x,), (x,))
    torch.func.jacrev(layer)(x)
    with torch.autograd.forward_ad.dual_level():
        layer(torch.autograd.forward_ad.make_dual(x, x))
    with torch.device("meta"):
        assert Linear(256, 32)(torch.empty(8, 256)).shape == (8, 32)
    torch.compile(layer, fullgraph=True, backend="eager")(x)
    layer.double()(x.double())
    with torch.backends.mkldnn.flags(enabled=False):
        layer.float()(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        layer(x)
    layer(x[:7])
    assert not products, "few multiply-adds"
    if torch.backends.mkldnn.is_available():
        layer(x)
        assert products


@KINDS
def test_second_derivatives(kind: type[nn.Linear], library: str, products: list[Any]) -> None:
    """Second derivatives equal torch's, for a sum, whose gradient does not depend on the result, and for squares."""
    layer = kind(8, 4)
    for power in (1, 2):
        results = []
        for function in (layer, of_torch(layer)):
            x = torch.randn(3, 8, generator=torch.Generator().manual_seed(0)).requires_grad_()
            (grad,) = torch.autograd.grad(function(x).pow(power).sum(), x, create_graph=True)
            leaves = [x, layer.weight] if grad.requires_grad else []
            second = torch.autograd.grad(grad.square().sum(), leaves, allow_unused=True)
            results.append([torch.zeros_like(x) if g is None else g for g in second])
        assert len(results[0]) == 2
        torch.testing.assert_close(*results)
    assert bool(products) == (library == "oneDNN")


@KINDS
def test_transforms(kind: type[nn.Linear], library: str) -> None:
    """Transforms of torch.func give torch's results, also for inputs that require a gradient."""
    layer, x = kind(8, 4), torch.randn(3, 8).requires_grad_()

    def results(function: Callable[[Tensor], Tensor]) -> list[Tensor]:
        def loss(x: Tensor) -> Tensor:
            return function(x).square().sum()

        return [
            torch.func.vmap(torch.func.grad(loss))(x),
            torch.func.hessian(loss)(x[0]),
            *torch.func.jvp(function, (x,), (torch.ones_like(x),)),
        ]

    torch.testing.assert_close(results(layer), results(of_torch(layer)))


@pytest.mark.parametrize("weight", ("whole", "every second", "transposed", "part"))
@pytest.mark.parametrize(
    "bias", ("whole", "expanded", "every second", "unaligned", "of one", "of rows", "number")
)
def test_parameters_of_any_layout(weight: str, bias: str, library: str) -> None:
    """Parameters of any layout, and biases that broadcast, give torch's results."""
    w = {
        "whole": torch.randn(6, 8),
        "every second": torch.randn(6, 16)[:, ::2],
        "transposed": torch.randn(8, 6).t(),
        "part": torch.randn(18, 8)[6:12],
    }[weight]
    b = {
        "whole": torch.randn(6),
        "expanded": torch.randn(1).expand(6),
        "every second": torch.randn(12)[::2],
        "unaligned": torch.randn(7)[1:],
        "of one": torch.randn(1),
        "of rows": torch.randn(5, 6),
        "number": torch.randn(()),
    }[bias]
    x = torch.randn(5, 8)
    torch.testing.assert_close(linear(x, w, b), torch.nn.functional.linear(x, w, b))


@pytest.mark.parametrize("frozen", ("weight", "x"))
def test_what_no_gradient_needs_is_not_kept(frozen: str, library: str) -> None:
    """Tensors that no gradient needs are not saved: they may be changed before the backward."""
    layer, x = Linear(8, 4), torch.randn(3, 8)
    (layer.weight if frozen == "weight" else x).requires_grad_(False)
    h = x.requires_grad_(frozen != "x") * 1
    out = layer(h)
    with torch.no_grad():
        (h if frozen == "weight" else layer.weight).add_(1)
    out.sum().backward()


def test_layouts_other_than_strided(library: str, products: list[Any]) -> None:
    """Sparse and other layouts are left to torch."""
    layer, x = Linear(8, 4, bias=False), torch.randn(3, 8)
    with torch.no_grad():
        expected = layer(x)
        products.clear()
        sparse = linear(x.to_sparse_csr(), layer.weight)
    torch.testing.assert_close(
        sparse.to_dense() if sparse.layout != torch.strided else sparse, expected
    )
    assert not products


def test_a_wrong_width_is_refused(library: str) -> None:
    with pytest.raises(RuntimeError):
        Linear(8, 3)(torch.randn(5, 7))


def test_the_choice_is_made_by_the_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    for flags, expected in (
        ({"avx512_f": True, "sse4a": True}, True),
        ({"avx512_f": True, "sse4a": False}, False),
        ({"avx2": True, "sse4a": True}, False),
        ({}, False),
    ):
        mkl_is_slow.cache_clear(), onednn_is_faster.cache_clear()
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda flags=flags: flags, raising=False)
        assert onednn_is_faster() is expected
    mkl_is_slow.cache_clear(), onednn_is_faster.cache_clear()
