"""soft_codebook against the softmax written out."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib import import_module
from typing import Any

import pytest
import torch
from torch import Tensor

from alit_kernels import soft_codebook
from alit_kernels.soft_codebook.cases import TEST_CASES, Case, Inputs, make
from alit_kernels.testing import assert_within_budget
from tests.helpers.targets import DEVICE, Target, targets

EVERYWHERE = pytest.mark.parametrize("target", targets("torch", "triton"))


def written_out(logits: Tensor, codebook: Tensor, target: Tensor) -> list[Tensor]:
    p = logits.softmax(-1)
    nll = torch.nn.functional.cross_entropy(logits, target, reduction="none")
    return [p @ codebook, nll, p.gather(1, target[:, None])[:, 0]]


SEVERAL_TILES = (
    pytest.param(Case(70, 130, 40, spread=4.0), id="several tiles"),
    pytest.param(Case(3, 5, 300), id="channels beyond a tile"),
    pytest.param(Case(600, 3, 4), id="rows split"),
)


@EVERYWHERE
@pytest.mark.parametrize("case", [*TEST_CASES, *SEVERAL_TILES])
def test_forward_and_gradients(case: Case, target: Target) -> None:
    check_gradients(make(case, device=target.device), target)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16))
def test_blocks_of_rows_and_codes(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """The torch implementation with several blocks of rows and codes, the last ones smaller, and with few codes."""
    torch_ = import_module("alit_kernels.soft_codebook.torch_")
    monkeypatch.setattr(torch_, "BLOCK", 60)
    monkeypatch.setattr(torch_, "ROWS", 10)
    for case in (Case(25, 23, 5, spread=4.0), Case(25, 4, 3), Case(3, 70, 2)):
        check_gradients(make(case, dtype=dtype), Target("torch", "cpu"))


@pytest.mark.parametrize("architecture", (80, 100))
def test_tiles_of_other_architectures(architecture: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton in the interpreter with tiles of other architectures than sm_90, its default."""
    if torch.cuda.is_available():
        pytest.skip("a GPU takes its own tiles")
    pytest.importorskip("triton")
    monkeypatch.setattr(import_module("alit_kernels._triton"), "target", architecture)
    for case in (Case(140, 130, 40, spread=4.0), Case(9, 70, 300)):
        check_gradients(make(case), Target("triton", "cpu"))


def test_nan_of_every_kind() -> None:
    """Triton's operands in two parts keep a NaN with all bits set, as made by a GPU."""
    triton_ = pytest.importorskip("alit_kernels.soft_codebook.triton_")
    logits, codebook, _ = make(Case(9, 20, 6), device=DEVICE)
    codebook[3, 2] = torch.tensor(0x7FFFFFFF, dtype=torch.int32).view(torch.float32)
    code, *_ = triton_.soft_codebook(logits, codebook, None)
    assert code[:, 2].isnan().all() and code[:, :2].isfinite().all()


@EVERYWHERE
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_half_precision(dtype: torch.dtype, target: Target) -> None:
    if target == Target("triton", "cpu") and dtype == torch.bfloat16:
        pytest.skip("Triton's interpreter has no bfloat16 product")
    check_gradients(make(Case(20, 40, 8), dtype=dtype, device=target.device), target)


@EVERYWHERE
def test_strided_inputs(target: Target) -> None:
    logits, codebook, true_code = make(Case(9, 20, 6), device=target.device)
    wide = torch.cat([logits, logits], 1)[:, :20]
    check_gradients(Inputs(wide, codebook.t().contiguous().t(), true_code), target)
    check_gradients(Inputs(logits.t().contiguous().t(), codebook, true_code), target)
    check_gradients(Inputs(logits[:1].expand(4, -1), codebook, true_code[:4]), target)


