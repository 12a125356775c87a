"""Ragged ops against a fresh copy of as many bytes and against eager formulations: ``python -m benchmarks.ragged``.

64 sequences of up to 513 rows of 1024 float32. Every output is fresh, as it is in use.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

import alit_kernels as ak

from .timing import take_turns, write

SEQUENCES, LONGEST, WIDTH, ADDED = 64, 513, 1024, 32
LENGTHS = {
    "all 513": [LONGEST] * SEQUENCES,
    "289 to 513": [257 + 32 * (i % 8 + 1) for i in range(SEQUENCES)],
}


def contenders(
    lengths: list[int], device: str
) -> dict[str, tuple[Callable[[], Tensor], Callable[[], Tensor]]]:
    """Op -> (ours, eager), both without arguments."""
    padded = torch.randn(len(lengths), LONGEST, WIDTH, device=device)
    lengths_B = torch.tensor(lengths, device=device)
    total = sum(lengths)
    packed, offsets = ak.pack(padded, lengths_B, capacity=total)
    inside = torch.arange(LONGEST, device=device) < lengths_B[:, None]
    keep = torch.rand(total, device=device) > 0.25
    kept = int(keep.sum())
    fresh, fill = torch.randn(ADDED, WIDTH, device=device), torch.randn(WIDTH, device=device)
    half = lengths_B // 2
    tail = (torch.arange(LONGEST, device=device) >= half[:, None])[..., None]

    def grown() -> Tensor:
        pieces = packed.split(lengths)
        return torch.cat([part for piece in pieces for part in (piece, fresh)])

    capacity = total + len(lengths) * ADDED
    return {
        "pack": (
            lambda: ak.pack(padded, lengths_B, capacity=total)[0],
            lambda: padded[inside],
        ),
        "unpack": (
            lambda: ak.unpack(packed, offsets, max_length=max(lengths)),
            lambda: pad_sequence(packed.split(lengths), batch_first=True),
        ),
        "compact": (
            lambda: ak.compact(packed, offsets, keep, capacity=kept)[0],
            lambda: packed[keep],
        ),
        "append": (lambda: ak.append(packed, offsets, fresh, capacity=capacity)[0], grown),
        "tail_mask": (
            lambda: ak.tail_mask(padded, half, fill),
            lambda: torch.where(tail, fill, padded),
        ),
    }


def run(device: str, rounds: int) -> list[dict[str, Any]]:
    results = []
    for name, lengths in LENGTHS.items():
        torch.manual_seed(0)
        for op, (ours, eager) in contenders(lengths, device).items():
            result = ours()
            if not torch.equal(result, eager()):
                raise AssertionError(f"{op}: differs from the eager formulation")
            source = torch.zeros_like(result)
            del result
            times = take_turns({"ours": ours, "copy": source.clone, "eager": eager}, rounds=rounds)
            results.append(
                {
                    "op": op,
                    "lengths": name,
                    "megabytes": round(source.numel() * 4 / 1e6, 1),
                    **{f"{key}_ms": round(1e3 * seconds, 2) for key, seconds in times.items()},
                    "times_copy": round(times["ours"] / times["copy"], 3),
                    "eager_times_ours": round(times["eager"] / times["ours"], 2),
                }
            )
            del source
    return results


def main() -> None:
    torch.set_num_threads(2)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    results = run(device, rounds=7)
    table = Table(*results[0], title=f"ragged ops on {device}, fresh outputs, milliseconds")
    for row in results:
        table.add_row(*map(str, row.values()))
    Console().print(table)
    print(write("ragged", {"device": device, "rows": results}))


if __name__ == "__main__":
    main()
