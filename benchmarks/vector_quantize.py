"""Codeword search and a quantizer's training step on the CPU: ``python -m benchmarks.vector_quantize``.

Search: ours with each instruction set, the distance matrix in eager PyTorch, and FAISS (``pip install faiss-cpu``), at
the shapes of the op's cases. Rates count 2 N K D floating-point operations. Training step: the module beside eager
PyTorch as it is commonly written, with a one-hot matrix and without. Everything is verified before it is timed, runs in
turns, and is repeated ``--runs`` times; the file holds all runs.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
from collections.abc import Callable
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn.functional import mse_loss, normalize, one_hot

from alit_kernels import nearest_codeword
from alit_kernels._cpp import INSTRUCTION_SET_VARIABLE, INSTRUCTION_SETS, core
from alit_kernels.nn import VectorQuantizer
from alit_kernels.testing import assert_exact_nearest
from alit_kernels.vector_quantize.cases import BENCHMARK_CASES, Case, make

from .timing import peak_megabytes, take_turns, write

#: Those with a search of their own, the best first.
SEARCHES = ("avx512", "avx2", "baseline")
#: Tokens, codes and dimension of the training step: 32 pictures of 256 tokens.
STEP = Case(32 * 256, 4096, 12)


def ours(z: Tensor, codebook: Tensor, instruction_set: str) -> Tensor:
    os.environ[INSTRUCTION_SET_VARIABLE] = instruction_set
    try:
        return nearest_codeword(z, codebook, implementation="cpp")
    finally:
        del os.environ[INSTRUCTION_SET_VARIABLE]


def distance_matrix(z: Tensor, codebook: Tensor) -> Tensor:
    squares = z.square().sum(1, keepdim=True) + codebook.square().sum(1)
    return squares - 2 * (z @ codebook.t())


def search_contenders(z: Tensor, codebook: Tensor) -> dict[str, Callable[[], Any]]:
    order = INSTRUCTION_SETS.index
    best = order(core().build_info()["instruction_set"])
    contenders: dict[str, Callable[[], Any]] = {
        name: lambda name=name: ours(z, codebook, name) for name in SEARCHES if order(name) <= best
    }
    contenders["eager"] = lambda: distance_matrix(z, codebook).argmin(1)
    if importlib.util.find_spec("faiss") is not None:
        import faiss

        faiss.omp_set_num_threads(torch.get_num_threads())
        index = faiss.IndexFlatL2(z.shape[1])
        index.add(codebook.numpy())
        queries = z.numpy()
        contenders["faiss"] = lambda: index.search(queries, 1)
    return contenders


def search(rounds: int, threads: int) -> list[dict[str, Any]]:
    torch.set_num_threads(threads)
    rows = []
    for case in BENCHMARK_CASES:
        z, codebook, _ = make(case)
        contenders = search_contenders(z, codebook)
        for name in contenders.keys() & set(SEARCHES):
            some = torch.randperm(case.vectors)[:256]
            assert_exact_nearest(contenders[name]()[some], z[some], codebook)
        seconds = take_turns(contenders, rounds=rounds)
        operations = 2 * case.vectors * case.codes * case.dim
        rows.append(
            {
                "shape": f"{case.vectors} x {case.codes} x {case.dim}",
                "threads": threads,
                **{f"{name} ms": round(1e3 * value, 2) for name, value in seconds.items()},
                **{
                    f"{name} GFLOP/s": round(operations / value / 1e9)
                    for name, value in seconds.items()
                },
                "ours MB": round(peak_megabytes(next(iter(contenders.values()))), 1),
                "eager MB": round(peak_megabytes(contenders["eager"]), 1),
            }
        )
    return rows


def eager_step(z: Tensor, codebook: Tensor, with_one_hot: bool) -> Tensor:
    """A cosine quantizer as it is commonly written; returns loss plus a use of the quantized vectors."""
    u, e = normalize(z, dim=-1), normalize(codebook, dim=-1)
    rows = u.flatten(0, -2)
    index = distance_matrix(rows, e).argmin(1)
    q = one_hot(index, len(e)).to(e.dtype) @ e if with_one_hot else e[index]
    q = q.view(z.shape)
    loss = 0.25 * mse_loss(q.detach(), u) + mse_loss(q, u.detach())
    return loss + (u + (q - u).detach()).square().mean()


def step(rounds: int, threads: int) -> dict[str, Any]:
    torch.set_num_threads(threads)
    module = VectorQuantizer(STEP.codes, STEP.dim, metric="cosine")
    z = make(STEP).z.view(32, 256, STEP.dim).requires_grad_()
    codebook = module.embedding.weight

    def gradients(loss: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(loss, (z, codebook))

    def with_module() -> tuple[Tensor, ...]:
        result = module(z)
        return gradients(result.loss + result.quantized.square().mean())

    contenders = {
        "ours": with_module,
        "one-hot": lambda: gradients(eager_step(z, codebook, True)),
        "gather": lambda: gradients(eager_step(z, codebook, False)),
    }
    for name in ("one-hot", "gather"):
        torch.testing.assert_close(with_module(), contenders[name](), rtol=1e-3, atol=1e-7)
    seconds = take_turns(contenders, rounds=rounds)
    return {
        "threads": threads,
        **{f"{name} ms": round(1e3 * value, 2) for name, value in seconds.items()},
        "one-hot / ours": round(seconds["one-hot"] / seconds["ours"], 1),
        "gather / ours": round(seconds["gather"] / seconds["ours"], 1),
        **{f"{name} MB": round(peak_megabytes(call), 1) for name, call in contenders.items()},
    }


def show(title: str, rows: list[dict[str, Any]]) -> None:
    table = Table(*rows[0], title=title)
    for row in rows:
        table.add_row(*map(str, row.values()))
    Console(width=220).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--runs", type=int, default=3)
    arguments = parser.parse_args()
    runs = []
    for _ in range(arguments.runs):
        torch.manual_seed(0)
        searches = [row for threads in (2, 1) for row in search(arguments.rounds, threads)]
        steps = [step(arguments.rounds, threads) for threads in (2, 1)]
        runs.append({"search": searches, "step": steps})
        show("nearest codeword", searches)
        show("training step, 32 x 256 x 12, 4096 codes", steps)
    print(write("vector_quantize", {"runs": runs}))


if __name__ == "__main__":
    main()
