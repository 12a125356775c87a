"""nearest_codeword: exact whatever the data, in every implementation."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import NamedTuple

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
ByProducts = Callable[..., tuple[Tensor, Tensor]]


class Search(NamedTuple):
    """The search in one implementation, where that runs; its index on the CPU."""

    implementation: str
    device: str

    def __call__(self, z: Tensor, codebook: Tensor, metric: str = "euclidean") -> Tensor:
        z, codebook = z.to(self.device), codebook.to(self.device)
        return nearest_codeword(
            z, codebook, metric=metric, implementation=self.implementation
        ).cpu()

    def unit(self, x: Tensor) -> Tensor:
        """What it searches for "cosine": Triton's kernels normalise in float64, and round."""
        wide = torch.float64 if self.implementation == "triton" else torch.float32
        return normalize(x.to(wide), dim=-1).float()


@pytest.fixture(params=targets("cpp", "triton"))
def search(request: pytest.FixtureRequest) -> Search:
    return Search(*request.param)


@pytest.fixture(params=targets("triton")[1:])
def by_products(request: pytest.FixtureRequest) -> ByProducts:
    """The search by products alone: index, and whether that is in doubt."""
    triton_ = pytest.importorskip("alit_kernels.nearest_codeword.triton_")
    device = request.param.device

    def run(z: Tensor, codebook: Tensor) -> tuple[Tensor, Tensor]:
        index = torch.full((len(z),), -1, device=device)
        doubt = torch.zeros(len(z), dtype=torch.bool, device=device)
        wanted = {"cosine": False, "columns": False, "norms": True}
        searched = triton_.prepare(z.to(device), codebook.to(device), **wanted)
        triton_.by_products(searched, None, index, doubt)
        return index.cpu(), doubt.cpu()

    return run


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
    # Ties take the lowest index; NaN never wins; all NaN gives 0; an infinite distance beats a NaN one.
    assert index.tolist() == [1, 0, 1, 1]
    assert_exact_nearest(index, z, codebook)
    # Codes beyond the range of squares of float32 are still codes.
    far = pad(torch.tensor([[0.0], [2.7e19], [nan], [-2.6e19]]), (0, more))
    near = pad(torch.tensor([[1.8e19], [1.0], [-1.7e19]]), (0, more))
    assert search(near, far).tolist() == [1, 0, 3]


def test_products_say_which_rows_are_in_doubt(by_products: ByProducts) -> None:
    """Few of ordinary data, and every row whose index is wrong; all where rounding may decide, or nothing is known."""
    z, codebook, _ = make(Case(200, 150, 24))
    index, doubt = by_products(z, codebook)
    assert doubt.sum() < 20
    assert_exact_nearest(index[~doubt], z[~doubt], codebook)
    for name, vectors, codes in (
        ("ties", z, torch.cat([codebook, codebook])),
        ("a common offset", 1e6 + z, 1e6 + codebook),
        ("underflow", 2.0**-55 * z, 2.0**-55 * codebook),
        ("overflow", 1e25 * z, codebook),
        ("overflow", z, 1e25 * codebook),
    ):
        assert by_products(vectors, codes)[1].all(), name
    z[::2, 3] = torch.nan
    expected = doubt | (torch.arange(200) % 2 == 0)
    assert torch.equal(by_products(z, codebook)[1] | doubt, expected)
    one, doubt = by_products(z[1::2], codebook[:1])
    assert not one.any() and not doubt.any()


@pytest.mark.parametrize(("errors", "certain"), ((0.5, False), (1.5, False), (3.0, True)))
def test_products_are_believed_from_twice_their_error_on(
    errors: float, certain: bool, by_products: ByProducts
) -> None:
    """Of two codes, the second is so many times the bound of the error behind the first."""
    from alit_kernels.nearest_codeword.triton_ import products_error

    generator = torch.Generator().manual_seed(0)
    z, first = torch.randn(2, 24, generator=generator, dtype=torch.float64)
    radius, gap = first.norm(), (first - z).norm()
    bound = products_error(24) * (z.norm() * radius + radius**2 / 2)
    second = first + errors * bound / gap * (first - z) / gap
    _, doubt = by_products(z[None].float(), torch.stack([first, second]).float())
    assert bool(doubt) is not certain


@pytest.mark.parametrize("dim", (24, 256))
def test_no_wrong_index_is_believed(dim: int, by_products: ByProducts) -> None:
    """Of two codes whose scores differ by 2^-28 to 2^-10 of |z| |c| + |c|^2 / 2; on a GPU by its own products."""
    generator = torch.Generator().manual_seed(dim)
    z, first = torch.randn(2, 150, dim, generator=generator, dtype=torch.float64)
    radius = first.norm(dim=1)
    gaps = torch.logspace(-28, -10, 150, base=2) * (z.norm(dim=1) * radius + radius**2 / 2)
    wrong, believed = 0, 0
    for one, code, gap in zip(z, first, gaps, strict=True):
        away = (code - one) / (code - one).norm()
        codebook = torch.stack([code + gap / (code - one).norm() * away, code]).float()
        vector = one[None].float()
        index, doubt = by_products(vector, codebook)
        distance = (codebook.double() - vector.double()).square().sum(1)
        believed += not doubt
        wrong += not doubt and int(index) != int(distance.argmin())
    assert wrong == 0 and believed > 5


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


def test_search_where_float32_errs(search: Search) -> None:
    """Ties that only float64 sees, distances that overflow or underflow, and a codebook of one value."""
    z = torch.tensor([[0.0, 0.0, 0.0], [1.0, 1.0, 1.0], [3e38, 0.0, 0.0], [1e-40, 0.0, 0.0]])
    codebook = torch.tensor(
        [[0.3, 0.7, 0.1], [0.7, 0.1, 0.3], [0.1, 0.3, 0.7], [-3e38, 0.0, 0.0], [3e-40, 0.0, 0.0]]
    )
    for order in ([0, 1, 2, 3, 4], [2, 0, 1, 4, 3], [4, 3, 1, 2, 0]):
        for k in (3, 5):
            codes = codebook[[i for i in order if i < k]]
            assert_exact_nearest(search(z, codes), z, codes)
    # Codes of very different magnitude, of which the small ones are nothing beside the large.
    far_apart = torch.tensor([2e-16, 1e-16, 0, 3e-16, *[1e30 * (2 + i) for i in range(14)]])
    near = torch.tensor([1.1e-16, 1.9e-16, 5e-16, 0.0, 2e30])
    assert search(near[:, None], far_apart[:, None]).tolist() == [1, 0, 3, 2, 4]
    small, lattice = (torch.randint(-2, 3, (rows, 4)).float() for rows in (60, 50))
    assert_exact_nearest(search(small, lattice), small, lattice)
    assert not search(small, torch.ones(40, 4)).any()


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
