"""add_layer_norm against addition and torch's layer norm."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor
from torch.nn.functional import layer_norm

from alit_kernels import add_layer_norm
from alit_kernels.add_layer_norm.cases import TEST_CASES, Case, Inputs, make
from alit_kernels.testing import assert_within_budget
from tests.helpers.targets import Target, targets

EVERYWHERE = pytest.mark.parametrize("target", targets("triton"))


def written_out(
    x: Tensor, branch: Tensor | None, weight: Tensor, bias: Tensor
) -> tuple[Tensor, Tensor]:
    total = x if branch is None else x + branch
    return total, layer_norm(total, total.shape[-1:], weight, bias)


def results(
    inputs: Inputs, dtype: torch.dtype | None, implementation: str = ""
) -> dict[str, Tensor]:
    """Outputs, and gradients of a fixed sum of them, with all inputs as ``dtype`` (None: as they are)."""
    leaves = [
        None if t is None else t.detach().to(dtype or t.dtype).requires_grad_() for t in inputs
    ]
    function = (
        partial(add_layer_norm, implementation=implementation) if implementation else written_out
    )
    outputs = function(*leaves)
    generator = torch.Generator().manual_seed(1)
    factors = [torch.randn(o.shape, generator=generator).to(o) for o in outputs]
    # Apart, so that the sum's gradient is no multiple of a constant row, which a layer norm removes.
    total = sum((o * f).sum() for o, f in zip(outputs, factors, strict=True))
    given = {name: t for name, t in zip(Inputs._fields, leaves, strict=True) if t is not None}
    gradients = torch.autograd.grad(total, list(given.values()))
    named = {f"gradient of {name}": g for name, g in zip(given, gradients, strict=True)}
    return {"total": outputs[0].detach(), "normalized": outputs[1].detach(), **named}


def check(inputs: Inputs, target: Target) -> None:
    ours = results(inputs, None, target.implementation)
    eager, exact = results(inputs, torch.float32), results(inputs, torch.float64)
    for name, found in ours.items():
        rounded = eager[name].to(found.dtype)
        k = 3 if "gradient" in name else 2
        assert_within_budget(found, rounded, exact[name], k=k, what=name)


@EVERYWHERE
@pytest.mark.parametrize("case", TEST_CASES)
def test_forward_and_gradients(case: Case, target: Target) -> None:
    check(make(case, device=target.device), target)


@EVERYWHERE
def test_more_rows_than_programs(target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    if target.implementation == "triton":
        from alit_kernels.add_layer_norm import triton_

        monkeypatch.setattr(triton_, "PROGRAMS", 3)
    check(make(Case((8, 20), scale=1e3), device=target.device), target)


@EVERYWHERE
def test_strided_rows(target: Target) -> None:
    """Slices, transposed and expanded inputs; gradients too."""
    x, branch, weight, bias = make(Case((3, 8, 20)), device=target.device)
    check(
        Inputs(
            torch.cat([x, x], -1)[..., :20], branch[:, ::2].repeat_interleave(2, 1), weight, bias
        ),
        target,
    )
    check(
        Inputs(
            x.transpose(0, 1).contiguous().transpose(0, 1),
            branch[:1].expand(3, -1, -1),
            weight,
            bias,
        ),
        target,
    )
    check(Inputs(x, branch, torch.stack([weight, weight], 1)[:, 0], bias), target)
    leaf = x.clone().requires_grad_()
    run = {"implementation": target.implementation}
    found = add_layer_norm(
        leaf, branch, weight, bias, **run
    ).normalized.sum()  # its gradient has strides of 0
    expected = written_out(leaf, branch, weight, bias)[1].sum()
    torch.testing.assert_close(*(torch.autograd.grad(t, leaf)[0] for t in (found, expected)))


@EVERYWHERE
@pytest.mark.parametrize(
    "x, branch",
    [
        (torch.float32, torch.float16),
        (torch.float16, torch.float16),
        (torch.float16, torch.float32),
    ],
)
def test_dtypes(x: torch.dtype, branch: torch.dtype, target: Target) -> None:
    """The sum's is torch's; it is rounded to it before it is normalized; gradients are those of the inputs."""
    inputs = make(Case((6, 40)), dtype=x, branch_dtype=branch, device=target.device)
    found = results(inputs, None, target.implementation)
    expected = inputs.x + inputs.branch
    torch.testing.assert_close(found["total"], expected, rtol=0, atol=0)
    assert found["normalized"].dtype == expected.dtype
    assert found["gradient of x"].dtype == x and found["gradient of branch"].dtype == branch
    normal = layer_norm(expected.float(), (40,), inputs.weight.float(), inputs.bias.float())
    torch.testing.assert_close(found["normalized"], normal.to(expected.dtype), rtol=1e-3, atol=1e-3)


@EVERYWHERE
def test_normalized_in_another_dtype(target: Target) -> None:
    x, branch, weight, bias = make(Case((4, 24)), device=target.device)
    run = {"implementation": target.implementation}
    narrow = add_layer_norm(x, branch, weight, bias, dtype=torch.float16, **run)
    wide = add_layer_norm(x, branch, weight, bias, **run)
    assert narrow.total.dtype == torch.float32
    assert torch.equal(narrow.normalized, wide.normalized.half())


@EVERYWHERE
def test_only_what_is_asked_for(target: Target) -> None:
    """Frozen weights, one output without a gradient: the same gradients of the rest."""
    inputs = make(Case((5, 16)), device=target.device)
    whole = results(inputs, None, target.implementation)
    x, branch = (t.detach().requires_grad_() for t in inputs[:2])
    total, normalized = add_layer_norm(x, branch, *inputs[2:], implementation=target.implementation)
    generator = torch.Generator().manual_seed(1)
    factors = [torch.randn(o.shape, generator=generator).to(o) for o in (total, normalized)]
    both = torch.autograd.grad(
        (total * factors[0]).sum() + (normalized * factors[1]).sum(), (x, branch), retain_graph=True
    )
    assert torch.equal(both[0], whole["gradient of x"])
    (of_total,) = torch.autograd.grad((total * factors[0]).sum(), x, retain_graph=True)
    torch.testing.assert_close(of_total, factors[0], rtol=0, atol=0)
    (of_normalized,) = torch.autograd.grad((normalized * factors[1]).sum(), x)
    torch.testing.assert_close(of_normalized + of_total, both[0])


@EVERYWHERE
def test_infinite_and_nan(target: Target) -> None:
    """A row with one is NaN, as torch's; the others are as they are."""
    x, branch, weight, bias = make(Case((4, 12)), device=target.device)
    x[1, 3], x[2, 0] = torch.nan, torch.inf
    found = add_layer_norm(x, branch, weight, bias, implementation=target.implementation)
    assert found.normalized.isnan().all(1).tolist() == [False, True, True, False]
    assert torch.equal(found.total.isnan(), (x + branch).isnan())


