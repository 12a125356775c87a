"""A batch of sequences of different lengths, without padding.

Shows: `pack` drops the padding, `varlen_attention` attends within each sequence, `unpack` puts the padding back. The
result equals attention on the padded rows with a key mask, gradients too, and takes less time and fewer rows.

Run:  python docs/examples/ragged_batch.py
      python docs/examples/ragged_batch.py --sequences 4 --rounds 1  # a quick look
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from alit_kernels import pack, unpack, varlen_attention

HEADS, WIDTH, LONGEST = 8, 512, 256


def attend_padded(x: Tensor, lengths: Tensor) -> Tensor:
    """torch's attention on (B, N, C); rows beyond a length are set to zero."""
    inside = torch.arange(x.shape[1]) < lengths[:, None]
    q = x.unflatten(-1, (HEADS, -1)).transpose(1, 2)  # (B, H, N, D)
    out = F.scaled_dot_product_attention(q, q, q, attn_mask=inside[:, None, None])
    return out.transpose(1, 2).flatten(2) * inside[..., None]


def attend_packed(x: Tensor, lengths: Tensor) -> Tensor:
    """The same without the padding. The capacity is a bound: no sum of lengths is waited for."""
    packed, offsets = pack(x, lengths, capacity=x.shape[0] * x.shape[1])  # (T, C), (B + 1,)
    q = packed.unflatten(-1, (HEADS, -1))  # (T, H, D)
    out = varlen_attention(q, q, q, offsets, max_length=x.shape[1])
    return unpack(out.flatten(1), offsets, max_length=x.shape[1])  # (B, N, C)


def step(attend: Callable[[Tensor, Tensor], Tensor], x: Tensor, lengths: Tensor) -> list[Tensor]:
    """Output and gradient of the input."""
    x = x.detach().requires_grad_()
    out = attend(x, lengths)
    out.square().sum().backward()
    return [out.detach(), x.grad]


def seconds(attend: Callable[[Tensor, Tensor], Tensor], x: Tensor, lengths: Tensor) -> float:
    start = time.perf_counter()
    step(attend, x, lengths)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sequences", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    x = torch.randn(arguments.sequences, LONGEST, WIDTH)
    lengths = torch.randint(32, LONGEST + 1, (arguments.sequences,))
    print(f"lengths {lengths.tolist()}")
    print(f"rows {lengths.sum().item()} instead of {arguments.sequences * LONGEST}")
    padded, packed = (step(attend, x, lengths) for attend in (attend_padded, attend_packed))
    for name, a, b in zip(("output", "gradient"), padded, packed, strict=True):
        difference = (a - b).abs().max().item() / a.abs().max().item()
        print(f"{name}: largest difference {difference:.1e} of the largest value")
    times: dict[str, list[float]] = {"padded": [], "packed": []}
    for _ in range(arguments.rounds):  # in turns
        times["padded"].append(seconds(attend_padded, x, lengths))
        times["packed"].append(seconds(attend_packed, x, lengths))
    for name, found in times.items():
        print(f"{name}: {1e3 * statistics.median(found):.1f} ms forward and backward")


if __name__ == "__main__":
    main()
