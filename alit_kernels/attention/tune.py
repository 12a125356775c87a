"""``python -m alit_kernels.attention.tune``: time launch configurations on this GPU and print their table.

For each entry of ``configurations.TABLE`` and the family of this GPU, candidates run on mixed lengths of a tokenizer
(289 to 513 tokens, 64 sequences, 8 heads), in turns; the fastest takes the entry's place where it is 2 % faster. A line
of the table is printed as soon as it is known. ``configurations.py`` is not changed: put the lines there, and ask
``python -m alit_kernels.aot --module alit_kernels.attention --check`` whether all that they serve compiles well.

All processors compile, before anything is timed.

``--rehearsal``, or REHEARSAL=1 in the environment: the same on the CPU, in Triton's interpreter, with a few tokens and
candidates. Its times mean nothing.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, suppress

import torch

from .configurations import KERNELS, TABLE, Tile, family, splits
from .op import _attention, _attention_backward

Key = tuple[str, int, int]

#: What a candidate must be faster by, to replace an entry.
GAIN = 1.02
#: A candidate that takes so many times as long as the fastest in the first round is out.
HOPELESS = 1.25
LENGTHS: tuple[int, ...] = tuple(range(289, 514, 32)) * 8


def candidates(key: Key) -> list[Tile]:
    """Tiles to try for an entry: of half precision, up to 128 columns; of float32 those of tensor cores, where factors
    are split (``splits``), else smaller ones; small ones of wide heads. Whatever spills or does not fit the shared
    memory falls out when it is timed.
    """
    _, head_dim, size = key
    if head_dim > 128:
        choices = itertools.product((16, 32, 64), (16, 32, 64), (4, 8), (1, 2), (True,))
    elif size == 2:
        stages = (1, 2, 3) if head_dim > 64 else (2, 3)
        choices = itertools.product((64, 128), (32, 64, 128), (4, 8), stages, (False, True))
    elif splits(head_dim, torch.float32):
        choices = itertools.product((32, 64, 128), (16, 32, 64), (4, 8), (1, 2, 3), (True,))
    else:
        choices = itertools.product((32,), (16, 32, 64), (8,), (1, 2, 3), (True,))
    return [Tile(*choice) for choice in choices]


def workload(
    key: Key, lengths: tuple[int, ...], heads: int, device: str
) -> Callable[[], tuple[torch.Tensor, ...]]:
    """A call that launches the kernel of ``key``; with the other kernel, for the two of the backward."""
    kernel, head_dim, size = key
    dtype, longest = torch.float32 if size == 4 else torch.float16, max(lengths)
    offsets = torch.tensor([0, *lengths], device=device).cumsum(0).int()
    shape = (sum(lengths), 4, heads, head_dim)
    q, k, v, grad_out = torch.randn(shape, device=device, dtype=dtype).unbind(1)
    layout = (offsets, None, longest, longest, None, None, head_dim**-0.5)
    out, lse = _attention(q, k, v, *layout, implementation="triton")
    if kernel == "forward":
        return lambda: _attention(q, k, v, *layout, implementation="triton")
    saved = (q, k, v, *layout, grad_out, None, out, lse, True)
    return lambda: _attention_backward(*saved, implementation="triton")


@contextmanager
def entry(key: Key, tile: Tile) -> Iterator[None]:
    """Within the context, the table holds ``tile`` for all architectures."""
    before = TABLE[key]
    TABLE[key] = (tile, tile, tile)
    try:
        yield
    finally:
        TABLE[key] = before


def seconds(call: Callable[[], object]) -> float:
    """Median on the GPU's clock with a cold L2; a single call on the host's clock without a GPU."""
    if torch.cuda.is_available():
        from triton.testing import do_bench

        return float(do_bench(call, warmup=5, rep=20, return_mode="median")) / 1e3
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def measure(
    key: Key, tiles: Iterable[Tile], call: Callable[[], object], rounds: int
) -> dict[Tile, float]:
    """Median seconds of each tile, taken in turns, without tiles that need more than the GPU has or far longer."""
    times: dict[Tile, list[float]] = {tile: [] for tile in tiles}
    for turn in range(rounds):
        if turn == 1:
            limit = HOPELESS * min(values[0] for values in times.values())
            times = {tile: values for tile, values in times.items() if values[0] <= limit}
        for tile in list(times):
            try:
                with entry(key, tile):
                    times[tile].append(seconds(call))
            except _too_large():
                del times[tile]
    return {tile: statistics.median(values) for tile, values in times.items()}


def _too_large() -> tuple[type[Exception], ...]:
    from triton.runtime.errors import OutOfResources, PTXASError

    return OutOfResources, PTXASError


def compile_once(key: Key, tile: Tile, lengths: tuple[int, ...], heads: int, device: str) -> None:
    """Fill Triton's cache, whose folder the processes share: compiling takes far longer than timing."""
    with entry(key, tile), suppress(*_too_large()):
        workload(key, lengths, heads, device)()


def best(current: Tile, times: Mapping[Tile, float]) -> Tile:
    """The fastest tile if it beats the current one, which may not run here, by more than ``GAIN``."""
    fastest = min(times, key=times.__getitem__, default=current)
    never = float("inf")
    return fastest if times.get(fastest, never) * GAIN < times.get(current, never) else current


def line(key: Key, tiles: Iterable[Tile]) -> str:
    """An entry as ``configurations.TABLE`` has it."""
    shown = ", ".join(f"Tile{dataclasses.astuple(tile)}" for tile in tiles)
    return f'    ("{key[0]}", {key[1]}, {key[2]}): ({shown}),'


def main(arguments: list[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(
        prog="python -m alit_kernels.attention.tune", description=__doc__
    )
    rehearsal = os.environ.get("REHEARSAL", "") not in ("", "0")
    parser.add_argument("--rehearsal", action="store_true", default=rehearsal)
    parser.add_argument("--kernel", action="append", choices=KERNELS, help="default: all")
    parser.add_argument("--head-dim", action="append", type=int, help="default: all of the table")
    options = parser.parse_args(arguments)
    if options.rehearsal:
        os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported, with the kernels
        place, some, rounds, workers = 0, 2, 1, 1
        work: tuple[tuple[int, ...], int, str] = (5, 17), 1, "cpu"
    elif not torch.cuda.is_available():
        parser.error("no GPU: --rehearsal tries the script out on the CPU")
    else:
        place = family(10 * torch.cuda.get_device_capability()[0])
        some, rounds, workers = 1000, 5, min(14, os.cpu_count() or 1)
        work = LENGTHS, 8, "cuda"
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        for key, tiles in TABLE.items():
            if key[0] not in (options.kernel or KERNELS):
                continue
            if key[1] not in (options.head_dim or [key[1]]):
                continue
            tried = list(dict.fromkeys([tiles[place], *candidates(key)]))[:some]
            tasks = [(key, tile, *work) for tile in tried]
            list(pool.map(compile_once, *zip(*tasks, strict=True)))
            times = measure(key, tried, workload(key, *work), rounds)
            chosen = best(tiles[place], times)
            found = [chosen if i == place else tile for i, tile in enumerate(tiles)]
            spent = [f"{times[t] * 1e6:.0f} us" for t in (chosen, tiles[place]) if t in times]
            print(f"{line(key, found)}  # {', before '.join(spent)}", flush=True)


if __name__ == "__main__":
    main()