def test_gradcheck() -> None:
    x, branch, weight, bias = make(Case((3, 5)), dtype=torch.float64)
    leaves = [t.requires_grad_() for t in (x, branch, weight, bias)]
    torch.autograd.gradcheck(lambda *t: tuple(add_layer_norm(*t)), leaves)
    torch.autograd.gradcheck(
        lambda x, w, b: add_layer_norm(x, None, w, b).normalized, (leaves[0], *leaves[2:])
    )


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.ones(3, 4, dtype=torch.int64)}, TypeError, "x: expected dtype"),
        ({"x": torch.ones(())}, ValueError, "x: expected"),
        ({"x": torch.ones(3, 0)}, ValueError, "x: expected"),
        ({"branch": torch.ones(3, 5)}, ValueError, "branch: expected shape"),
        ({"weight": torch.ones(5)}, ValueError, "weight: expected shape"),
        ({"bias": torch.ones(1, 4)}, ValueError, "bias: expected shape"),
        ({"bias": torch.ones(4, device="meta")}, ValueError, "bias: expected device"),
        ({"eps": -1.0}, ValueError, "eps: expected at least 0"),
        ({"eps": float("nan")}, ValueError, "eps: expected a finite number"),
        ({"dtype": torch.int32}, TypeError, r"dtype: expected a floating torch\.dtype"),
    ],
)
def test_refusals(change: dict[str, object], error: type[Exception], message: str) -> None:
    ones = torch.ones(4)
    arguments = {"x": torch.ones(3, 4), "branch": None, "weight": ones, "bias": ones}
    with pytest.raises(error, match=message):
        add_layer_norm(**arguments | change)


def test_rows_too_wide_for_the_kernels() -> None:
    x = torch.ones(1, 8193)
    with pytest.raises(ValueError, match=r"cannot run: (a row has more|'triton' needs)"):
        add_layer_norm(x, x, x[0], x[0], implementation="triton")
