"""nearest_codeword is exact for all data, in every implementation."""

from __future__ import annotations

import time
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import normalize, pad

from alit_kernels import nearest_codeword
from alit_kernels._cpp import INSTRUCTION_SETS
from alit_kernels._library import extension
from alit_kernels.testing import assert_exact_nearest
from alit_kernels.vector_quantize.cases import TEST_CASES, Case, make
from tests.helpers.targets import Target, targets

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
EVERYWHERE = pytest.mark.parametrize("target", targets("cpp", "triton"))
needs_core = pytest.mark.skipif(extension() is None, reason="the compiled core is not installed")


class Steps(NamedTuple):
    """Steps of Triton's search, run one by one."""

    device: str

    def propose(self, z: Tensor, codebook: Tensor) -> tuple[Any, Any, Tensor]:
        """Parts, scores, and the bounds of the scores' errors (2, N): of products left out, and of sums."""
        from alit_kernels.nearest_codeword import triton_

        products = 3 if z.shape[1] <= triton_.THREE else 1
        found = triton_.prepare(
            z.to(self.device), codebook.to(self.device), cosine=False, products=products
        )
        proposed = triton_.propose(found, None, products)
        return found, proposed, triton_.error_bounds(found, proposed, products).cpu()

    def settle(self, z: Tensor, codebook: Tensor) -> tuple[Tensor, Tensor]:
        """Index (N,), and mask (N,) of the rows whose codes were scanned."""
        from alit_kernels.nearest_codeword import triton_

        found, proposed, _ = self.propose(z, codebook)
        index = torch.full((len(z),), -1, device=self.device)
        products = 3 if z.shape[1] <= triton_.THREE else 1
        limit = triton_.settle(found, None, proposed, index, products, exact=True)
        assert limit is not None
        return index.cpu(), limit.cpu() > -torch.inf


class Search(NamedTuple):
    """Search in one implementation, on its device; returns the index (N,) on the CPU."""

    implementation: str
    device: str

    def __call__(self, z: Tensor, codebook: Tensor, metric: str = "euclidean") -> Tensor:
        z, codebook = z.to(self.device), codebook.to(self.device)
        return nearest_codeword(
            z, codebook, metric=metric, implementation=self.implementation
        ).cpu()

    def unit(self, x: Tensor) -> Tensor:
        """Normalized vectors as searched for "cosine": Triton's kernels normalize in float64, then round."""
        wide = torch.float64 if self.implementation == "triton" else torch.float32
        return normalize(x.to(wide), dim=-1).float()


@pytest.fixture(params=targets("cpp", "triton"))
def search(request: pytest.FixtureRequest) -> Search:
    return Search(*request.param)


@pytest.fixture(params=targets("triton")[1:])
def steps(request: pytest.FixtureRequest) -> Steps:
    pytest.importorskip("triton")
    return Steps(request.param.device)


@pytest.mark.parametrize("metric", ("euclidean", "cosine"))
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", TEST_CASES)
def test_search_is_exact(case: Case, dtype: torch.dtype, metric: str, search: Search) -> None:
    z, codebook, _ = make(case, dtype=dtype)
    index = search(z, codebook, metric=metric)
    if metric == "cosine":
        z, codebook = search.unit(z), search.unit(codebook)
    assert_exact_nearest(index, z, codebook)


@pytest.mark.parametrize("more", (0, 20))
def test_search_with_nan_and_inf(more: int, search: Search) -> None:
    nan, inf = torch.nan, torch.inf
    codebook = pad(torch.tensor([[nan, 0.0], [5.0, 0.0], [inf, 0.0], [5.0, 0.0]]), (0, more))
    z = pad(torch.tensor([[4.0, 0.0], [nan, 0.0], [inf, 0.0], [-inf, 1.0]]), (0, more))
    index = search(z, codebook)
    # Ties give the lowest index; NaN is never nearest; all NaN gives 0; an infinite distance is nearer than NaN.
    assert index.tolist() == [1, 0, 1, 1]
    assert_exact_nearest(index, z, codebook)
    # Codes beyond the range of squares of float32 are still codes.
    far = pad(torch.tensor([[0.0], [2.7e19], [nan], [-2.6e19]]), (0, more))
    near = pad(torch.tensor([[1.8e19], [1.0], [-1.7e19]]), (0, more))
    assert search(near, far).tolist() == [1, 0, 3]


