"""codebook_entropy against the matrix of distances written out."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from alit_kernels import codebook_entropy
from alit_kernels._cpp import INSTRUCTION_SETS, extension
from alit_kernels.codebook_entropy.cases import TEST_CASES, Case, make
from alit_kernels.testing import assert_within_budget, nan_filled_empty
from alit_kernels.vector_quantize.cases import Case as Vectors
from tests.helpers.hostile import memory
from tests.helpers.targets import Target, targets

EVERYWHERE = pytest.mark.parametrize("target", targets("cpp", "triton"))
METRICS = pytest.mark.parametrize("metric", ("euclidean", "cosine"))
MANY = Case(Vectors(300, 9, 5), 1.0)  # rows that several programs share


def written_out(
    z: Tensor,
    codebook: Tensor,
    *,
    temperature: float,
    metric: str = "euclidean",
    mask: Tensor | None = None,
    epsilon: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Entropies as in other tokenizers: all distances, softmax, the logarithm of the mean."""
    z = z.flatten(0, -2) if mask is None else z[mask]
    if metric == "cosine":
        z, codebook = normalize(z, dim=-1), normalize(codebook, dim=-1)
    distance = z.square().sum(1, keepdim=True) + codebook.square().sum(1) - 2 * z @ codebook.t()
    log_p = (-distance / temperature).log_softmax(-1)
    p = log_p.exp()
    mean = p.sum(0) / max(1, len(z))
    # torch's gradient of xlogy at 0 is infinite.
    batch = -torch.where(mean == 0, 0.0, mean * (torch.where(mean == 0, 1.0, mean + epsilon)).log())
    return -(p * log_p).sum() / max(1, len(z)), batch.sum()


def check(
    z: Tensor,
    codebook: Tensor,
    mask: Tensor | None,
    where: Target,
    *,
    rtol: float | None = None,
    **options: Any,
) -> None:
    """Check results and gradients within the error budget of the full matrix, which computes half precision in float32.

    With ``rtol`` the results are checked to that instead: eager rounding of a single number may be small by chance.
    """

    def run(dtype: torch.dtype, function: Callable[..., Any]) -> list[Tensor]:
        leaves = [x.detach().to(dtype).requires_grad_() for x in (z, codebook)]
        sample, batch = function(*leaves, mask=mask, **options)
        grads = torch.autograd.grad(1.3 * sample - 0.7 * batch, leaves)
        return [sample.detach(), batch.detach(), *grads]

    ours = partial(codebook_entropy, implementation=where.implementation)
    with nan_filled_empty():
        results = run(z.dtype, ours)
    peers = run(torch.float32, written_out), run(torch.float64, written_out)
    names = ("sample", "batch", "gradient of z", "gradient of the codebook")
    for name, found, eager, exact in zip(names, results, *peers, strict=True):
        wanted = z.dtype if "gradient" in name else torch.float32
        assert found.dtype == wanted, name
        k = 3 if "gradient" in name else 2
        if rtol is not None and "gradient" not in name:
            torch.testing.assert_close(found.double(), exact, rtol=rtol, atol=0)
        else:
            assert_within_budget(found, eager.to(wanted), exact, k=k, what=name)


@EVERYWHERE
@METRICS
@pytest.mark.parametrize("case", (*TEST_CASES, MANY))
def test_results_and_gradients(case: Case, metric: str, target: Target) -> None:
    inputs = make(case.vectors, device=target.device)
    check(*inputs, target, temperature=case.temperature, metric=metric)


@EVERYWHERE
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_half_precision(dtype: torch.dtype, target: Target) -> None:
    inputs = make(Vectors(20, 40, 8, masked=True), dtype=dtype, device=target.device)
    for metric in ("euclidean", "cosine"):
        check(*inputs, target, temperature=0.5, metric=metric)


@EVERYWHERE
def test_common_offset(target: Target) -> None:
    """With a common offset, distances are differences of large numbers; gradients are as good as eager ones."""
    inputs = make(Vectors(33, 65, 20, offset=30.0), device=target.device)
    check(*inputs, target, temperature=5.0, rtol=1e-4)


@EVERYWHERE
def test_epsilon(target: Target) -> None:
    inputs = make(Vectors(20, 40, 8), device=target.device)
    check(*inputs, target, temperature=0.1, epsilon=1e-2)
    without, with_epsilon = (
        codebook_entropy(
            *inputs[:2], temperature=0.1, epsilon=epsilon, implementation=target.implementation
        )
        for epsilon in (0.0, 1e-2)
    )
    assert with_epsilon.sample == without.sample and with_epsilon.batch < without.batch


