"""``python -m alit_kernels.attention.tune``: time launch configurations on this GPU and print their table.

For each entry of ``configurations.TABLE`` and the family of this GPU, candidates run on mixed lengths of a tokenizer
(289 to 513 tokens, 64 sequences, 8 heads), in turns, by the clock of the benchmarks: replays of CUDA graphs with a cold
L2. A tile takes the entry's place where its results are those of the reference, where it is 3 % faster, and faster by
more than twice the spread, the interquartile range of the turns. A line of the table is printed as soon as it is known,
and ``--json FILE`` keeps all times; what is in it already is not timed again. ``configurations.py`` is not changed: put
the lines there, and ask ``python -m alit_kernels.aot --module alit_kernels.attention --check`` whether all that they
serve compiles well.

All processors compile, before anything is timed.

``--rehearsal``, or REHEARSAL=1 in the environment: the same on the CPU, in Triton's interpreter, with a few tokens and
candidates. Its times mean nothing.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import multiprocessing
import os
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .._clock import clocks, samples_in_turns, spread
from . import reference
from .configurations import FAMILIES, KERNELS, TABLE, Tile, family, splits
from .problem import Problem

Key = tuple[str, int, int]
Call = Callable[[], Sequence[Tensor]]

#: Factor by which a candidate must be faster to replace an entry.
GAIN = 1.03
#: Least difference between candidate and entry, in multiples of the spread.
SPREADS = 2
#: Candidates that take more than this many times as long as the fastest in the first round drop out.
HOPELESS = 1.25
#: Head dimensions that come first: those of the published sizes.
FIRST = (64,)
#: Largest error over the largest value, by bytes of an element.
TOLERANCES = {2: 5e-3, 4: 1e-4}
LENGTHS: tuple[int, ...] = tuple(range(289, 514, 32)) * 8


def candidates(key: Key, architecture: int) -> list[Tile]:
    """Tiles to try for an entry: in half precision, up to 128 columns; in float32 those of tensor cores, where factors
    are split (``splits``), else smaller ones; small ones for wide heads. Whatever spills or does not fit the shared
    memory falls out when it is timed.
    """
    _, head_dim, size = key
    if head_dim > 128:
        choices = itertools.product((16, 32, 64), (16, 32, 64), (4, 8), (1, 2), (True,))
    elif size == 2:
        stages = (1, 2, 3) if head_dim > 64 else (2, 3)
        choices = itertools.product((64, 128), (32, 64, 128), (4, 8), stages, (False, True))
    elif splits(head_dim, torch.float32, architecture):
        choices = itertools.product((32, 64, 128), (16, 32, 64), (4, 8), (1, 2, 3), (True,))
    else:
        choices = itertools.product((32,), (16, 32, 64), (8,), (1, 2, 3), (True,))
    return [Tile(*choice) for choice in choices]


def workload(key: Key, lengths: tuple[int, ...], heads: int, device: str) -> tuple[Call, Call]:
    """Two calls: one launches the kernel of ``key`` (both kernels for the backward), the other computes the reference.

    The implementation is called itself: a call of the op would be remembered with the tile that it had first.
    """
    from . import triton_

    kernel, head_dim, size = key
    dtype, longest = torch.float32 if size == 4 else torch.float16, max(lengths)
    offsets = torch.tensor([0, *lengths], device=device).cumsum(0).int()
    shape = (sum(lengths), 4, heads, head_dim)
    q, k, v, grad_out = torch.randn(shape, device=device, dtype=dtype).unbind(1)
    problem = Problem(q, k, v, offsets, None, longest, longest, None, None, head_dim**-0.5)
    if kernel == "forward":
        return partial(triton_.attention, problem), partial(reference.attention, problem)
    saved = (problem, grad_out, None, *reference.attention(problem), True)
    return partial(triton_.attention_backward, *saved), partial(
        reference.attention_backward, *saved
    )


@contextmanager
def entry(key: Key, tile: Tile) -> Iterator[None]:
    """Context manager: the table holds ``tile`` at ``key``, for all architectures."""
    before = TABLE[key]
    TABLE[key] = (tile, tile, tile)
    try:
        yield
    finally:
        TABLE[key] = before


def error(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Largest error over the largest value, of the worst of the results; infinite where one is NaN."""
    worst = 0.0
    for ours, right in zip(found, expected, strict=True):
        off = float((ours.double() - right.double()).abs().max() / right.double().abs().max())
        worst = max(worst, off if off == off else float("inf"))
    return worst


def measure(
    key: Key,
    tiles: Iterable[Tile],
    call: Call,
    expected: Sequence[Tensor],
    rounds: int,
    refused: Callable[[Tile, float], object] = lambda tile, off: None,
) -> dict[Tile, list[float]]:
    """Seconds of each tile in every round; without tiles that need more than the GPU has, err or take far longer.

    Args:
        expected: what ``call`` returns.
        refused: gets tiles whose results are wrong, and by how much.
    """

    def with_tile(tile: Tile) -> Sequence[Tensor]:
        with entry(key, tile):
            return call()

    calls: dict[Tile, Call] = {}
    for tile in tiles:
        try:
            off = error(with_tile(tile), expected)
        except _too_large():
            continue
        if off > TOLERANCES[key[2]]:
            refused(tile, off)
        else:
            calls[tile] = partial(with_tile, tile)
    timed = clocks(calls)
    times = samples_in_turns(timed, rounds=1)
    limit = HOPELESS * min((values[0] for values in times.values()), default=0.0)
    times = {tile: values for tile, values in times.items() if values[0] <= limit}
    more = samples_in_turns({tile: timed[tile] for tile in times}, rounds=rounds - 1, warmup=0)
    return {tile: values + more[tile] for tile, values in times.items()}