def check_gradients(inputs: Inputs, where: Target) -> None:
    """Check results and gradients within the error budget of eager code, which computes half precision in float32."""
    device, own = inputs.logits.device, inputs.logits.dtype
    generator = torch.Generator().manual_seed(1)
    weights = [
        torch.randn(t.shape, generator=generator).to(device, own).float()
        for t in written_out(*inputs)
    ]

    def run(dtype: torch.dtype, function: Callable[..., Any]) -> list[Tensor]:
        leaves = [t.detach().to(dtype).requires_grad_() for t in inputs[:2]]
        outputs = list(function(*leaves, inputs.target))
        given = [w.to(o.dtype) for o, w in zip(outputs, weights, strict=True)]
        return [*(o.detach() for o in outputs), *torch.autograd.grad(outputs, leaves, given)]

    names = ("code", "nll", "p_target", "gradient of logits", "gradient of codebook")
    results = (
        run(own, partial(soft_codebook, implementation=where.implementation)),
        run(torch.float32, written_out),
        run(torch.float64, written_out),
    )
    for name, ours, eager, exact in zip(names, *results, strict=True):
        assert ours.dtype == (torch.float32 if name in ("nll", "p_target") else own)
        k = 3 if "gradient" in name else 2
        if name == "gradient of logits" and inputs.logits.shape[1] == 1:
            # dcode . codes - dcode . code is 0 if both are rounded alike: eager errors of zero would allow no error.
            size = weights[0].abs().amax() * inputs.codebook.abs().amax() * weights[0].shape[1]
            bound = 4 * torch.finfo(own).eps * float(size)
            torch.testing.assert_close(ours, torch.zeros_like(ours), rtol=0.0, atol=bound)
            continue
        assert_within_budget(ours, eager.to(ours.dtype), exact, k=k, what=name)


@EVERYWHERE
def test_infinite_and_nan_logits(target: Target) -> None:
    """Logits of -inf have no probability; rows of only -inf, or with NaN or +inf, give NaN, as by the reference."""
    nan, inf = torch.nan, torch.inf
    logits = torch.tensor(
        [[-inf, 1.0, 2.0], [-inf, -inf, -inf], [0.0, nan, 1.0], [inf, 0.0, 1.0], [5.0, -inf, -inf]]
    )
    true_code = torch.tensor([0, 1, 2, 1, 0])
    codebook = torch.tensor([[1.0, -1.0], [2.0, 0.5], [0.0, 3.0]])

    def run(implementation: str) -> list[Tensor]:
        x, c = (t.to(target.device).requires_grad_() for t in (logits.clone(), codebook.clone()))
        result = soft_codebook(x, c, true_code.to(target.device), implementation=implementation)
        used = [0, 4]  # NaN in any row makes the codebook's whole gradient NaN
        (gradient,) = torch.autograd.grad(result.code.sum() + result.nll[4:].sum(), x)
        clean = soft_codebook(x[used], c, implementation=implementation).code.sum()
        return [*(o.detach() for o in result), gradient, *torch.autograd.grad(clean, (x, c))]

    for ours, expected in zip(run(target.implementation), run("reference"), strict=True):
        torch.testing.assert_close(ours, expected, equal_nan=True)


@pytest.mark.parametrize("target", targets("triton")[1:])
def test_codes_that_are_not_there(target: Target) -> None:
    """Targets outside the codes, which are not checked on a GPU, give NaN and no reads out of bounds."""
    triton_ = pytest.importorskip("alit_kernels.soft_codebook.triton_")
    memory = torch.full((3, 9, 20), 123.0, device=target.device)
    memory[1] = torch.randn(9, 20)
    logits, codebook = memory[1], torch.randn(20, 6, device=target.device)
    true_code = torch.tensor([0, 19, -100, 20, -1, 199, 5, 180, -9], device=target.device)
    there = (true_code >= 0) & (true_code < 20)
    code, nll, p_target, normalizer = triton_.soft_codebook(logits, codebook, true_code)
    assert torch.equal(nll.isfinite(), there) and torch.equal(p_target.isfinite(), there)
    assert code.isfinite().all()
    ones = torch.ones(9, device=target.device)
    gradient, _ = triton_.soft_codebook_backward(
        *(code, ones, ones, logits, codebook, true_code, code, normalizer, True, False)
    )
    assert torch.equal(gradient.isfinite().all(1), there)