@EVERYWHERE
def test_strided_inputs(target: Target) -> None:
    z, codebook, _ = make(Vectors(12, 20, 6), device=target.device)
    mask = (torch.arange(12, device=target.device) % 3 > 0).view(2, 6).t()
    image = z.view(2, 6, 6).permute(2, 0, 1).contiguous().permute(2, 1, 0)  # (6, 2, 6)
    check(image, codebook.t().contiguous().t(), mask, target, temperature=1.0, metric="cosine")
    check(z[:1].expand(4, -1), codebook, None, target, temperature=1.0)
    options = {"temperature": 1.0, "implementation": target.implementation}
    one, of_one = (
        codebook_entropy(z[0], codebook, **options),
        codebook_entropy(z[:1], codebook, **options),
    )
    assert one == of_one


@EVERYWHERE
@METRICS
def test_where_nothing_takes_part(metric: str, target: Target) -> None:
    """If all rows are masked, entropies and gradients are zero, whatever the rows hold."""
    z = torch.full((3, 4), torch.nan, device=target.device, requires_grad=True)
    codebook = torch.randn(5, 4).to(target.device).requires_grad_()
    mask = torch.zeros(3, dtype=torch.bool, device=target.device)
    result = codebook_entropy(
        z, codebook, temperature=1.0, metric=metric, mask=mask, implementation=target.implementation
    )
    assert tuple(result) == (0, 0)
    for gradient in torch.autograd.grad(sum(result), (z, codebook)):
        assert torch.equal(gradient, torch.zeros_like(gradient))


@EVERYWHERE
@METRICS
def test_equal_codes(metric: str, target: Target) -> None:
    """With equal codes all distributions are uniform: both entropies are log K, gradients only rounding."""
    z, codebook, _ = make(Vectors(40, 33, 3, layout="equal"), device=target.device)
    leaves = z.requires_grad_(), codebook.requires_grad_()
    result = codebook_entropy(
        *leaves, temperature=0.1, metric=metric, implementation=target.implementation
    )
    for entropy in result:
        torch.testing.assert_close(entropy.detach().cpu(), torch.tensor(33.0).log())
    for gradient in torch.autograd.grad(result.sample - result.batch, leaves):
        assert gradient.abs().max() < 1e-5


@EVERYWHERE
def test_nan_shows(target: Target) -> None:
    z, codebook, _ = make(Vectors(6, 7, 5), device=target.device)
    z[2, 1] = torch.nan
    z.requires_grad_()
    result = codebook_entropy(z, codebook, temperature=1.0, implementation=target.implementation)
    assert result.sample.isnan() and result.batch.isnan()
    (gradient,) = torch.autograd.grad(result.sample, z)
    assert gradient[2].isnan().all()


@EVERYWHERE
def test_codes_without_probability(target: Target) -> None:
    """Codes without probability add nothing and have no gradient: 0 log 0 is 0."""
    z = torch.tensor([[0.0, 0.0], [1.0, 0.0]], device=target.device).requires_grad_()
    codebook = torch.tensor([[0.0, 0.1], [1.0, 0.1], [1e6, 0.0]], device=target.device)
    codebook.requires_grad_()
    options = {"temperature": 0.01, "implementation": target.implementation}
    result = codebook_entropy(z, codebook, **options)
    torch.testing.assert_close(result.batch.cpu(), torch.tensor(2.0).log())
    gradients = torch.autograd.grad(result.sample - result.batch, (z, codebook))
    assert all(x.isfinite().all() for x in gradients) and not gradients[1][2].any()
    near = codebook[:2].detach()
    assert codebook_entropy(z, near, **options) == (result.sample, result.batch)


@EVERYWHERE
@pytest.mark.parametrize("used", ("sample", "batch", "sample batch"))
@pytest.mark.parametrize("wanted", ((True, True), (True, False), (False, True)))
@METRICS
def test_what_nobody_asks_for_changes_nothing(
    metric: str, wanted: tuple[bool, bool], used: str, target: Target
) -> None:
    z, codebook, _ = make(Vectors(12, 20, 6), device=target.device)

    def gradients(wanted: tuple[bool, bool], implementation: str) -> list[Tensor | None]:
        leaves = [
            x.detach().clone().requires_grad_(w) for x, w in zip((z, codebook), wanted, strict=True)
        ]
        result = codebook_entropy(
            *leaves, temperature=0.5, metric=metric, implementation=implementation
        )
        sum(getattr(result, name) for name in used.split()).backward()
        return [leaf.grad for leaf in leaves]

    expected = gradients((True, True), "reference")
    for found, whole, asked in zip(
        gradients(wanted, target.implementation), expected, wanted, strict=True
    ):
        assert (found is not None) == asked
        if found is not None:
            torch.testing.assert_close(found, whole, rtol=1e-4, atol=1e-6)