def _too_large() -> tuple[type[Exception], ...]:
    from triton.runtime.errors import OutOfResources, PTXASError

    return OutOfResources, PTXASError


def compile_once(key: Key, tile: Tile, lengths: tuple[int, ...], heads: int, device: str) -> None:
    """Fill Triton's cache, whose folder the processes share: compiling takes far longer than timing."""
    with entry(key, tile), suppress(*_too_large()):
        workload(key, lengths, heads, device)[0]()


def best(current: Tile, times: Mapping[Tile, Sequence[float]]) -> Tile:
    """The tile of the least median, if it beats the current one, which may not run here, by more than ``GAIN`` and by
    more than ``SPREADS`` times the spread of either.
    """
    medians = {tile: statistics.median(values) for tile, values in times.items()}
    fastest = min(medians, key=medians.__getitem__, default=current)
    if current not in medians:
        return fastest
    noise = max(spread(times[tile]) for tile in (fastest, current))
    least = max((GAIN - 1) * medians[fastest], SPREADS * noise)
    return fastest if medians[current] - medians[fastest] > least else current


def line(key: Key, tiles: Iterable[Tile]) -> str:
    """Source line of an entry of ``configurations.TABLE``."""
    shown = ", ".join(f"Tile{dataclasses.astuple(tile)}" for tile in tiles)
    return f'    ("{key[0]}", {key[1]}, {key[2]}): ({shown}),'


def record(times: Mapping[Tile, Sequence[float]], current: Tile, chosen: Tile) -> dict[str, Any]:
    """Entry for ``--json``: present and chosen tile, and time and spread of every tile, in microseconds."""
    rows = [
        {
            "tile": dataclasses.astuple(tile),
            "us": 1e6 * statistics.median(values),
            "spread_us": 1e6 * spread(values) if len(values) > 1 else None,
        }
        for tile, values in times.items()
    ]
    return {
        "present": dataclasses.astuple(current),
        "chosen": dataclasses.astuple(chosen),
        "tiles": rows,
    }


def _write(path: Path, found: Mapping[str, Any]) -> None:
    part = path.with_name(f".{path.name}.part")
    part.write_text(json.dumps(found, indent=1) + "\n")
    part.replace(path)


def main(arguments: list[str] | None = None) -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(
        prog="python -m alit_kernels.attention.tune", description=__doc__
    )
    rehearsal = os.environ.get("REHEARSAL", "") not in ("", "0")
    parser.add_argument("--rehearsal", action="store_true", default=rehearsal)
    parser.add_argument("--kernel", action="append", choices=KERNELS, help="default: all")
    parser.add_argument("--head-dim", action="append", type=int, help="default: all of the table")
    parser.add_argument("--json", type=Path, help="file of all times, written after each entry")
    options = parser.parse_args(arguments)
    if options.rehearsal:
        os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported, with the kernels
        place, some, rounds, workers = 0, 2, 2, 1
        work: tuple[tuple[int, ...], int, str] = (5, 17), 1, "cpu"
    elif not torch.cuda.is_available():
        parser.error("no GPU: --rehearsal tries the script out on the CPU")
    else:
        place = family(10 * torch.cuda.get_device_capability()[0])
        some, rounds, workers = 1000, 7, min(14, os.cpu_count() or 1)
        work = LENGTHS, 8, "cuda"
    known = json.loads(options.json.read_text()) if options.json and options.json.exists() else {}
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        for key in sorted(TABLE, key=lambda key: key[1] not in FIRST):
            tiles, name = TABLE[key], " ".join(map(str, key))
            if key[0] not in (options.kernel or KERNELS) or name in known:
                continue
            if key[1] not in (options.head_dim or [key[1]]):
                continue
            tried = list(dict.fromkeys([tiles[place], *candidates(key, FAMILIES[place])]))[:some]
            tasks = [(key, tile, *work) for tile in tried]
            list(pool.map(compile_once, *zip(*tasks, strict=True)))
            call, right = workload(key, *work)
            times = measure(
                *(key, tried, call, right(), rounds),
                lambda tile, off: print(f"    # {tile}: wrong by {off:.2g} of the largest value"),
            )
            chosen = best(tiles[place], times)
            found = [chosen if i == place else tile for i, tile in enumerate(tiles)]
            spent = [
                f"{statistics.median(times[t]) * 1e6:.1f} us"
                for t in (chosen, tiles[place])
                if t in times
            ]
            print(f"{line(key, found)}  # {', before '.join(spent)}", flush=True)
            known[name] = record(times, tiles[place], chosen)
            if options.json:
                _write(options.json, known)


if __name__ == "__main__":
    main()
