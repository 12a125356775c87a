"""Float32 products by tensor cores: splitting of factors, order of the sums of parts, and errors."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor

from alit_kernels.attention.cases import Case, make
from alit_kernels.attention.configurations import KERNELS, TABLE, Tile, padded
from tests.helpers.attention import attend, gradients, per_sequence
from tests.helpers.targets import DEVICE, Target, targets
from tests.helpers.tensor_cores import rounded_towards_zero

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402

from alit_kernels.attention.kernels import _load  # noqa: E402
from alit_kernels.attention.split import factors, operand, operands, scores  # noqa: E402


def tensor_cores() -> Any:
    """Context manager: products round as by tensor cores, those of this GPU or imitated in the interpreter."""
    return rounded_towards_zero() if DEVICE == "cpu" else nullcontext()


@triton.jit
def parts_kernel(p_x, p_parts, N: tl.constexpr, FINITE: tl.constexpr):
    o = tl.arange(0, N)
    parts = operand(tl.load(p_x + o), True, FINITE)
    for i in tl.static_range(3):
        tl.store(p_parts + i * N + o, parts[i].to(tl.float32))


def parts(x: Tensor, finite: bool = False) -> Tensor:
    result = torch.empty(3, len(x), device=DEVICE)
    parts_kernel[(1,)](x.to(DEVICE), result, len(x), finite)
    return result.cpu()


@pytest.mark.parametrize("finite", (False, True))
def test_parts_are_exact(finite: bool) -> None:
    """Parts sum exactly to the factor and have its sign, so that products with Inf have no wrong sign."""
    x = torch.randn(1024) * 2.0 ** torch.randint(-100, 100, (1024,))
    x[:6] = torch.tensor([0.0, -0.0, 1.0, -1.5, torch.finfo().max, -torch.finfo().max])
    x[6:9] = torch.tensor([1.0 + 2.0**-23, 2.0**-126, 1.0 - 2.0**-24])
    found = parts(x, finite)
    assert torch.equal(found, found.bfloat16().float())
    assert torch.equal(found.double().sum(0), x.double())
    assert bool((found * x.sign() >= 0).all())


def test_parts_of_what_is_not_finite() -> None:
    x = torch.full((16,), torch.inf)
    x[1::2] = -torch.inf
    high, middle, low = parts(x)
    assert bool((high * x.sign() > 0).all()) and not middle.isinf().any() and torch.equal(low, x)
    bits = torch.tensor([0x7FC00000, 0x7FFFFFFF, 0x7F800001, -1] * 4, dtype=torch.int32)
    for finite in (False, True):  # probabilities may be NaN, but not Inf
        assert bool(parts(bits.view(torch.float32), finite).isnan().any(0).all())


@triton.jit
def product_kernel(p_a, p_b, p_ab, N: tl.constexpr, WIDTH: tl.constexpr, SWAPPED: tl.constexpr):
    a = operands(_load((p_a, WIDTH), 0, None, N, False, WIDTH, N), True)
    b = factors(_load((p_b, WIDTH), 0, None, N, False, WIDTH, N), True)
    o = tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :]
    tl.store(p_ab + o, scores(a, b, SWAPPED))


@pytest.mark.parametrize("width", (64, 128))
def test_transposed_products_round_alike(width: int) -> None:
    """Scores of the forward and of dK/dV are equal to the last bit, because of the order of their parts."""
    a, b = torch.randn(2, 64, width, device=DEVICE)
    ab, ba, unswapped = torch.empty(3, 64, 64, device=DEVICE)
    with tensor_cores():
        product_kernel[(1,)](a, b, ab, 64, width, False)
        product_kernel[(1,)](b, a, ba, 64, width, True)
        product_kernel[(1,)](b, a, unswapped, 64, width, False)
    assert torch.equal(ab, ba.t())
    assert not torch.equal(ab, unswapped.t())
    torch.testing.assert_close(ab.double(), a.double() @ b.double().t(), rtol=0, atol=1e-5)


#: Largest allowed share of the error budget.
SHARE = 0.6


def share(actual: Tensor, eager: Tensor, exact: Tensor, k: int) -> float:
    """Error as a share of that allowed by ``assert_within_budget``."""
    a, e, x = actual.double(), eager.double(), exact.double()
    allowed = k * (e - x).abs().max() + 4 * torch.finfo(torch.float32).eps * x.abs().max()
    return float((a - x).abs().max() / allowed)


@pytest.mark.parametrize("target", targets("triton")[1:])
@pytest.mark.parametrize(
    ("tokens", "head_dim", "magnitude", "seed"),
    (
        (9, 8, 100.0, 0),
        (70, 16, 1.0, 0),
        (129, 64, 1.0, 0),
        (129, 64, 10.0, 0),
        # Probabilities depend on the last bit of scores of 7000. At seed 0 eager PyTorch's error is so small that
        # neither these products (1.5 times the budget) nor plain float32 ones (2.5) keep it; seeds 1 to 3 use 0.4.
        (129, 64, 30.0, 1),
        (129, 64, 100.0, 0),
        (70, 80, 1.0, 0),
        (129, 128, 1.0, 0),
        (129, 128, 10.0, 0),
        (129, 128, 100.0, 0),
        (513, 64, 1.0, 0),
    ),
)
def test_share_of_the_error_budget(
    tokens: int,
    head_dim: int,
    magnitude: float,
    seed: int,
    target: Target,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Errors with the rounding of tensor cores, worse than float32's, use at most a given share of the budget."""
    if (
        DEVICE == "cpu"
    ):  # few programs: the interpreter takes milliseconds for each; rows do not change the rounding
        tile = Tile(triton.next_power_of_2(tokens), 32, 4, 2, True)
        for kernel in KERNELS:
            monkeypatch.setitem(TABLE, (kernel, padded(head_dim), 4), (tile,) * 3)
    x = make(Case((tokens,), 1, head_dim, magnitude=magnitude), device=target.device, seed=seed)
    run = lambda y: attend(y, target)  # noqa: E731
    with tensor_cores():
        ours = [*attend(x, target), *gradients(x, torch.float32, run)]
    written_out = lambda y: per_sequence(y, y.q.dtype)  # noqa: E731
    eager, exact = (
        [*per_sequence(x, dtype), *gradients(x, dtype, written_out)]
        for dtype in (torch.float32, torch.float64)
    )
    names, factors = ("out", "lse", "dq", "dk", "dv"), (2, 2, 3, 3, 3)
    shares = {n: share(*t) for n, *t in zip(names, ours, eager, exact, factors, strict=True)}
    print({name: round(value, 2) for name, value in shares.items()})
    assert max(shares.values()) <= SHARE


@pytest.mark.parametrize("target", targets("triton")[1:])
def test_what_is_not_finite_is_as_in_the_reference(target: Target) -> None:
    """A score of -inf excludes its key, and only results that depend on Inf or NaN are not finite."""
    x = make(Case((40, 5), 1, 16), device=target.device)
    x.q[:, 0, 3] = torch.where(torch.arange(45, device=target.device) % 2 == 0, 1.0, -1.0)
    x.k[7, 0, 3] = -torch.inf  # half of the queries leave it out, half attend to it alone
    x.k[8, 0, 5] = torch.finfo().max
    x.q[41, 0, 5] = torch.nan
    x.v[2, 0, 1], x.v[3, 0, 2], x.v[4, 0, 3] = torch.inf, -torch.inf, torch.nan
    out, lse = attend(x, target)
    expected, expected_lse = attend(x, Target("reference", target.device))
    torch.testing.assert_close(out, expected, equal_nan=True, rtol=1e-5, atol=1e-5)
    finite = expected_lse.isfinite()
    assert torch.equal(lse.isfinite(), finite) and bool(finite.any())
    torch.testing.assert_close(lse[finite], expected_lse[finite], rtol=1e-5, atol=1e-5)
