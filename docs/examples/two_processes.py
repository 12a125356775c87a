"""Train one quantizer with two processes on a CPU.

Shows: DDP around a model with `nn.VectorQuantizer`. Each process has images of its own; gradients are averaged by DDP,
counts and sums of the moving-average codebook by the module. At the end both processes have the same codebook.

Run:  torchrun --nproc-per-node 2 docs/examples/two_processes.py  # --steps 3: a quick look
"""

from __future__ import annotations

import argparse
import gc

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from alit_kernels.nn import VectorQuantizer


class Tokenizer(nn.Module):
    """4 x 4 pixels become one of 64 codes, and pixels again."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = nn.Linear(16, 4), nn.Linear(4, 16)
        self.quantizer = VectorQuantizer(64, 4, ema_decay=0.9)

    def forward(self, patches: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        result = self.quantizer(self.encoder(patches))
        return self.decoder(result.quantized), result.loss, result.index


def patches(count: int, generator: torch.Generator) -> Tensor:
    """(count, 16): ramps in random directions."""
    direction = torch.randn(count, 2, 1, generator=generator)
    y, x = torch.meshgrid(torch.linspace(-1, 1, 4), torch.linspace(-1, 1, 4), indexing="ij")
    return direction[:, 0] * y.flatten() + direction[:, 1] * x.flatten()


def train(steps: int) -> None:
    rank, world = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)  # the same weights in all processes
    model = DistributedDataParallel(Tokenizer())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    generator = torch.Generator().manual_seed(rank)  # other images in each
    for step in range(steps):
        images = patches(512, generator)
        reconstruction, loss, index = model(images)
        error = F.mse_loss(reconstruction, images)
        optimizer.zero_grad()
        (error + loss).backward()
        optimizer.step()
        if rank == 0 and step % max(steps // 5, 1) == 0:
            print(f"step {step:4}  error {error.item():.4f}  codes {len(index.unique())} of 64")
    model.module.quantizer.finish_update()  # the last step's sums, which may still be on their way
    mine = model.module.quantizer.embedding.weight.detach()
    found = [torch.empty_like(mine) for _ in range(world)]
    dist.all_gather(found, mine)
    if rank == 0:
        same = all(torch.equal(found[0], other) for other in found)
        print(f"{world} processes, the same codebook in each: {same}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=200)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    train(arguments.steps)
    gc.collect()  # the DDP wrapper is part of a cycle and holds the group, whose threads have to end first
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
