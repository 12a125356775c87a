"""codebook_statistics and vector_quantize: statistics, losses and gradients."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from alit_kernels import codebook_statistics, vector_quantize
from alit_kernels.testing import assert_within_budget
from alit_kernels.vector_quantize.cases import TEST_CASES, Case, make
from tests.helpers.targets import Target, targets, targets_and_dtypes

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
EVERYWHERE = pytest.mark.parametrize("target", targets("cpp", "triton"))
METRICS = pytest.mark.parametrize("metric", ("euclidean", "cosine"))


@EVERYWHERE
@pytest.mark.parametrize("dim", (12, 24))
@pytest.mark.parametrize("precision", ("ieee", "tf32"))
def test_index_where_masked(precision: str, dim: int, target: Target) -> None:
    z, codebook, mask = make(Case(70, 150, dim, masked=True), device=target.device)
    assert mask is not None
    result = vector_quantize(
        z, codebook, mask=mask, precision=precision, implementation=target.implementation
    )
    assert not result.index[~mask].any() and result.index[mask].any()


@EVERYWHERE
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("masked", (False, True))
@pytest.mark.parametrize("rows", (0, 1, 50, 700))
def test_statistics(rows: int, masked: bool, dtype: torch.dtype, target: Target) -> None:
    z = torch.randn(rows, 6).to(target.device, dtype)
    index = torch.randint(9, (rows,)).to(target.device)
    mask = (torch.rand(rows) > 0.4).to(target.device) if masked else None
    if mask is not None:
        z[~mask], index[~mask] = torch.nan, 10**9

    def statistics(index: Tensor) -> tuple[Tensor, Tensor]:
        return codebook_statistics(index, z, 12, mask=mask, implementation=target.implementation)

    count, total = statistics(index)
    assert count.dtype == total.dtype == torch.float32
    for code in range(12):
        mine = (index == code) if mask is None else (index == code) & mask
        assert count[code] == mine.sum()
        torch.testing.assert_close(total[code], z[mine].float().sum(0), atol=1e-5, rtol=1e-5)
    again = statistics(index.int())
    assert torch.equal(count, again[0]) and torch.equal(total, again[1])


@EVERYWHERE
def test_statistics_of_one_code(target: Target) -> None:
    """With all vectors in one code, accumulation does not lose the later ones."""
    z = torch.full((3000, 2), 0.1, device=target.device)
    index = torch.full((3000,), 2, device=target.device)
    count, total = codebook_statistics(index, z, 4, implementation=target.implementation)
    assert count.tolist() == [0, 0, 3000, 0]
    torch.testing.assert_close(total[2], torch.full_like(total[2], 300.0), rtol=1e-6, atol=0)


@pytest.mark.parametrize("target", targets("triton")[1:])
def test_statistics_of_codes_that_are_not_there(target: Target) -> None:
    """Indices outside the codes, which are not checked on a GPU, are not counted, and nothing else changes."""
    triton_ = pytest.importorskip("alit_kernels.codebook_statistics.triton_")
    index = torch.randint(9, (700,))
    index[::3], index[1::7] = -1, 12
    z = torch.randn(700, 6)
    there = (index >= 0) & (index < 12)
    found = triton_.codebook_statistics(index.to(target.device), z.to(target.device), 12, None)
    expected = codebook_statistics(index[there], z[there], 12, implementation="reference")
    for a, e in zip(found, expected, strict=True):
        torch.testing.assert_close(a.cpu(), e)


LAYOUTS = {
    "even": lambda index: index,
    "one code": lambda index: torch.full_like(index, 36),
    "half in one code": lambda index: torch.where(torch.arange(len(index)) % 2 > 0, index, 5),
    "two codes": lambda index: 35 + index % 2,
    "sorted": lambda index: index.sort()[0],
}


@pytest.mark.parametrize("dim", (1, 12, 100))
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("target", targets("cpp", "triton")[1:])
def test_statistics_are_float64_sums_rounded_once(layout: str, dim: int, target: Target) -> None:
    """Statistics are float64 sums rounded once, for any distribution of the vectors."""
    rows, codes = 600, 37
    index, mask = LAYOUTS[layout](torch.randint(codes, (rows,))), torch.rand(rows) > 0.2
    z = 1e3 * torch.randn(rows, dim)
    for some in (None, mask):
        there = [None if x is None else x.to(target.device) for x in (index, z, some)]
        found = codebook_statistics(
            *there[:2], codes, mask=there[2], implementation=target.implementation
        )
        expected = codebook_statistics(index, z, codes, mask=some, implementation="reference")
        for a, e in zip(found, expected, strict=True):
            assert torch.equal(a.cpu(), e)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("target", targets("triton")[1:])
def test_statistics_of_many_small_blocks(
    layout: str, target: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Statistics are right with block sizes so small that every loop of the kernels takes several steps."""
    triton_ = pytest.importorskip("alit_kernels.codebook_statistics.triton_")
    sizes = {"BLOCK": 32, "LONG": 4, "COMPARED": 16, "BLOCKS": 8, "SUMS": 64}
    for name, size in sizes.items():
        monkeypatch.setattr(triton_, name, size)
    index, mask = LAYOUTS[layout](torch.randint(37, (600,))), torch.rand(600) > 0.2
    z = 1e3 * torch.randn(600, 12)
    there = [x.to(target.device) for x in (index, z, mask)]
    found = triton_.codebook_statistics(*there[:2], 37, there[2])
    expected = codebook_statistics(index, z, 37, mask=mask, implementation="reference")
    for a, e in zip(found, expected, strict=True):
        assert torch.equal(a.cpu(), e)


