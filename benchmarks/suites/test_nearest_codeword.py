"""Nearest-codeword search: float32, exact, against distance matrices and other fused searches."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

from alit_kernels import nearest_codeword
from alit_kernels.vector_quantize.cases import BENCHMARK_CASES, Case, make

from ..harness.contest import DEVICE, Contest, Work
from ..peers import eager, libraries

CASES = (*BENCHMARK_CASES, *((Case(65536, 4096, 12),) if DEVICE == "cuda" else ()))
QUICK = Case(2048, 512, 12)

CONTENDERS: dict[str, Callable[[Tensor, Tensor], Callable[[], Tensor]]] = {
    "ours": lambda z, codebook: partial(nearest_codeword, z, codebook),
    "eager": lambda z, codebook: partial(eager.nearest_codeword, z, codebook),
    "torch.compile": lambda z, codebook: partial(
        libraries.compiled(eager.nearest_codeword), z, codebook
    ),
    "faiss": libraries.faiss_search,
    "flash-kmeans": libraries.flash_kmeans_assign,
}


def contest(case: Case) -> Contest:
    z, codebook, _ = make(case, device=DEVICE)
    # Both ends, and some between: the same ones in every run.
    some = torch.randperm(case.vectors, generator=torch.Generator().manual_seed(0))[:256]
    ends = torch.arange(-128, 128) % case.vectors
    rows = torch.cat([some, ends]).to(DEVICE)
    distance = torch.cdist(
        z[rows].double(), codebook.double(), compute_mode="donot_use_mm_for_euclid_dist"
    ).square()

    def verify(index: Tensor) -> None:
        # Peers round differently: what they choose may be farther by a thousandth. Ours is held to exactness in tests.
        chosen = distance.gather(1, index[rows, None])[:, 0]
        assert bool((chosen <= distance.amin(1) * 1.001).all()), "not the nearest codewords"

    size = (z.numel() + codebook.numel()) * 4 + case.vectors * 8
    return Contest(
        {name: partial(prepare, z, codebook) for name, prepare in CONTENDERS.items()},
        verify,
        Work(size, 2 * case.vectors * case.codes * case.dim),
    )


@pytest.mark.parametrize("name", CONTENDERS)
@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c.vectors}x{c.codes}x{c.dim}")
def test_nearest_codeword(case: Case, name: str, race: Callable, quick: bool) -> None:
    if quick and case != CASES[0]:
        pytest.skip("--quick runs one shape")
    case = QUICK if quick else case
    group = f"nearest_codeword {case.vectors} x {case.codes} x {case.dim}"
    race(group, name, lambda: contest(case))
