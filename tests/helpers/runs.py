"""Every public function, forward and backward, at sizes at which many programs add to the same place, if any do."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

import alit_kernels as ak

LENGTHS = (65, 0, 130, 17)


def values(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, generator=generator)


def tensors(result: Any) -> list[Tensor]:
    if isinstance(result, Tensor):
        return [result]
    return [x for part in result if part is not None for x in tensors(part)]


def with_gradients(function: Callable[..., Any], *leaves: Tensor) -> Callable[[], list[Tensor]]:
    """Results of ``function``, and gradients of a weighted sum of those that have one."""
    weights: dict[int, Tensor] = {}

    def run() -> list[Tensor]:
        results = tensors(function(*leaves))
        total = torch.zeros((), device=leaves[0].device)
        for i, x in enumerate(results):
            if x.requires_grad:
                if i not in weights:
                    weights[i] = values(*x.shape, seed=1).to(x.device)
                total = total + (x.float() * weights[i]).sum()
        return [*(x.detach() for x in results), *torch.autograd.grad(total, leaves)]

    return run


def runs(device: str) -> dict[str, Callable[[], Iterable[Tensor]]]:
    def leaf(*shape: int, seed: int = 0) -> Tensor:
        return values(*shape, seed=seed).to(device).requires_grad_()

    lengths = torch.tensor(LENGTHS, device=device)
    offsets, rows, longest = ak.cumulative_offsets(lengths), sum(LENGTHS), max(LENGTHS)
    q, k, v = (leaf(rows, 2, 64, seed=i) for i in range(3))
    dense = [leaf(2, longest, 2, 64, seed=i) for i in range(3)]
    z, codebook, x = leaf(2048, 12), leaf(16, 12), leaf(rows, 32)
    index = torch.arange(2048, device=device) % 16
    target, keep = torch.arange(512, device=device) % 64, torch.arange(rows, device=device) % 3 > 0
    lse = torch.zeros(2, rows, device=device)
    return {
        "attention": with_gradients(lambda *qkv: ak.attention(*qkv), *dense),
        "varlen_attention": with_gradients(
            lambda *qkv: ak.varlen_attention(*qkv, offsets, max_length=longest), q, k, v
        ),
        "attention_map": lambda: tensors(
            ak.attention_map(
                *(q.detach(), k.detach(), lse, offsets),
                queries=range(16),
                keys=range(8),
                max_length=longest,
            )
        ),
        "nearest_codeword": lambda: [ak.nearest_codeword(z.detach(), codebook.detach())],
        "codebook_statistics": lambda: tensors(ak.codebook_statistics(index, z.detach(), 16)),
        "vector_quantize": with_gradients(lambda z, c: ak.vector_quantize(z, c), z, codebook),
        "soft_codebook": with_gradients(
            lambda x, c: ak.soft_codebook(x, c, target), leaf(512, 64), leaf(64, 32)
        ),
        "pack": with_gradients(
            lambda x: ak.pack(x, lengths, capacity=rows)[0], leaf(len(LENGTHS), longest, 32)
        ),
        "unpack": with_gradients(lambda x: ak.unpack(x, offsets, max_length=longest), x),
        "compact": with_gradients(lambda x: ak.compact(x, offsets, keep, capacity=rows)[0], x),
        "append": with_gradients(
            lambda x, r: ak.append(x, offsets, r, capacity=rows + 4 * 8)[0], x, leaf(8, 32)
        ),
        "tail_mask": with_gradients(
            lambda x, f: ak.tail_mask(x, lengths, f), leaf(len(LENGTHS), longest, 32), leaf(32)
        ),
        "cumulative_offsets": lambda: [ak.cumulative_offsets(lengths)],
    }