@pytest.mark.parametrize("target", targets("triton")[1:])
def test_keys_of_very_many_codes_are_64_bits_wide(
    target: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    triton_ = pytest.importorskip("alit_kernels.codebook_statistics.triton_")
    codes = 2**23 * triton_.tile(100)["KB"]
    launched = []
    monkeypatch.setattr(
        triton_, "launch", lambda kernel, grid, **arguments: launched.append(arguments)
    )
    index = torch.zeros(3, dtype=torch.int64, device=target.device)
    for number, dtype in ((codes - 512, torch.int32), (codes, torch.int64)):
        triton_.ordered(index, None, torch.zeros(3, 100, device=target.device), number)
        assert launched.pop()["p_order"].dtype == dtype


def test_wrong_statistics_arguments() -> None:
    with pytest.raises(ValueError, match=r"index: expected values in 0\.\.3, got 4\.\.4"):
        codebook_statistics(torch.tensor([4]), torch.randn(1, 2), 4)
    with pytest.raises(ValueError, match="num_codes: expected at least 1"):
        codebook_statistics(torch.tensor([0]), torch.randn(1, 2), 0)


def written_out(
    z: Tensor, codebook: Tensor, index: Tensor, mask: Tensor | None, metric: str
) -> list[Tensor]:
    """Straight-through output and both losses at fixed indices, differentiable by autograd."""
    if mask is not None:
        z, index = z[mask], index[mask]
    if metric == "cosine":
        z, codebook = normalize(z, dim=-1), normalize(codebook, dim=-1)
    q = codebook[index]
    mean = torch.mean if z.numel() else torch.sum  # of no elements a loss is 0
    losses = 0.25 * mean((z - q.detach()).square()), 0.5 * mean((q - z.detach()).square())
    return [z + (q - z).detach(), *losses]


@pytest.mark.parametrize(("target", "dtype"), targets_and_dtypes("cpp", "triton", dtypes=DTYPES))
@METRICS
@pytest.mark.parametrize(
    "case", [case for case in TEST_CASES if case.layout not in ("tiny", "huge")]
)
def test_quantizer_forward_and_gradients(
    case: Case, metric: str, dtype: torch.dtype, target: Target
) -> None:
    z, codebook, mask = make(case, dtype=dtype, device=target.device)
    quantize = partial(
        vector_quantize,
        mask=mask,
        metric=metric,
        codebook_weight=0.5,
        implementation=target.implementation,
    )
    index = quantize(z, codebook).index
    kept = torch.ones_like(index, dtype=torch.bool) if mask is None else mask
    weights = torch.randn(z.shape, generator=torch.Generator().manual_seed(2))
    weights = weights.to(target.device, dtype)[kept]

    def run(dtype: torch.dtype, ours: bool) -> list[Tensor]:
        leaves = [t.detach().clone().to(dtype).requires_grad_() for t in (z, codebook)]
        if ours:
            r = quantize(*leaves)
            torch.testing.assert_close(r.loss, r.commitment_loss + r.codebook_loss)
            results = [r.quantized[kept], r.commitment_loss, r.codebook_loss]
        else:
            results = written_out(*leaves, index, mask, metric)
        quantized, commitment, codebook_loss = results
        (3 * commitment + 2 * codebook_loss + (quantized * weights.to(dtype)).sum()).backward()
        return [*(x.detach() for x in results), *(leaf.grad for leaf in leaves)]

    names = ("quantized", "commitment", "codebook loss", "gradient of z", "gradient of codebook")
    results = run(dtype, True), run(dtype, False), run(torch.float64, False)
    for name, a, e, x in zip(names, *results, strict=True):
        assert_within_budget(a, e, x, k=3 if "gradient" in name else 2, what=name)


@EVERYWHERE
@METRICS
def test_a_codebook_that_wants_no_gradient(metric: str, target: Target) -> None:
    """A codebook that needs no gradient gets none, and does not change the gradient of z."""
    z = torch.randn(7, 5).to(target.device).requires_grad_()
    codebook = torch.randn(9, 5).to(target.device)
    mask = torch.arange(7, device=target.device) % 3 > 0

    def gradient(codebook: Tensor) -> Tensor:
        result = vector_quantize(
            z, codebook, metric=metric, mask=mask, implementation=target.implementation
        )
        (found,) = torch.autograd.grad(result.quantized.square().sum() + result.loss, z)
        return found

    assert torch.equal(gradient(codebook), gradient(codebook.clone().requires_grad_()))
    ones = torch.ones((), device=target.device)
    index = torch.zeros(7, dtype=torch.int64, device=target.device)
    _, unwanted = torch.ops.alit_kernels.vector_quantize_backward(
        *(z.detach(), ones, ones, ones, z.detach(), codebook, index, mask, metric, 0.25, 1.0),
        *(True, False, target.implementation),
    )
    assert unwanted.shape == (0,)


@EVERYWHERE
def test_straight_through_gradient_is_its_formula(target: Target) -> None:
    """The straight-through gradient of z is g for "euclidean", (g - u (u . g)) / |z| for "cosine"; no codebook's."""
    z, codebook = (torch.randn(n, 5).to(target.device).requires_grad_() for n in (7, 9))
    weights = torch.randn(7, 5).to(target.device)
    norm = z.detach().norm(dim=-1, keepdim=True)
    u = z.detach() / norm
    cosine = (weights - u * (u * weights).sum(-1, keepdim=True)) / norm
    for metric, expected in (("euclidean", weights), ("cosine", cosine)):
        result = vector_quantize(z, codebook, metric=metric, implementation=target.implementation)
        found, nothing = torch.autograd.grad(result.quantized, (z, codebook), weights)
        assert metric == "cosine" or torch.equal(found, expected)
        torch.testing.assert_close(found, expected)
        assert not nothing.any()


@EVERYWHERE
def test_cosine_of_vanishing_vectors(target: Target) -> None:
    """Norms at and below 1e-12 are clamped, forward and backward."""
    z = torch.tensor([[0.0, 0.0], [3e-13, 0.0], [1e-20, 1e-20], [1.0, 0.0]])
    codebook = torch.tensor([[0.0, 1.0], [0.0, 0.0], [1.0, 0.0]])
    result, grads = [], []
    for implementation in ("reference", target.implementation):
        leaves = [t.to(target.device).requires_grad_() for t in (z.clone(), codebook.clone())]
        output = vector_quantize(*leaves, metric="cosine", implementation=implementation)
        (output.loss + output.quantized.sum()).backward()
        result.append(output)
        grads.append([leaf.grad for leaf in leaves])
    assert torch.equal(result[0].index, result[1].index)
    torch.testing.assert_close(result[0].loss, result[1].loss)
    torch.testing.assert_close(grads[0], grads[1])


@METRICS
def test_gradcheck_of_losses(metric: str) -> None:
    """Each loss passes gradcheck in the argument that it trains (with stop-gradients their sum does not)."""
    z, codebook = torch.randn(5, 3, dtype=torch.float64), 3 * torch.randn(4, 3, dtype=torch.float64)
    mask = torch.tensor([True, True, False, True, True])
    check, quantize = torch.autograd.gradcheck, partial(vector_quantize, metric=metric, mask=mask)
    assert check(lambda x: quantize(x, codebook).commitment_loss, z.clone().requires_grad_())
    assert check(lambda c: quantize(z, c).codebook_loss, codebook.clone().requires_grad_())


@EVERYWHERE
def test_masked_equals_removed(target: Target) -> None:
    z, codebook, mask = make(Case(64, 30, 12, masked=True), device=target.device)
    quantize = partial(vector_quantize, implementation=target.implementation)
    whole, kept = quantize(z, codebook, mask=mask), quantize(z[mask], codebook)
    assert torch.equal(whole.index[mask], kept.index)
    assert torch.equal(whole.quantized[mask], kept.quantized)
    assert not whole.index[~mask].any() and not whole.quantized[~mask].any()
    torch.testing.assert_close(whole.loss, kept.loss)
    nothing = quantize(z.requires_grad_(), codebook.requires_grad_(), mask=torch.zeros_like(mask))
    assert nothing.loss == 0 and not nothing.quantized.any()
    (nothing.loss + nothing.quantized.sum()).backward()
    assert not z.grad.any() and not codebook.grad.any()


def test_shapes_and_autocast() -> None:
    codebook = torch.randn(6, 4)
    assert vector_quantize(torch.randn(2, 3, 5, 4), codebook).index.shape == (2, 3, 5)
    single = vector_quantize(codebook[3], codebook)
    assert single.index.shape == () and int(single.index) == 3
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = vector_quantize(torch.randn(3, 4).bfloat16(), codebook)
    assert result.quantized.dtype == torch.float32


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"codebook": torch.randn(5, 3)}, ValueError, "codebook: expected shape"),
        ({"codebook": torch.randn(0, 4)}, ValueError, "codebook: expected at least 1 row"),
        ({"codebook": torch.randn(5, 4).half()}, TypeError, "codebook: expected dtype"),
        ({"z": torch.zeros(3, 4, dtype=torch.int64)}, TypeError, "z: expected dtype"),
        ({"metric": "manhattan"}, ValueError, "metric: expected one of"),
        ({"precision": "fp8"}, ValueError, "precision: expected one of"),
        ({"mask": torch.ones(4, dtype=torch.bool)}, ValueError, "mask: expected shape"),
        (
            {"implementation": "cuda"},
            ValueError,
            "implementation='cuda' of alit_kernels.vector_quantize cannot run",
        ),
    ],
)
def test_wrong_arguments(change: dict[str, object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        vector_quantize(**{"z": torch.randn(3, 4), "codebook": torch.randn(5, 4), **change})


@EVERYWHERE
def test_codebook_gradient_is_deterministic(target: Target) -> None:
    interpreted = target == ("triton", "cpu")
    z = torch.randn(500 if interpreted else 100_000, 12).to(target.device)
    codebook = torch.randn(8, 12).to(target.device).requires_grad_()
    quantize = partial(vector_quantize, z, codebook, implementation=target.implementation)
    first, *others = (
        torch.autograd.grad(quantize().loss, codebook)[0] for _ in range(2 if interpreted else 4)
    )
    assert all(torch.equal(first, other) for other in others)


def test_results_do_not_depend_on_the_thread_count() -> None:
    z, codebook, mask = make(Case(3000, 50, 12, masked=True))
    results = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        codes = codebook.clone().requires_grad_()
        output = vector_quantize(z, codes, mask=mask)
        output.loss.backward()
        statistics = codebook_statistics(output.index, z, 50, mask=mask)
        results.append((*(t.detach() for t in output), codes.grad, *statistics))
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))
