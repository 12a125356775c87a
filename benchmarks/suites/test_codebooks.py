"""Codebook ops, float32: exact nearest-codeword search, statistics for moving averages, a quantizer, entropies."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

from alit_kernels import (
    CodebookEntropy,
    VectorQuantized,
    codebook_entropy,
    codebook_statistics,
    nearest_codeword,
)
from alit_kernels.codebook_entropy import cases as entropy_cases
from alit_kernels.nn import VectorQuantizer
from alit_kernels.vector_quantize.cases import BENCHMARK_CASES, Case, make

from ..harness.contest import DEVICE, Contest, Work, ready
from ..peers import eager, libraries

QUICK = Case(2048, 512, 12)
SEARCHES = (*BENCHMARK_CASES, *((Case(65536, 4096, 12),) if DEVICE == "cuda" else ()))
#: 32 images of 256 tokens.
STEP = Case(32 * 256, 4096, 12)
SEARCHERS: dict[str, Callable[[Tensor, Tensor], Callable[[], Tensor]]] = {
    "ours": lambda z, codebook: partial(nearest_codeword, z, codebook),
    "eager": lambda z, codebook: partial(eager.nearest_codeword, z, codebook),
    "torch.compile": lambda z, codebook: partial(
        libraries.compiled(eager.nearest_codeword), z, codebook
    ),
    "faiss": libraries.faiss_search,
    "flash-kmeans": libraries.flash_kmeans_assign,
}
COUNTERS: dict[str, Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor]]] = {
    "ours": codebook_statistics,
    "eager, one-hot": eager.statistics_with_one_hot,
    "eager, index_add": eager.statistics_with_index_add,
}


def search(case: Case) -> Contest:
    z, codebook, _ = make(case, device=DEVICE)
    # Verified rows: both ends and 256 random ones, the same in every run.
    some = torch.randperm(case.vectors, generator=torch.Generator().manual_seed(0))[:256]
    ends = torch.arange(-128, 128) % case.vectors
    rows = torch.cat([some, ends]).to(DEVICE)
    distance = torch.cdist(
        z[rows].double(), codebook.double(), compute_mode="donot_use_mm_for_euclid_dist"
    ).square()

    def verify(index: Tensor) -> None:
        # Peers round differently: their codewords may be farther by a thousandth. Tests check that ours is exact.
        chosen = distance.gather(1, index[rows, None])[:, 0]
        assert bool((chosen <= distance.amin(1) * 1.001).all()), "not the nearest codewords"

    size = (z.numel() + codebook.numel()) * 4 + case.vectors * 8
    return Contest(
        {name: partial(prepare, z, codebook) for name, prepare in SEARCHERS.items()},
        verify,
        Work(size, 2 * case.vectors * case.codes * case.dim),
    )


def statistics(case: Case) -> Contest:
    z, _, _ = make(case, device=DEVICE)
    index = torch.randint(case.codes, (case.vectors,), device=DEVICE)
    expected = eager.statistics_with_index_add(index, z, case.codes)
    return Contest(
        ready({name: partial(f, index, z, case.codes) for name, f in COUNTERS.items()}),
        partial(torch.testing.assert_close, expected=expected, rtol=1e-4, atol=1e-4),
        Work(4 * (z.numel() + case.codes * (case.dim + 1)) + 8 * case.vectors, z.numel()),
    )


def each(cases: tuple[Case, ...]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("case", cases, ids=lambda c: f"{c.vectors}x{c.codes}x{c.dim}")


@pytest.fixture
def size(case: Case, quick: bool) -> Case:
    """The case; with ``--quick`` a small one instead of the first, and the others are skipped."""
    if quick and case != BENCHMARK_CASES[0]:
        pytest.skip("--quick runs one shape")
    return QUICK if quick else case


@pytest.mark.parametrize("name", SEARCHERS)
@each(SEARCHES)
def test_nearest_codeword(size: Case, name: str, race: Callable) -> None:
    group = f"nearest_codeword {size.vectors} x {size.codes} x {size.dim}"
    race(group, name, lambda: search(size))


@pytest.mark.parametrize("name", COUNTERS)
@each(BENCHMARK_CASES[::2])
def test_codebook_statistics(size: Case, name: str, race: Callable) -> None:
    group = f"codebook_statistics {size.vectors} x {size.codes} x {size.dim}"
    race(group, name, lambda: statistics(size))


Step = Callable[[], tuple[Tensor, ...]]


def gradients(loss: Callable[[], Tensor], *leaves: Tensor) -> Step:
    def step() -> tuple[Tensor, ...]:
        total = loss()
        return total.detach(), *torch.autograd.grad(total, leaves)

    return step


def total(result: VectorQuantized) -> Tensor:
    return result.loss + result.quantized.square().mean()


def ours(z: Tensor, codebook: Tensor) -> Step:
    module = VectorQuantizer(*codebook.shape, metric="cosine").to(z.device)
    module.embedding.weight = torch.nn.Parameter(codebook.detach().clone())
    return gradients(lambda: total(module(z)), z, module.embedding.weight)


def eager_loss(z: Tensor, codebook: Tensor, with_one_hot: bool) -> Tensor:
    return total(eager.vector_quantize(z, codebook, "cosine", with_one_hot=with_one_hot))


def in_eager(loss: Callable[..., Tensor], with_one_hot: bool, z: Tensor, codebook: Tensor) -> Step:
    return gradients(lambda: loss(z, codebook, with_one_hot), z, codebook)


def library(z: Tensor, codebook: Tensor) -> Step:
    quantize = libraries.vector_quantize_pytorch(codebook, "cosine")

    def loss() -> Tensor:
        quantized, own = quantize(z)
        return own + quantized.square().mean()

    return gradients(loss, z)


QUANTIZERS: dict[str, Callable[[Tensor, Tensor], Step]] = {
    "ours": ours,
    "eager, one-hot": partial(in_eager, eager_loss, True),
    "eager, gather": partial(in_eager, eager_loss, False),
    "torch.compile": lambda *inputs: in_eager(libraries.compiled(eager_loss), False, *inputs),
    "vector-quantize-pytorch": library,
}


def quantizer(case: Case) -> Contest:
    """Contest of a quantizer's forward and backward, with cosine metric and learned codebook."""
    z, codebook, _ = make(case, device=DEVICE)
    z = z.view(-1, 256, case.dim).requires_grad_()
    codebook.requires_grad_()
    expected = QUANTIZERS["eager, gather"](z, codebook)()

    def verify(found: tuple[Tensor, ...]) -> None:
        # The library weights its losses differently: only the shape and finiteness of its gradient can be checked.
        if len(found) == 2:
            assert found[1].shape == z.shape and bool(found[1].isfinite().all())
        else:
            torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-7)

    return Contest(
        {name: partial(prepare, z, codebook) for name, prepare in QUANTIZERS.items()},
        verify,
        Work(4 * (3 * z.numel() + 2 * codebook.numel()), 2 * case.vectors * case.codes * case.dim),
    )


