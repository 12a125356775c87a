"""add_layer_norm against addition and torch's layer norm."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import layer_norm

from alit_kernels import add_layer_norm
from alit_kernels.add_layer_norm.cases import TEST_CASES, Case, Inputs, make
from alit_kernels.add_layer_norm.op import backward, forward
from alit_kernels.testing import assert_within_budget
from tests.helpers.targets import Target, targets

EVERYWHERE = pytest.mark.parametrize("target", targets("triton"))


def written_out(
    x: Tensor, branch: Tensor | None, branch_bias: Tensor | None, weight: Tensor, bias: Tensor
) -> tuple[Tensor, Tensor]:
    total = x if branch is None else x + (branch + branch_bias)
    return total, layer_norm(total, total.shape[-1:], weight, bias)


def run(implementation: str, dtype: torch.dtype | None = None) -> Callable[..., Any]:
    """Function that returns the op's sum and norm; without a branch the sum is x."""

    def function(x: Tensor, branch: Tensor | None, *vectors: Tensor) -> tuple[Tensor, Tensor]:
        if branch is not None:
            return add_layer_norm(x, branch, *vectors, dtype=dtype, implementation=implementation)
        values = x, None, *vectors, 1e-5, dtype or x.dtype
        return x, forward(*values, implementation=implementation)[1]

    return function


def results(
    inputs: Inputs, dtype: torch.dtype | None, implementation: str = ""
) -> dict[str, Tensor]:
    """Outputs and gradients of a fixed sum of them, with all inputs cast to ``dtype`` (None: as they are)."""
    leaves = [
        None if t is None else t.detach().to(dtype or t.dtype).requires_grad_() for t in inputs
    ]
    outputs = (run(implementation) if implementation else written_out)(*leaves)
    generator = torch.Generator().manual_seed(1)
    factors = [torch.randn(o.shape, generator=generator).to(o) for o in outputs]
    # Different factors, so that the sum's gradient is not a multiple of a constant row, which a layer norm removes.
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
    """Sliced, transposed and expanded inputs give the same results and gradients."""
    x, branch, *vectors = make(Case((3, 8, 20)), device=target.device)
    wide = torch.cat([x, x], -1)[..., :20]
    check(Inputs(wide, branch[:, ::2].repeat_interleave(2, 1), *vectors), target)
    across = x.transpose(0, 1).contiguous().transpose(0, 1)
    check(Inputs(across, branch[:1].expand(3, -1, -1), *vectors), target)
    check(Inputs(x, branch, *(torch.stack([v, v], 1)[:, 0] for v in vectors)), target)
    odd = torch.randn(3 * 8 * 20 + 1).to(x)[1:].view(x.shape)
    check(Inputs(odd, branch, *vectors), target)
    leaf = x.clone().requires_grad_()
    # The gradient of the sum has strides of 0.
    found = run(target.implementation)(leaf, branch, *vectors)[1].sum()
    expected = written_out(leaf, branch, *vectors)[1].sum()
    torch.testing.assert_close(*(torch.autograd.grad(t, leaf)[0] for t in (found, expected)))


@EVERYWHERE
def test_sums_go_on_from_what_was_before(target: Target) -> None:
    x, branch, _, weight, _ = make(Case((5, 24)), device=target.device)
    stats = torch.stack([x.mean(1), torch.rand(5).to(x) + 1])
    before = torch.randn(3, 24).to(x)
    rest, by = (x.dtype, x.dtype), {"implementation": target.implementation}
    alone = backward(x, branch, x, weight, stats, None, *rest, **by)
    more = backward(x, branch, x, weight, stats, before, *rest, **by)
    torch.testing.assert_close(more[2], alone[2] + before)
    assert torch.equal(more[0], alone[0])


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
    """The sum has torch's promoted dtype and is rounded before normalization; gradients have the inputs' dtypes."""
    inputs = make(Case((6, 40)), dtype=x, branch_dtype=branch, device=target.device)
    found = results(inputs, None, target.implementation)
    exact = inputs.x.float() + (inputs.branch.float() + inputs.branch_bias.float())
    expected = exact.to(torch.promote_types(x, branch))
    torch.testing.assert_close(found["total"], expected, rtol=0, atol=0)
    assert found["normalized"].dtype == expected.dtype
    assert found["gradient of x"].dtype == x and found["gradient of branch"].dtype == branch
    normal = layer_norm(expected.float(), (40,), inputs.weight.float(), inputs.bias.float())
    torch.testing.assert_close(found["normalized"], normal.to(expected.dtype), rtol=1e-3, atol=1e-3)


