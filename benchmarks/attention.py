"""Attention over mixed lengths on the CPU, forward and backward: ``python -m benchmarks.attention``.

32 pictures of 32 to 256 latents, alone and with the class token and 256 image tokens that an encoder sees beside them;
width 512, 8 heads, float32. Packed rows, by our kernel and by one call of torch's fused attention for each sequence,
against torch's fused attention on padded rows with a key mask, the longest sequence being the padded length. Queries,
keys and values are read in place, as views of one projection, whose gradient is the result; "separate" gives each
side one contiguous tensor for each of them instead. Verified before timing, in turns, with one thread and with two; the
file holds every median.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from alit_kernels import cumulative_offsets, pack, varlen_attention

from .timing import peak_megabytes, take_turns, write

PICTURES, HEADS, HEAD_DIM = 32, 8, 64
LATENTS = (32, 256)
#: Name -> tokens beside the latents.
WORKLOADS = {"latents": 0, "latents and image": 257}


def contenders(lengths: Tensor) -> dict[str, Callable[[], list[Tensor]]]:
    """Name -> call that returns packed output and packed gradients of q, k and v."""
    longest, capacity = int(lengths.max()), int(lengths.sum())
    offsets = cumulative_offsets(lengths)
    generator = torch.Generator().manual_seed(0)
    shape = (PICTURES, longest, 3, HEADS, HEAD_DIM)
    padded = torch.randn(shape, generator=generator)
    packed = pack(padded, lengths, capacity=capacity)[0]
    weight = torch.randn(PICTURES, longest, HEADS, HEAD_DIM, generator=generator)
    packed_weight = pack(weight, lengths, capacity=capacity)[0]
    weight = torch.where((torch.arange(longest) < lengths[:, None])[..., None, None], weight, 0.0)
    mask = (torch.arange(longest) < lengths[:, None])[:, None, None]

    def attend(implementation: str, *qkv: Tensor) -> Tensor:
        out = varlen_attention(*qkv, offsets, max_length=longest, implementation=implementation)
        assert isinstance(out, Tensor)
        return out

    def fused(implementation: str) -> list[Tensor]:
        qkv = packed.requires_grad_()
        out = attend(implementation, *qkv.unbind(1))
        return [out.detach(), *torch.autograd.grad(out, qkv, packed_weight)[0].unbind(1)]

    packed_separate = [x.contiguous().requires_grad_() for x in packed.detach().unbind(1)]

    def separate_packed() -> list[Tensor]:
        out = attend("cpp", *packed_separate)
        return [out.detach(), *torch.autograd.grad(out, packed_separate, packed_weight)]

    def in_place() -> list[Tensor]:
        qkv = padded.requires_grad_()
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        out = scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)
        return [out.detach(), *torch.autograd.grad(out, qkv, weight)[0].unbind(2)]

    separate = [x.transpose(1, 2).contiguous().requires_grad_() for x in padded.unbind(2)]

    def contiguous() -> list[Tensor]:
        out = scaled_dot_product_attention(*separate, attn_mask=mask).transpose(1, 2)
        return [
            out.detach(),
            *(x.transpose(1, 2) for x in torch.autograd.grad(out, separate, weight)),
        ]

    return {
        "packed": functools.partial(fused, "cpp"),
        "packed, torch": functools.partial(fused, "torch"),
        "padded, torch": in_place,
        "packed, separate": separate_packed,
        "padded, torch, separate": contiguous,
    }


def verify(calls: dict[str, Callable[[], list[Tensor]]], lengths: Tensor) -> None:
    expected = calls["packed"]()
    for name in [name for name in calls if name != "packed"]:
        for ours, theirs in zip(expected, calls[name](), strict=True):
            padded = theirs.shape[0] == len(lengths)
            rows = pack(theirs.contiguous(), lengths, capacity=len(ours))[0] if padded else theirs
            torch.testing.assert_close(ours, rows, rtol=1e-4, atol=1e-4, msg=name)


def run(fixed: int, rounds: int) -> dict[str, Any]:
    low, high = LATENTS
    generator = torch.Generator().manual_seed(0)
    lengths = fixed + torch.randint(low, high + 1, (PICTURES,), generator=generator)
    calls = contenders(lengths)
    verify(calls, lengths)
    padded_work = PICTURES * int(lengths.max()) ** 2 / int(lengths.square().sum())
    results: dict[str, Any] = {"lengths": lengths.tolist(), "padded / true work": padded_work}
    for threads in (1, 2):
        torch.set_num_threads(threads)
        results[f"{threads} threads"] = take_turns(calls, rounds=rounds)
    results["peak_megabytes"] = {name: peak_megabytes(call) for name, call in calls.items()}
    return results


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.attention", description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    rounds = parser.parse_args().rounds
    results = {name: run(fixed, rounds) for name, fixed in WORKLOADS.items()}
    table = Table("workload", "", "1 thread", "2 threads", "peak MB", title="seconds (relative)")
    for workload, result in results.items():
        for name, peak in result["peak_megabytes"].items():
            seconds = [result[f"{threads} threads"] for threads in (1, 2)]
            cells = [f"{s[name]:.3f} ({s[name] / s['packed']:.2f})" for s in seconds]
            table.add_row(workload, name, *cells, f"{peak:.0f}")
    Console().print(table)
    print(write("attention", results))


if __name__ == "__main__":
    main()