def test_codes_are_scanned_for_few_rows(steps: Steps) -> None:
    """Few rows of ordinary data are scanned, at any offset; all if errors are unknown or many codes equally near."""
    z, codebook, _ = make(Case(70, 150, 24))
    for offset in (0, 1000):
        index, doubt = steps.settle(offset + z, offset + codebook)
        assert doubt.sum() < 5
        assert_exact_nearest(index, offset + z, offset + codebook)
    for name, vectors, codes in (
        ("ties", z, codebook[:1].expand(150, -1)),
        ("underflow", 2.0**-35 * z, 2.0**-35 * codebook),
        ("overflow", 1e25 * z, codebook),
        ("overflow", z, 1e25 * codebook),
    ):
        index, doubt = steps.settle(vectors[:5], codes)
        assert doubt.all(), name
        assert_exact_nearest(index, vectors[:5], codes)
    index, doubt = steps.settle(z, torch.cat([codebook, codebook]))
    assert doubt.sum() < 5 and torch.equal(index, steps.settle(z, codebook)[0])
    z = z[:20]
    z[::2, 3] = torch.nan
    index, doubt = steps.settle(z, codebook)
    assert doubt[::2].all() and doubt[1::2].sum() < 5 and not index[::2].any()
    one, doubt = steps.settle(z[1::2], codebook[:1])
    assert not one.any() and not doubt.any()


@pytest.mark.parametrize("dim", (24, 48))
@pytest.mark.parametrize(("errors", "certain"), ((0.5, False), (1.5, False), (3.0, True)))
def test_scores_are_believed_from_twice_their_error_on(
    errors: float, certain: bool, dim: int, steps: Steps
) -> None:
    """A third code behind two equal ones needs no scan if it is farther by over twice the error bound."""
    generator = torch.Generator().manual_seed(0)
    z, first = torch.randn(2, dim, generator=generator, dtype=torch.float64)
    vector, codes = z[None].float(), torch.stack([first, first, first]).float()
    codes[:, 0] += torch.tensor([1.0, 1.0, -1.0])  # so that no code is the center
    bound = float(steps.propose(vector, codes)[2].sum())
    nearer = codes[:1].double()
    away = (nearer - z) / (nearer - z).square().sum()
    third = (nearer + errors * bound * away).float()
    # The fourth code keeps the center and the largest norm.
    codes = torch.cat([codes[:2], third, codes[2:] * 1.001 + 2])
    bound = float(steps.propose(vector, codes)[2].sum())
    third = (nearer + errors * bound * away).float()
    codes = torch.cat([codes[:2], third, codes[3:]])
    _, doubt = steps.settle(vector, codes)
    assert bool(doubt) is not certain


@pytest.mark.parametrize("dim", (24, 256))
def test_no_wrong_index_is_believed(dim: int, steps: Steps) -> None:
    """No wrong index is accepted: three equal codes, one nearer by 2^-26 to 2^-8 of |z| |c| + |c|^2 / 2."""
    generator = torch.Generator().manual_seed(dim)
    z, first = torch.randn(2, 40, dim, generator=generator, dtype=torch.float64)
    radius = first.norm(dim=1)
    gaps = torch.logspace(-26, -8, 40, base=2) * (z.norm(dim=1) * radius + radius**2 / 2)
    believed = 0
    for one, code, gap in zip(z, first, gaps, strict=True):
        away = code + gap / (code - one).square().sum() * (code - one)
        codebook = torch.stack([away, away, away, code, -code]).float()
        index, doubt = steps.settle(one[None].float(), codebook)
        assert_exact_nearest(index, one[None].float(), codebook)
        believed += not doubt
    assert believed > 5


@pytest.mark.parametrize("dim", (24, 256))
def test_nearest_of_three_in_any_place(dim: int, steps: Steps) -> None:
    """The nearest of three codes that no score tells apart is found, in any places of one step of the search."""
    generator = torch.Generator().manual_seed(dim)
    rows = 126
    codebook = 9 * torch.randn(6 * 64, dim, generator=generator)
    place = torch.stack([64 * i + torch.randperm(64, generator=generator)[:63] for i in range(6)])
    z = torch.randn(rows, dim, generator=generator)
    away = normalize(torch.randn(rows, dim, generator=generator), dim=1)
    for i, places in enumerate(place.view(rows, 3).T):
        codebook[places] = z + (1 + i * 2.0**-21) * away
    index, doubt = steps.settle(z, codebook)
    assert_exact_nearest(index, z, codebook)
    assert doubt.all(), "two of three are kept"


@pytest.mark.parametrize("dim", (3, 64, 128, 300))
def test_equal_codes_of_which_some_are_kept_and_others_scanned(dim: int, steps: Steps) -> None:
    codebook = torch.randn(7, dim) + 9
    codebook[2:] = 0
    z = 0.1 * torch.randn(64, dim)
    index, doubt = steps.settle(z, codebook)
    assert_exact_nearest(index, z, codebook)
    assert doubt.all() and torch.equal(index, torch.full((64,), 2))