@EVERYWHERE
def test_normalized_in_another_dtype(target: Target) -> None:
    inputs = make(Case((4, 24)), device=target.device)
    narrow = run(target.implementation, torch.float16)(*inputs)
    wide = run(target.implementation)(*inputs)
    assert narrow[0].dtype == torch.float32
    assert torch.equal(narrow[1], wide[1].half())


@EVERYWHERE
def test_one_output_alone_has_a_gradient(target: Target) -> None:
    inputs = make(Case((5, 16)), device=target.device)
    whole = results(inputs, None, target.implementation)
    x, branch = (t.detach().requires_grad_() for t in inputs[:2])
    outputs = run(target.implementation)(x, branch, *inputs[2:])
    generator = torch.Generator().manual_seed(1)
    factors = [torch.randn(o.shape, generator=generator).to(o) for o in outputs]
    terms = [(o * f).sum() for o, f in zip(outputs, factors, strict=True)]
    (of_total,) = torch.autograd.grad(terms[0], x, retain_graph=True)
    (of_norm,) = torch.autograd.grad(terms[1], x)
    torch.testing.assert_close(of_total, factors[0], rtol=0, atol=0)
    torch.testing.assert_close(of_norm + of_total, whole["gradient of x"])


@EVERYWHERE
def test_infinite_and_nan(target: Target) -> None:
    """A row with NaN or infinity is normalized to NaN, as by torch; the others do not change."""
    x, branch, *vectors = make(Case((4, 12)), device=target.device)
    x[1, 3], x[2, 0] = torch.nan, torch.inf
    total, normalized = run(target.implementation)(x, branch, *vectors)
    assert normalized.isnan().all(1).tolist() == [False, True, True, False]
    assert torch.equal(total.isnan(), (x + branch).isnan())


def test_gradcheck() -> None:
    leaves = [t.requires_grad_() for t in make(Case((3, 5)), dtype=torch.float64)]
    torch.autograd.gradcheck(lambda *t: tuple(add_layer_norm(*t)), leaves)
    alone = leaves[0], *leaves[3:]
    torch.autograd.gradcheck(lambda x, *v: run("reference")(x, None, None, *v)[1], alone)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.ones(3, 4, dtype=torch.int64)}, TypeError, "x: expected dtype"),
        ({"x": torch.ones(())}, ValueError, "x: expected"),
        ({"x": torch.ones(3, 0)}, ValueError, "x: expected"),
        ({"branch": torch.ones(3, 5)}, ValueError, "branch: expected shape"),
        ({"branch_bias": torch.ones(3, 4)}, ValueError, "branch_bias: expected shape"),
        ({"weight": torch.ones(5)}, ValueError, "weight: expected shape"),
        ({"bias": torch.ones(1, 4)}, ValueError, "bias: expected shape"),
        ({"bias": torch.ones(4, device="meta")}, ValueError, "bias: expected device"),
        ({"eps": -1.0}, ValueError, "eps: expected at least 0"),
        ({"eps": float("nan")}, ValueError, "eps: expected a finite number"),
        ({"dtype": torch.int32}, TypeError, r"dtype: expected a floating torch\.dtype"),
    ],
)
def test_refusals(change: dict[str, object], error: type[Exception], message: str) -> None:
    ones, rows = torch.ones(4), torch.ones(3, 4)
    vectors = {"branch_bias": ones, "weight": ones, "bias": ones}
    with pytest.raises(error, match=message):
        add_layer_norm(**{"x": rows, "branch": rows, **vectors} | change)


def test_rows_too_wide_for_the_kernels() -> None:
    x = torch.ones(1, 8193)
    with pytest.raises(ValueError, match=r"cannot run: (a row has more|'triton' needs)"):
        add_layer_norm(x, x, x[0], x[0], x[0], implementation="triton")
