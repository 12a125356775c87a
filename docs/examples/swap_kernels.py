"""Swap the attention and the quantizer of a tokenizer in one line.

Shows: `alit_kernels.accelerate` on a tokenizer that was written without this library: its report, that outputs and
keys of the state dict stay, what a training step takes before and after, and the way back.

Run:  python docs/examples/swap_kernels.py
      python docs/examples/swap_kernels.py --codes 256 --rounds 1  # a quick look
"""

from __future__ import annotations

import argparse
import statistics
import time
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import alit_kernels


class VectorQuantizer2(nn.Module):
    """The interface of taming-transformers' quantizer, in eager PyTorch: a distance for each pair is in memory."""

    def __init__(self, n_e: int, e_dim: int, beta: float = 0.25) -> None:
        super().__init__()
        self.n_e, self.e_dim, self.beta, self.embedding = n_e, e_dim, beta, nn.Embedding(n_e, e_dim)
        self.legacy, self.sane_index_shape, self.remap = True, False, None

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor, tuple[None, None, Tensor]]:
        z = z.permute(0, 2, 3, 1)  # from (B, C, H, W)
        index = torch.cdist(z.reshape(-1, self.e_dim), self.embedding.weight).argmin(1)
        q = self.embedding(index).view(z.shape)
        loss = F.mse_loss(q.detach(), z) + self.beta * F.mse_loss(q, z.detach())
        return (z + (q - z).detach()).permute(0, 3, 1, 2).contiguous(), loss, (None, None, index)


class Tokenizer(nn.Module):
    def __init__(self, num_codes: int, width: int = 256) -> None:
        super().__init__()
        self.patch, self.attn = nn.Conv2d(3, width, 8, 8), nn.MultiheadAttention(width, 4)
        self.into, self.quantize = nn.Linear(width, 8), VectorQuantizer2(num_codes, 8)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        x = self.patch(images).flatten(2).permute(2, 0, 1)  # (N, B, C)
        x = x + self.attn(x, x, x, need_weights=False)[0]
        return self.quantize(self.into(x).permute(1, 2, 0)[..., None])[:2]


def step_seconds(model: Tokenizer, images: Tensor, rounds: int) -> float:
    """Median of forward and backward; the first round warms up."""
    times = []
    for _ in range(rounds + 1):
        sum(x.square().mean() for x in model(images)).backward()
        times.append(time.perf_counter())
    return statistics.median(b - a for a, b in pairwise(times))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--codes", type=int, default=8192)
    parser.add_argument("--rounds", type=int, default=5)
    arguments, _ = parser.parse_args(), torch.manual_seed(0)
    model, images = Tokenizer(arguments.codes), torch.rand(4, 3, 128, 128)
    keys, outputs = list(model.state_dict()), model(images)[0]
    before = step_seconds(model, images, arguments.rounds)
    print(report := alit_kernels.accelerate(model))
    difference, same = (model(images)[0] - outputs).abs().max(), list(model.state_dict()) == keys
    print(f"largest difference of outputs {difference.item():.1e}, same keys: {same}")
    after = step_seconds(model, images, arguments.rounds)
    print(f"training step: {1e3 * before:.1f} ms before, {1e3 * after:.1f} ms after")
    report.undo()
    print(f"undone: {type(model.attn).__name__}, {type(model.quantize).__name__}")


if __name__ == "__main__":
    main()
