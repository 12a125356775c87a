"""Other libraries, one small adapter each, used as documented; raise :class:`Absent` if they cannot run here."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..harness.contest import DEVICE, Absent


def need(module: str, install: str) -> Any:
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise Absent(f"{error}; pip install {install}") from error


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """``torch.compile`` of an eager formulation; it compiles in the verifying call, which is not timed.

    Every contest starts with an empty cache (see ``conftest.py``).
    """
    return torch.compile(function, dynamic=False)


def faiss_search(z: Tensor, codebook: Tensor) -> Callable[[], Tensor]:
    """Call of FAISS's exact search, ``IndexFlatL2``, with as many threads as torch; returns indices (N,)."""
    if DEVICE != "cpu":
        raise Absent("faiss-cpu searches on the CPU")
    faiss = need("faiss", "faiss-cpu")
    faiss.omp_set_num_threads(torch.get_num_threads())
    index = faiss.IndexFlatL2(codebook.shape[1])
    index.add(codebook.numpy())
    queries = z.numpy()
    return lambda: torch.from_numpy(index.search(queries, 1)[1][:, 0])


def flash_kmeans_assign(z: Tensor, codebook: Tensor) -> Callable[[], Tensor]:
    """Call of flash-kmeans' assignment step, in its own precision of products; returns indices (N,)."""
    if DEVICE != "cuda":
        raise Absent("flash-kmeans needs a GPU")
    module = need("flash_kmeans.assign_euclid_triton", "flash-kmeans")
    assign = module.euclid_assign_triton
    return lambda: assign(z[None], codebook[None], z.square().sum(-1)[None])[0].long()


def vector_quantize_pytorch(
    codebook: Tensor, metric: str
) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    """Quantizer of vector-quantize-pytorch with its default moving-average codebook, initialized with ``codebook``.

    The function takes z (..., D) and returns quantized vectors and the loss.
    """
    module = need("vector_quantize_pytorch", "vector-quantize-pytorch")
    quantizer = module.VectorQuantize(
        dim=codebook.shape[1],
        codebook_size=codebook.shape[0],
        use_cosine_sim=metric == "cosine",
        commitment_weight=0.25,
        rotation_trick=False,
    ).to(codebook.device)
    with torch.no_grad():
        quantizer._codebook.embed.copy_(codebook[None])

    def quantize(z: Tensor) -> tuple[Tensor, Tensor]:
        quantized, _, loss = quantizer(z)
        return quantized, loss.sum()

    return quantize