@pytest.mark.parametrize("codes", (3, 66, 130))
def test_what_follows_the_codebook_is_no_code(codes: int, search: Search) -> None:
    """Memory after the codebook is never a code, though padding has the last code's scores and it is nearer."""
    memory = torch.randn(codes + 70, 64)
    memory[codes - 1], memory[codes:] = 1e15, 0.9e15
    assert search(memory[codes:][:3], memory[:codes]).tolist() == [codes - 1] * 3


def adversarial(dim: int) -> tuple[Tensor, Tensor]:
    """Vectors and codes with large errors: parts truncated the same way, sums that cancel, vanishing elements."""
    generator = torch.Generator().manual_seed(dim)

    def some(rows: int) -> Tensor:
        cut = torch.full((rows, dim), 1 + 2.0**-11 - 2.0**-23, dtype=torch.float64)
        plain = torch.randn(rows, dim, generator=generator, dtype=torch.float64)
        tiny = plain * 2.0 ** -torch.randint(0, 45, (rows, dim), generator=generator)
        large = plain.clone()
        large[:, ::2] *= 2.0**20
        cancel = plain.clone()
        cancel[:, dim // 2 :] = -cancel[:, : dim - dim // 2].flip(1)
        return torch.cat([cut, cut * (-1.0) ** torch.arange(dim), plain, tiny, large, cancel])

    return some(10).float(), some(2).float()


@pytest.mark.parametrize("dim", (3, 12, 32, 33, 256, 300))
def test_errors_of_scores_are_within_their_bounds(dim: int, steps: Steps) -> None:
    """Errors of sums are less than half of their bound. The error of one product reaches its bound if all elements are
    truncated alike; that of three products is less than half of theirs."""
    z, codes = adversarial(dim)
    worst = [0.0, 0.0]
    for code in codes[::4]:
        codebook = torch.stack([code, -code])  # around 0
        found, proposed, bound = steps.propose(z, codebook)
        rows = found.parts.rows.double().cpu() * found.parts.row_norms[1].double().cpu()[:, None]
        parts = found.parts.codes[:, :2].double().cpu() * found.norms[1, :2].double().cpu()[:, None]
        products = rows[0] @ parts[0].T
        for i, j in ((0, 1), (1, 0)) if len(rows) == 2 else ():
            products += rows[i] @ parts[j].T
        exact = z.double() @ codebook.double().T
        half = codebook.double().square().sum(1) / 2
        score = torch.empty(len(z), 2, dtype=torch.float64)
        score.scatter_(1, proposed.code.long().cpu().T, proposed.score[:2].double().cpu().T)
        everything, sums = (score - half + exact).abs(), (score - half + products).abs()
        worst[0] = max(worst[0], float((everything.amax(1) / bound.sum(0)).max()))
        worst[1] = max(worst[1], float((sums.amax(1) / bound[1]).max()))
    print(f"measured: {worst[0]:.3f} and, of sums, {worst[1]:.3f} of the bounds, D = {dim}")
    assert worst[0] < (0.5 if len(rows) == 2 else 1) and worst[1] < 0.5, worst


def cut(x: Tensor, bits: Tensor) -> Tensor:
    """``x`` truncated to multiples of 2^bits."""
    unit = 2.0**bits
    return (x / unit).trunc() * unit


@pytest.mark.parametrize("width", (4, 8, 16))
@pytest.mark.parametrize("dim", (12, 32, 256))
def test_bound_of_sums_as_tensor_cores_round(dim: int, width: int) -> None:
    """The bound holds if tensor cores truncate ``width`` products and the sum so far to the largest one's bits."""
    from alit_kernels.nearest_codeword.triton_ import rounding

    # High parts, as of rows scaled by a power of two.
    z, codes = ((x / x.abs().amax(1, keepdim=True)).half().double() for x in adversarial(dim))
    for code in codes:
        products = (z * code).split(width, 1)
        total = torch.zeros(len(z), dtype=torch.float64)
        for block in products:
            terms = torch.cat([total[:, None], block], 1)
            last = terms.abs().amax(1, keepdim=True).clamp(min=2.0**-200).log2().floor() - 23
            total = cut(terms, last).sum(1)
            total = cut(total, total.abs().clamp(min=2.0**-200).log2().floor() - 23)
        error = (total - z @ code).abs() / (z.norm(dim=1) * code.norm())
        assert float(error.max()) < 0.5 * rounding(dim, 1)


def test_search_of_many_codes(search: Search) -> None:
    """A codebook searched in parts gives the nearest code, and the lowest index of equal ones, from any part."""
    codebook = torch.randn(2200, 5)
    codebook[2100:] = codebook[:100]
    z = torch.cat([torch.randn(30, 5), codebook[::50] + 1e-4])
    assert_exact_nearest(search(z, codebook), z, codebook)


@pytest.mark.parametrize("precision", ("tf32", "bf16"))
@pytest.mark.parametrize("target", targets("triton")[1:])
def test_less_precise_search(target: Target, precision: str) -> None:
    """A less precise search finds a code within its tolerance of the nearest, and the exact one for exact inputs."""
    z, codebook, _ = make(Case(150, 300, 24), device=target.device)
    options = {"precision": precision, "implementation": target.implementation}
    index = nearest_codeword(z, codebook, **options)
    distance = (z[:, None] - codebook).square().sum(-1)
    chosen = distance.gather(1, index[:, None])[:, 0]
    assert bool((chosen <= distance.amin(1) + 2.0**-6 * codebook.norm(dim=1).max() ** 2).all())
    assert torch.equal(
        nearest_codeword(codebook, codebook, **options), torch.arange(300, device=target.device)
    )
    z[3] = torch.nan
    codebook[:] = torch.inf
    assert not nearest_codeword(z, codebook, **options).any()


@pytest.mark.parametrize("target", targets("cpp")[1:])
def test_search_of_many_rows_that_are_not_numbers(target: Target) -> None:
    """Rows with NaN get code 0 without the slow search of all codes."""
    z, codebook = torch.randn(20000, 16), torch.randn(4096, 16)
    z[torch.arange(20000), torch.arange(20000) % 16] = torch.nan

    def seconds(z: Tensor) -> float:
        start = time.perf_counter()
        nearest_codeword(z, codebook, implementation=target.implementation)
        return time.perf_counter() - start

    usual = min(seconds(z.nan_to_num()) for _ in range(3))
    assert not nearest_codeword(z, codebook, implementation=target.implementation).any()
    # Searching all codes in float64 would take dozens of times as long.
    assert min(seconds(z) for _ in range(3)) < 10 * usual


def test_search_where_float32_errs(search: Search) -> None:
    """The search is exact where float32 errs: ties, overflow and underflow of distances, a constant codebook."""
    z = torch.tensor([[0.0, 0.0, 0.0], [1.0, 1.0, 1.0], [3e38, 0.0, 0.0], [1e-40, 0.0, 0.0]])
    codebook = torch.tensor(
        [[0.3, 0.7, 0.1], [0.7, 0.1, 0.3], [0.1, 0.3, 0.7], [-3e38, 0.0, 0.0], [3e-40, 0.0, 0.0]]
    )
    for order in ([0, 1, 2, 3, 4], [2, 0, 1, 4, 3], [4, 3, 1, 2, 0]):
        for k in (3, 5):
            codes = codebook[[i for i in order if i < k]]
            assert_exact_nearest(search(z, codes), z, codes)
    # Codes of very different magnitude: the small ones vanish beside the large.
    far_apart = torch.tensor([2e-16, 1e-16, 0, 3e-16, *[1e30 * (2 + i) for i in range(14)]])
    near = torch.tensor([1.1e-16, 1.9e-16, 5e-16, 0.0, 2e30])
    assert search(near[:, None], far_apart[:, None]).tolist() == [1, 0, 3, 2, 4]
    small, lattice = (torch.randint(-2, 3, (rows, 4)).float() for rows in (60, 50))
    assert_exact_nearest(search(small, lattice), small, lattice)
    assert not search(small, torch.ones(40, 4)).any()


def doubtful(dim: int) -> tuple[Tensor, Tensor]:
    """Vectors with an obvious nearest code, and doubtful ones: between two codes, far outside, at the end of the range,
    equal to a code or two; first the obvious, then the doubtful, then mixed."""
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


@pytest.mark.parametrize("dim", (3, 12, 64))
def test_search_of_vectors_in_doubt(dim: int, search: Search) -> None:
    z, codebook = doubtful(dim)
    assert_exact_nearest(search(z, codebook), z, codebook)


@needs_core
@pytest.mark.parametrize("instruction_set", INSTRUCTION_SETS)
def test_search_with_every_instruction_set(
    instruction_set: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    best = extension().build_info()["instruction_set"]
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


@needs_core
def test_unknown_instruction_set(monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_search_under_autocast_is_in_float32() -> None:
    z, codebook, _ = make(Case(40, 30, 12))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        index = nearest_codeword(z.bfloat16(), codebook)
    assert torch.equal(index, nearest_codeword(z.bfloat16().float(), codebook))