@pytest.mark.parametrize("name", QUANTIZERS)
def test_vector_quantizer_step(name: str, race: Callable, quick: bool) -> None:
    case = QUICK if quick else STEP
    group = f"VectorQuantizer step {case.vectors} x {case.codes} x {case.dim}"
    race(group, name, lambda: quantizer(case))


#: LlamaGen's entropy loss: 16 images of 256 tokens.
ENTROPIES_CASE = entropy_cases.BENCHMARK_CASES[0]
SMALL_ENTROPIES = entropy_cases.Case(QUICK, ENTROPIES_CASE.temperature)
ENTROPIES: dict[str, Callable[[], Callable[..., CodebookEntropy]]] = {
    "ours": lambda: codebook_entropy,
    "eager": lambda: eager.codebook_entropy,
    "torch.compile": lambda: libraries.compiled(eager.codebook_entropy),
}


def entropies(case: entropy_cases.Case) -> Contest:
    """Contest of the codebook entropies, forward and backward."""
    vectors = case.vectors
    z, codebook, _ = make(vectors, device=DEVICE)
    leaves = z.requires_grad_(), codebook.requires_grad_()

    def step(function: Callable[..., CodebookEntropy]) -> Step:
        options = {"temperature": case.temperature, "metric": "cosine", "epsilon": 1e-5}

        def loss() -> Tensor:
            sample, batch = function(*leaves, **options)
            return sample - batch

        return gradients(loss, *leaves)

    expected = step(eager.codebook_entropy)()
    return Contest(
        {name: lambda f=function: step(f()) for name, function in ENTROPIES.items()},
        partial(torch.testing.assert_close, expected=expected, rtol=1e-3, atol=1e-6),
        Work(
            8 * (z.numel() + codebook.numel()),
            10 * vectors.vectors * vectors.codes * vectors.dim,
        ),
    )


@pytest.mark.parametrize("name", ENTROPIES)
def test_codebook_entropy_step(name: str, race: Callable, quick: bool) -> None:
    case = SMALL_ENTROPIES if quick else ENTROPIES_CASE
    size = case.vectors
    group = f"codebook_entropy step {size.vectors} x {size.codes} x {size.dim}"
    race(group, name, lambda: entropies(case))
