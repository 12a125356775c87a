"""soft_codebook against softmax written out."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from alit_kernels import soft_codebook
from alit_kernels.soft_codebook.cases import TEST_CASES, Case, make
from alit_kernels.testing import assert_within_budget


def written_out(logits: Tensor, codebook: Tensor, target: Tensor) -> list[Tensor]:
    p = logits.softmax(-1)
    nll = torch.nn.functional.cross_entropy(logits, target, reduction="none")
    return [p @ codebook, nll, p.gather(1, target[:, None])[:, 0]]


@pytest.mark.parametrize("case", TEST_CASES)
def test_forward_and_gradients(case: Case) -> None:
    inputs = make(case)
    weights = [torch.randn(t.shape) for t in written_out(*inputs)]

    def run(dtype: torch.dtype, function: object) -> list[Tensor]:
        logits, codebook = (t.detach().clone().to(dtype).requires_grad_() for t in inputs[:2])
        outputs = list(function(logits, codebook, inputs.target))
        sum((o * w.to(dtype)).sum() for o, w in zip(outputs, weights, strict=True)).backward()
        return [*(o.detach() for o in outputs), logits.grad, codebook.grad]

    names = ("code", "nll", "p_target", "gradient of logits", "gradient of codebook")
    results = (
        run(torch.float32, soft_codebook),
        run(torch.float32, written_out),
        run(torch.float64, written_out),
    )
    for name, ours, eager, exact in zip(names, *results, strict=True):
        assert_within_budget(ours, eager, exact, k=3 if "gradient" in name else 2, what=name)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_half_precision(dtype: torch.dtype) -> None:
    logits, codebook, target = make(Case(20, 40, 8), dtype=dtype)
    result = soft_codebook(logits, codebook, target)
    assert result.code.dtype == dtype and result.nll.dtype == result.p_target.dtype == torch.float32
    exact = written_out(logits.double(), codebook.double(), target)
    eager = written_out(logits.float(), codebook.float(), target)
    for name, ours, e, x in zip(("code", "nll", "p_target"), result, eager, exact, strict=True):
        assert_within_budget(ours, e.to(ours.dtype), x, what=name)


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