@EVERYWHERE
@pytest.mark.parametrize("used", ("code", "nll", "p_target", "nll p_target"))
@pytest.mark.parametrize("wanted", ((True, True), (True, False), (False, True)))
def test_what_nobody_asks_for_changes_nothing(
    wanted: tuple[bool, bool], used: str, target: Target
) -> None:
    """Unused outputs, and inputs without a gradient, do not change the other gradients."""
    logits, codebook, true_code = make(Case(40, 20, 8), device=target.device)

    def gradients(wanted: tuple[bool, bool], implementation: str) -> list[Tensor | None]:
        leaves = [
            x.detach().clone().requires_grad_(w)
            for x, w in zip((logits, codebook), wanted, strict=True)
        ]
        result = soft_codebook(*leaves, true_code, implementation=implementation)
        loss = sum(getattr(result, name).square().sum() for name in used.split())
        loss.backward()
        return [leaf.grad for leaf in leaves]

    expected = gradients((True, True), "reference")
    for found, whole, asked in zip(
        gradients(wanted, target.implementation), expected, wanted, strict=True
    ):
        assert (found is not None) == asked
        if found is not None:
            torch.testing.assert_close(found, whole)


@EVERYWHERE
def test_gradient_is_deterministic(target: Target) -> None:
    logits, codebook, true_code = make(Case(300, 20, 8), device=target.device)
    leaves = (logits.requires_grad_(), codebook.requires_grad_())

    def gradients() -> tuple[Tensor, ...]:
        result = soft_codebook(*leaves, true_code, implementation=target.implementation)
        return torch.autograd.grad(sum(o.sum() for o in result), leaves)

    first = gradients()
    for _ in range(2):
        assert all(map(torch.equal, first, gradients()))


def test_gradcheck() -> None:
    logits, codebook, target = make(Case(4, 5, 3), dtype=torch.float64)
    inputs = (logits.requires_grad_(), codebook.requires_grad_())
    assert torch.autograd.gradcheck(lambda a, b: tuple(soft_codebook(a, b, target)), inputs)
    assert torch.autograd.gradcheck(lambda a, b: soft_codebook(a, b).code, inputs)


def test_without_target_and_under_autocast() -> None:
    logits, codebook, target = make(Case(4, 5, 3))
    result = soft_codebook(logits, codebook)
    assert result.nll is None and result.p_target is None
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = soft_codebook(logits.bfloat16(), codebook, target)
    assert mixed.code.dtype == torch.float32


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            {"target": torch.tensor([0, 5])},
            ValueError,
            r"target: expected values in 0\.\.4, got 0\.\.5",
        ),
        ({"target": torch.tensor([0, -1])}, ValueError, "target: expected values"),
        ({"target": torch.tensor([0])}, ValueError, "target: expected shape"),
        ({"codebook": torch.randn(4, 3)}, ValueError, "codebook: expected shape"),
        ({"codebook": torch.randn(5, 3).half()}, TypeError, "codebook: expected dtype"),
        ({"logits": torch.randn(2, 0)}, ValueError, "logits: expected at least 1 code"),
    ],
)
def test_wrong_arguments(change: dict[str, object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        soft_codebook(
            **{"logits": torch.randn(2, 5), "codebook": torch.randn(5, 3), "target": None, **change}
        )


@pytest.mark.parametrize("target", targets("torch", "triton"))
def test_frozen_codebook(target: Target) -> None:
    """A frozen codebook gets no gradient, and that of the logits does not change."""
    logits, codebook, true = make(Case(9, 40, 17), device=target.device)
    grads = []
    for learned in (True, False):
        leaf = logits.clone().requires_grad_()
        codes = codebook.clone().requires_grad_(learned)
        result = soft_codebook(leaf, codes, true, implementation=target.implementation)
        (result.code.square().sum() + result.nll.sum() + result.p_target.sum()).backward()
        assert (codes.grad is not None) == learned
        grads.append(leaf.grad)
    assert torch.equal(*grads)