@METRICS
@pytest.mark.parametrize("epsilon", (0.0, 0.1))
def test_gradcheck(epsilon: float, metric: str) -> None:
    z, codebook, mask = make(Vectors(5, 4, 3, masked=True), dtype=torch.float64)
    assert mask is not None and mask.any() and not mask.all()
    leaves = [x.nan_to_num().requires_grad_() for x in (z, codebook)]

    def both(z: Tensor, codebook: Tensor) -> tuple[Tensor, Tensor]:
        return codebook_entropy(
            z, codebook, temperature=0.7, metric=metric, mask=mask, epsilon=epsilon
        )

    torch.autograd.gradcheck(both, leaves)


def test_peers_loss() -> None:
    """sample - batch with LlamaGen's constants: within 1e-5 of eager's gradients."""
    z, codebook, _ = make(Vectors(512, 1024, 8))

    def loss(function: Callable[..., Any], dtype: torch.dtype) -> list[Tensor]:
        leaves = [x.to(dtype).requires_grad_() for x in (z, codebook)]
        sample, batch = function(*leaves, temperature=0.01, metric="cosine", epsilon=1e-5)
        return [sample - batch, *torch.autograd.grad(sample - batch, leaves)]

    found = loss(codebook_entropy, torch.float32)
    for ours, exact in zip(found, loss(written_out, torch.float64), strict=True):
        assert (ours - exact).abs().max() <= 1e-5 * exact.abs().max()


def test_autocast() -> None:
    z, codebook, _ = make(Vectors(12, 20, 6), dtype=torch.bfloat16)
    plain = codebook_entropy(z, codebook, temperature=1.0)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = codebook_entropy(z, codebook.float(), temperature=1.0)
    assert mixed.sample.dtype == torch.float32 and mixed == plain


@pytest.mark.parametrize("instruction_set", INSTRUCTION_SETS)
def test_every_instruction_set(instruction_set: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every instruction set is right with several panels of codes and partial blocks, on one thread and two."""
    core = extension()
    if core is None:
        pytest.skip("the compiled extension is not installed")
    best = core.build_info()["instruction_set"]
    if INSTRUCTION_SETS.index(instruction_set) > INSTRUCTION_SETS.index(best):
        pytest.skip(f"this machine has no {instruction_set}")
    monkeypatch.setenv("ALIT_KERNELS_INSTRUCTION_SET", instruction_set)
    inputs = make(Vectors(301, 1100, 9))
    check(*inputs, Target("cpp", "cpu"), temperature=0.5)

    def gradients() -> list[Tensor]:
        leaves = [x.detach().requires_grad_() for x in inputs[:2]]
        result = codebook_entropy(*leaves, temperature=0.5, implementation="cpp")
        return [*result, *torch.autograd.grad(sum(result), leaves)]

    with_two = gradients()
    torch.set_num_threads(1)
    assert all(map(torch.equal, gradients(), with_two))


def test_memory() -> None:
    """A step takes no matrix of vectors and codes: 64 MiB here."""
    z, codebook, _ = make(Vectors(2048, 8192, 8))
    leaves = z.requires_grad_(), codebook.requires_grad_()

    def step() -> None:
        result = codebook_entropy(*leaves, temperature=0.01)
        torch.autograd.grad(result.sample - result.batch, leaves)

    step()  # threads, buffers of the allocator
    with memory(most=16 * 2**20):
        step()


@pytest.mark.parametrize(
    ("name", "value"),
    (
        ("temperature", 0.0),
        ("temperature", -1.0),
        ("temperature", float("nan")),
        ("epsilon", -1e-9),
    ),
)
def test_numbers_that_do_not_fit(name: str, value: float) -> None:
    options = {"temperature": 1.0, "epsilon": 0.0, name: value}
    with pytest.raises(ValueError, match=name):
        codebook_entropy(torch.randn(3, 2), torch.randn(4, 2), **options)
