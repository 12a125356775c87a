"""nearest_codeword, codebook_statistics and vector_quantize."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import normalize, pad

from alit_kernels import VectorQuantized, codebook_statistics, nearest_codeword, vector_quantize
from alit_kernels._cpp import INSTRUCTION_SETS
from alit_kernels._library import extension
from alit_kernels.testing import assert_exact_nearest, assert_within_budget
from alit_kernels.vector_quantize.cases import TEST_CASES, Case, make
from tests.helpers.targets import Target, targets, targets_and_dtypes

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
EVERYWHERE = pytest.mark.parametrize("target", targets("cpp", "triton"))


@EVERYWHERE
@pytest.mark.parametrize("metric", ("euclidean", "cosine"))
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", TEST_CASES)
def test_search_is_exact(case: Case, dtype: torch.dtype, metric: str, target: Target) -> None:
    z, codebook, _ = make(case, dtype=dtype, device=target.device)
    index = nearest_codeword(z, codebook, metric=metric, implementation=target.implementation)
    if metric == "cosine":
        z, codebook = normalize(z.float(), dim=-1), normalize(codebook.float(), dim=-1)
    assert_exact_nearest(index, z, codebook)


@EVERYWHERE
@pytest.mark.parametrize("more", (0, 20))
def test_search_with_nan_and_inf(more: int, target: Target) -> None:
    nan, inf = torch.nan, torch.inf
    codebook = torch.tensor([[nan, 0.0], [5.0, 0.0], [inf, 0.0], [5.0, 0.0]])
    z = torch.tensor([[4.0, 0.0], [nan, 0.0], [inf, 0.0], [-inf, 1.0]])
    z, codebook = (pad(x, (0, more)).to(target.device) for x in (z, codebook))
    index = nearest_codeword(z, codebook, implementation=target.implementation)
    # Ties take the lowest index; NaN never wins; all NaN gives 0; an infinite distance beats a NaN one.
    assert index.tolist() == [1, 0, 1, 1]
    assert_exact_nearest(index, z, codebook)
    # Codes beyond the range of squares of float32 are still codes.
    far = torch.tensor([[0.0], [2.7e19], [nan], [-2.6e19]]).expand(-1, 1 + more)
    near = torch.tensor([[1.8e19], [1.0], [-1.7e19]]).expand(-1, 1 + more)
    far, near = (pad(x[:, :1], (0, more)).to(target.device) for x in (far, near))
    index = nearest_codeword(near, far, implementation=target.implementation)
    assert index.tolist() == [1, 0, 3]


@pytest.mark.parametrize("target", targets("triton")[1:])
def test_products_say_which_rows_are_in_doubt(target: Target) -> None:
    """Few of ordinary data, and every row whose index is wrong; all where rounding may decide, or nothing is known."""
    triton_ = pytest.importorskip("alit_kernels.nearest_codeword.triton_")
    z, codebook, _ = make(Case(200, 150, 24), device=target.device)

    def search(z: Tensor, codebook: Tensor) -> tuple[Tensor, Tensor]:
        index = torch.full((len(z),), -1, device=target.device)
        doubt = torch.zeros(len(z), dtype=torch.bool, device=target.device)
        triton_.by_products(z, codebook, None, index, doubt)
        return index, doubt

    index, doubt = search(z, codebook)
    assert doubt.sum() < 20
    assert_exact_nearest(index[~doubt], z[~doubt], codebook)
    twice = torch.cat([codebook, codebook])
    assert search(z, twice)[1].all(), "ties"
    assert search(1e6 + z, 1e6 + codebook)[1].all(), "a common offset"
    small = 2.0**-55
    assert search(small * z, small * codebook)[1].all(), "underflow"
    assert search(1e25 * z, codebook)[1].all() and search(z, 1e25 * codebook)[1].all(), "overflow"
    z[::2, 3] = torch.nan
    assert torch.equal(
        search(z, codebook)[1] | doubt, doubt | (torch.arange(200, device=z.device) % 2 == 0)
    )
    one, doubt = search(z[1::2], codebook[:1])
    assert not one.any() and not doubt.any()


@pytest.mark.parametrize("target", targets("cpp")[1:])
def test_search_of_many_rows_that_are_not_numbers(target: Target) -> None:
    """Takes the first code, which is as far as all others, without a look at them."""
    z, codebook = torch.randn(20000, 16), torch.randn(4096, 16)
    z[torch.arange(20000), torch.arange(20000) % 16] = torch.nan

    def seconds(z: Tensor) -> float:
        start = time.perf_counter()
        nearest_codeword(z, codebook, implementation=target.implementation)
        return time.perf_counter() - start

    usual = min(seconds(z.nan_to_num()) for _ in range(3))
    assert not nearest_codeword(z, codebook, implementation=target.implementation).any()
    # A search of all codes in float64 takes dozens of times as long.
    assert min(seconds(z) for _ in range(3)) < 10 * usual


@pytest.mark.parametrize("target", targets("triton")[1:])
@pytest.mark.parametrize(("errors", "certain"), ((0.5, False), (1.5, False), (3.0, True)))
def test_products_are_believed_from_twice_their_error_on(
    errors: float, certain: bool, target: Target
) -> None:
    """Of two codes, the second is so many times the bound of the error behind the first."""
    triton_ = pytest.importorskip("alit_kernels.nearest_codeword.triton_")
    generator = torch.Generator().manual_seed(0)
    z, first = torch.randn(2, 24, generator=generator, dtype=torch.float64)
    away = (first - z) / (first - z).norm()
    radius = first.norm()
    bound = triton_.products_error(24) * (z.norm() * radius + radius**2 / 2)
    second = first + errors * bound / (first - z).norm() * away
    codebook = torch.stack([first, second]).float().to(target.device)
    index = torch.zeros(1, dtype=torch.int64, device=target.device)
    doubt = torch.zeros(1, dtype=torch.bool, device=target.device)
    triton_.by_products(z[None].float().to(target.device), codebook, None, index, doubt)
    assert bool(doubt) is not certain


@pytest.mark.parametrize("target", targets("triton")[1:])
@pytest.mark.parametrize("dim", (24, 256))
def test_no_wrong_index_is_believed(dim: int, target: Target) -> None:
    """Of two codes whose scores differ by 2^-28 to 2^-10 of |z| |c| + |c|^2 / 2; on a GPU by its own products."""
    triton_ = pytest.importorskip("alit_kernels.nearest_codeword.triton_")
    generator = torch.Generator().manual_seed(dim)
    z, first = torch.randn(2, 150, dim, generator=generator, dtype=torch.float64)
    radius = first.norm(dim=1)
    gaps = torch.logspace(-28, -10, 150, base=2) * (z.norm(dim=1) * radius + radius**2 / 2)
    wrong, believed = 0, 0
    for one, code, gap in zip(z, first, gaps, strict=True):
        away = (code - one) / (code - one).norm()
        pair = [code + gap / (code - one).norm() * away, code]
        codebook, vector = torch.stack(pair).float(), one[None].float()
        index = torch.zeros(1, dtype=torch.int64, device=target.device)
        doubt = torch.zeros(1, dtype=torch.bool, device=target.device)
        triton_.by_products(
            vector.to(target.device), codebook.to(target.device), None, index, doubt
        )
        distance = (codebook.double() - vector.double()).square().sum(1)
        believed += not doubt
        wrong += not doubt and int(index) != int(distance.argmin())
    assert wrong == 0 and believed > 5


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
def test_search_where_float32_errs(target: Target) -> None:
    """Ties that only float64 sees, distances that overflow or underflow, and a codebook of one value."""
    z = torch.tensor([[0.0, 0.0, 0.0], [1.0, 1.0, 1.0], [3e38, 0.0, 0.0], [1e-40, 0.0, 0.0]])
    codebook = torch.tensor(
        [[0.3, 0.7, 0.1], [0.7, 0.1, 0.3], [0.1, 0.3, 0.7], [-3e38, 0.0, 0.0], [3e-40, 0.0, 0.0]]
    )
    for order in ([0, 1, 2, 3, 4], [2, 0, 1, 4, 3], [4, 3, 1, 2, 0]):
        for k in (3, 5):
            codes = codebook[[i for i in order if i < k]].to(target.device)
            index = nearest_codeword(
                z.to(target.device), codes, implementation=target.implementation
            )
            assert_exact_nearest(index, z.to(target.device), codes)
    # Codes of very different magnitude, of which the small ones are nothing beside the large.
    far_apart = torch.tensor([2e-16, 1e-16, 0, 3e-16, *[1e30 * (2 + i) for i in range(14)]])
    near = torch.tensor([1.1e-16, 1.9e-16, 5e-16, 0.0, 2e30])
    far_apart, near = far_apart.to(target.device)[:, None], near.to(target.device)[:, None]
    index = nearest_codeword(near, far_apart, implementation=target.implementation)
    assert index.tolist() == [1, 0, 3, 2, 4]
    small = torch.randint(-2, 3, (60, 4), device=target.device).float()
    lattice = torch.randint(-2, 3, (50, 4), device=target.device).float()
    index = nearest_codeword(small, lattice, implementation=target.implementation)
    assert_exact_nearest(index, small, lattice)
    same = torch.ones(40, 4, device=target.device)
    assert not nearest_codeword(small, same, implementation=target.implementation).any()


def doubtful(dim: int) -> tuple[Tensor, Tensor]:
    """Vectors with an obvious nearest code, and such between two codes, far outside, at the end of the range, equal to
    a code or to two; first a run of the former, then one of the others, then mixed."""
    generator = torch.Generator().manual_seed(dim)
    codebook = torch.randn(101, dim, generator=generator)
    codebook[90:] = codebook[:11]
    between = (codebook[20:50] + codebook[50:80]) / 2 * (1 + 1e-7)
    far = 3e7 * torch.randn(30, dim, generator=generator)
    last = torch.full((2, dim), torch.finfo(torch.float32).max)
    last[1, 1:] = 0
    obvious = torch.randn(150, dim, generator=generator)
    hard = torch.cat([between, far, last, codebook])
    z = torch.cat([obvious, hard, hard])
    return torch.cat([z, z[torch.randperm(len(z), generator=generator)]]), codebook


@EVERYWHERE
@pytest.mark.parametrize("dim", (3, 12, 64))
def test_search_of_vectors_in_doubt(dim: int, target: Target) -> None:
    z, codebook = (x.to(target.device) for x in doubtful(dim))
    index = nearest_codeword(z, codebook, implementation=target.implementation)
    assert_exact_nearest(index, z, codebook)


@pytest.mark.parametrize("instruction_set", INSTRUCTION_SETS)
def test_search_with_every_instruction_set(
    instruction_set: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    core = extension()
    if core is None:
        pytest.skip("the compiled core is not installed (no C++ compiler at installation)")
    best = core.build_info()["instruction_set"]
    monkeypatch.setenv("ALIT_KERNELS_INSTRUCTION_SET", instruction_set)
    if INSTRUCTION_SETS.index(instruction_set) > INSTRUCTION_SETS.index(best):
        with pytest.raises(ValueError, match=f"instruction set {instruction_set}: this machine"):
            nearest_codeword(torch.ones(1, 1), torch.ones(1, 1), implementation="cpp")
        return
    for case in (*TEST_CASES, Case(97, 41, 48), Case(33, 9, 49, layout="duplicates")):
        for dtype in DTYPES:
            z, codebook, _ = make(case, dtype=dtype)
            assert_exact_nearest(nearest_codeword(z, codebook, implementation="cpp"), z, codebook)
    for dim in (1, 3, 12, 64):
        z, codebook = doubtful(dim)
        assert_exact_nearest(nearest_codeword(z, codebook, implementation="cpp"), z, codebook)


def test_unknown_instruction_set(monkeypatch: pytest.MonkeyPatch) -> None:
    if extension() is None:
        pytest.skip("the compiled core is not installed (no C++ compiler at installation)")
    monkeypatch.setenv("ALIT_KERNELS_INSTRUCTION_SET", "sse9")
    with pytest.raises(
        ValueError, match="instruction set: expected avx512_bf16, avx512, avx2 or baseline"
    ):
        nearest_codeword(torch.ones(1, 1), torch.ones(1, 1), implementation="cpp")


def test_exactness_check_rejects() -> None:
    """The check itself must be able to fail."""
    z, codebook, _ = make(Case(20, 30, 4))
    index = nearest_codeword(z, codebook)
    wrong = index.clone()
    wrong[7] = (wrong[7] + 1) % 30
    with pytest.raises(AssertionError, match="not nearest"):
        assert_exact_nearest(wrong, z, codebook)
    doubled = torch.cat([codebook, codebook])
    with pytest.raises(AssertionError, match="lowest index"):
        assert_exact_nearest(index + 30, z, doubled)


@EVERYWHERE
def test_search_of_strided_inputs(target: Target) -> None:
    z, codebook, _ = make(Case(24, 16, 6), device=target.device)

    def search(z: Tensor, codebook: Tensor) -> Tensor:
        return nearest_codeword(z, codebook, implementation=target.implementation)

    expected = search(z, codebook)
    assert torch.equal(search(z.t().contiguous().t(), codebook), expected)
    assert torch.equal(search(torch.cat([z, z], 1)[:, :6], codebook.t().contiguous().t()), expected)
    assert torch.equal(search(z[:1].expand(5, -1), codebook), expected[:1].expand(5))
    unaligned = torch.cat([z.new_zeros(1), z.flatten()])[1:].view(z.shape)
    assert torch.equal(search(unaligned, codebook), expected)


@EVERYWHERE
def test_search_properties(target: Target) -> None:
    @settings(max_examples=5 if target.implementation == "triton" else 30, deadline=None)
    @given(st.integers(0, 10**6), st.integers(1, 40), st.integers(1, 20), st.integers(1, 9))
    def check(seed: int, vectors: int, codes: int, dim: int) -> None:
        z, codebook, _ = make(Case(vectors, codes, dim), seed=seed, device=target.device)

        def search(z: Tensor, codebook: Tensor, metric: str = "euclidean") -> Tensor:
            return nearest_codeword(
                z, codebook, metric=metric, implementation=target.implementation
            )

        index = search(z, codebook)
        order = torch.randperm(vectors, generator=torch.Generator().manual_seed(seed))
        assert torch.equal(search(z[order], codebook), index[order])
        assert torch.equal(search(4 * z, 4 * codebook), index)
        assert torch.equal(search(4 * z, codebook, "cosine"), search(z, codebook, "cosine"))

    check()


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
    """All vectors in one code: accumulation must not lose the later ones."""
    z = torch.full((3000, 2), 0.1, device=target.device)
    index = torch.full((3000,), 2, device=target.device)
    count, total = codebook_statistics(index, z, 4, implementation=target.implementation)
    assert count.tolist() == [0, 0, 3000, 0]
    torch.testing.assert_close(total[2], torch.full_like(total[2], 300.0), rtol=1e-6, atol=0)


@pytest.mark.parametrize("target", targets("triton")[1:])
def test_statistics_of_codes_that_are_not_there(target: Target) -> None:
    """On a GPU nobody checks the values of an index: those outside the codes do not count, and nothing else changes."""
    triton_ = pytest.importorskip("alit_kernels.codebook_statistics.triton_")
    index = torch.randint(9, (700,))
    index[::3], index[1::7] = -1, 12
    z = torch.randn(700, 6)
    there = (index >= 0) & (index < 12)
    found = triton_.codebook_statistics(index.to(target.device), z.to(target.device), 12, None)
    expected = codebook_statistics(index[there], z[there], 12, implementation="reference")
    for a, e in zip(found, expected, strict=True):
        torch.testing.assert_close(a.cpu(), e)


@pytest.mark.parametrize("num_codes", (5, 2**15 - 2, 2**15 - 1, 2**15, 70000))
def test_runs_of_many_codes(num_codes: int) -> None:
    """Sorted as 16-bit integers where the codes and the mark of masked vectors are."""
    triton_ = pytest.importorskip("alit_kernels.codebook_statistics.triton_")
    index = torch.cat([torch.randint(num_codes, (50,)), torch.tensor([num_codes - 1, 0])])
    mask = torch.arange(52) % 5 > 0
    order, bounds = triton_.runs(index, num_codes, mask)
    counts = index[mask].bincount(minlength=num_codes)
    assert torch.equal(bounds.diff().long(), counts) and bounds[0] == 0
    used = order[: bounds[-1]]
    assert torch.equal(used, torch.where(mask, index, num_codes).sort(stable=True)[1][: len(used)])


def written_out(
    z: Tensor, codebook: Tensor, index: Tensor, mask: Tensor | None, metric: str
) -> dict[str, Tensor]:
    """Losses and straight-through output, differentiated by autograd at fixed indices."""
    if mask is not None:
        z, index = z[mask], index[mask]
    u, e = (
        (normalize(z, dim=-1), normalize(codebook, dim=-1)) if metric == "cosine" else (z, codebook)
    )
    q = e[index]
    commitment = 0.25 * (u - q.detach()).square().mean() if u.numel() else u.sum()
    codebook_loss = (q - u.detach()).square().mean() if u.numel() else 0 * codebook.sum()
    return {"quantized": u + (q - u).detach(), "commitment": commitment, "codebook": codebook_loss}


@pytest.mark.parametrize(("target", "dtype"), targets_and_dtypes("cpp", "triton", dtypes=DTYPES))
@pytest.mark.parametrize("metric", ("euclidean", "cosine"))
@pytest.mark.parametrize(
    "case", [case for case in TEST_CASES if case.layout not in ("tiny", "huge")]
)
def test_quantizer_forward_and_gradients(
    case: Case, metric: str, dtype: torch.dtype, target: Target
) -> None:
    inputs = make(case, dtype=dtype, device=target.device)
    quantize: Callable[..., VectorQuantized] = partial(
        vector_quantize, metric=metric, implementation=target.implementation
    )
    index = quantize(inputs.z, inputs.codebook, mask=inputs.mask).index
    weights = torch.randn(inputs.z.shape, generator=torch.Generator().manual_seed(2))
    weights = weights.to(target.device, dtype)

    def run(dtype: torch.dtype, ours: bool) -> list[Tensor]:
        z, codebook = (
            t.detach().clone().to(dtype).requires_grad_() for t in (inputs.z, inputs.codebook)
        )
        if ours:
            r = quantize(z, codebook, mask=inputs.mask)
            quantized, commitment, codebook_loss = r.quantized, r.commitment_loss, r.codebook_loss
            torch.testing.assert_close(r.loss, commitment + codebook_loss)
            quantized = quantized if inputs.mask is None else quantized[inputs.mask]
        else:
            result = written_out(z, codebook, index, inputs.mask, metric)
            quantized, commitment, codebook_loss = (
                result["quantized"],
                result["commitment"],
                result["codebook"],
            )
        w = weights.to(dtype) if inputs.mask is None else weights.to(dtype)[inputs.mask]
        (3 * commitment + 2 * codebook_loss + (quantized * w).sum()).backward()
        return [quantized, commitment, codebook_loss, z.grad, codebook.grad]

    names = ("quantized", "commitment", "codebook loss", "gradient of z", "gradient of codebook")
    for name, a, e, x in zip(
        names,
        run(dtype, True),
        run(dtype, False),
        run(torch.float64, False),
        strict=True,
    ):
        assert_within_budget(
            a.detach(), e.detach(), x.detach(), k=3 if "gradient" in name else 2, what=name
        )


@EVERYWHERE
@pytest.mark.parametrize("metric", ("euclidean", "cosine"))
def test_a_codebook_that_wants_no_gradient(metric: str, target: Target) -> None:
    """Gets none, is not sorted for, and changes nothing in the gradient of z."""
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
        *(z.detach(), ones, ones, ones, z.detach(), codebook, index, mask, metric, 0.25),
        *(False, target.implementation),
    )
    assert unwanted.shape == (0,)


@EVERYWHERE
def test_straight_through_gradient_is_its_formula(target: Target) -> None:
    """Euclidean: identity to z, nothing to the codebook. Cosine: (g - u (u . g)) / |z|."""
    z = torch.randn(7, 5).to(target.device).requires_grad_()
    codebook = torch.randn(9, 5).to(target.device).requires_grad_()
    weights = torch.randn(7, 5).to(target.device)

    def backward(metric: str) -> None:
        z.grad = None
        result = vector_quantize(z, codebook, metric=metric, implementation=target.implementation)
        (result.quantized * weights).sum().backward()

    backward("euclidean")
    assert torch.equal(z.grad, weights) and not codebook.grad.any()
    backward("cosine")
    norm = z.detach().norm(dim=-1, keepdim=True)
    u = z.detach() / norm
    torch.testing.assert_close(z.grad, (weights - u * (u * weights).sum(-1, keepdim=True)) / norm)


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


@pytest.mark.parametrize("metric", ("euclidean", "cosine"))
def test_gradcheck_of_losses(metric: str) -> None:
    """With stop-gradients the loss is no gradient field: each loss is checked in the argument it moves."""
    z, codebook = torch.randn(5, 3, dtype=torch.float64), 3 * torch.randn(4, 3, dtype=torch.float64)
    mask = torch.tensor([True, True, False, True, True])

    def loss(name: str) -> object:
        return lambda x, c: getattr(vector_quantize(x, c, metric=metric, mask=mask), name)

    assert torch.autograd.gradcheck(
        lambda x: loss("commitment_loss")(x, codebook), z.clone().requires_grad_()
    )
    assert torch.autograd.gradcheck(
        lambda c: loss("codebook_loss")(z, c), codebook.clone().requires_grad_()
    )


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


def test_search_under_autocast_is_in_float32() -> None:
    z, codebook, _ = make(Case(40, 30, 12))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        index = nearest_codeword(z.bfloat16(), codebook)
    assert torch.equal(index, nearest_codeword(z.bfloat16().float(), codebook))


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


def test_wrong_statistics_arguments() -> None:
    with pytest.raises(ValueError, match=r"index: expected values in 0\.\.3, got 4\.\.4"):
        codebook_statistics(torch.tensor([4]), torch.randn(1, 2), 4)
    with pytest.raises(ValueError, match="num_codes: expected at least 1"):
        codebook_statistics(torch.tensor([0]), torch.randn(1, 2), 0)


@EVERYWHERE
def test_codebook_gradient_is_deterministic(target: Target) -> None:
    interpreted = target == ("triton", "cpu")
    z = torch.randn(500 if interpreted else 100_000, 12).to(target.device)
    codebook = torch.randn(8, 12).to(target.device).requires_grad_()
    gradients = []
    for _ in range(2 if interpreted else 4):
        codebook.grad = None
        vector_quantize(z, codebook, implementation=target.implementation).loss.backward()
        gradients.append(codebook.grad.clone())
    assert all(torch.equal(gradients[0], other) for other in gradients[1:])


def test_results_do_not_depend_on_the_thread_count() -> None:
    z, codebook, mask = make(Case(3000, 50, 12, masked=True))
    results = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        codes = codebook.clone().requires_grad_()
        output = vector_quantize(z, codes, mask=mask)
        output.loss.backward()
        count, total = codebook_statistics(output.index, z, 50, mask=mask)
        results.append((*(t.detach() for t in output), codes.grad, count, total))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
