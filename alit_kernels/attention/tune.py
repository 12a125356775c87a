"""``python -m alit_kernels.attention.tune``: time launch configurations on this GPU and regenerate their table.

For each entry of ``configurations.TABLE`` and the architecture of this GPU, candidates run on mixed lengths of a
tokenizer (289 to 513 tokens, 64 sequences, 8 heads), in turns; the fastest takes the entry's place where it is at least
2 % faster, and where all that the entry serves passes ``alit_kernels.aot --check`` with it. The table in
``configurations.py`` is then rewritten, and the difference printed.

All processors compile, before anything is timed.

``--rehearsal``, or REHEARSAL=1 in the environment: the same on the CPU, in Triton's interpreter, with a few tokens and
candidates. Its times mean nothing; no file is changed.
"""

from __future__ import annotations

import argparse
import difflib
import itertools
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Executor, ProcessPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

from .._builds import Build, Recorder
from . import configurations
from .configurations import FAMILIES, KERNELS, TABLE, Tile, family
from .op import _attention, _attention_backward

Key = tuple[str, int, int]
Entry = tuple[Tile, Tile, Tile]

SOURCE = Path(configurations.__file__)
BEGIN, END = "TABLE = {\n", "}\n"
#: What a candidate must be faster by, to replace an entry.
GAIN = 1.02
#: A candidate that takes so many times as long as the fastest in the first round is out.
HOPELESS = 1.25
LENGTHS: tuple[int, ...] = tuple(range(289, 514, 32)) * 8
HEADS, ROUNDS = 8, 5


def candidates(key: Key) -> list[Tile]:
    """Tiles to try for an entry: float32 has no tensor cores, and larger ones do not fit its registers."""
    _, head_dim, size = key
    if size == 4:
        choices = itertools.product((32,), (16, 32, 64), (8,), (1, 2, 3), (True,))
    else:
        stages = (1, 2, 3) if head_dim > 64 else (2, 3)
        choices = itertools.product((64, 128), (32, 64), (4, 8), stages, (False, True))
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
    sizes, options = (longest, longest), (None, head_dim**-0.5)

    def forward() -> tuple[torch.Tensor, ...]:
        return _attention(*(q, k, v, offsets, None, *sizes, *options), implementation="triton")

    if kernel == "forward":
        return forward
    out, lse = forward()
    saved = (q, k, v, offsets, None, *sizes, *options, grad_out, torch.zeros_like(lse), out, lse)
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


def faster(current: Tile, times: Mapping[Tile, float]) -> list[Tile]:
    """Tiles that beat the current one, which may not run here, by more than ``GAIN``; the fastest first."""
    limit = times.get(current, float("inf")) / GAIN
    return sorted((tile for tile, time in times.items() if time < limit), key=times.__getitem__)


def compile_once(key: Key, tile: Tile, lengths: tuple[int, ...], heads: int, device: str) -> None:
    """Fill Triton's cache, whose folder the processes share: compiling takes far longer than timing."""
    with entry(key, tile), suppress(*_too_large()):
        workload(key, lengths, heads, device)()


def served(key: Key, tile: Tile, architecture: int) -> list[Build]:
    """All builds for an architecture that take ``tile`` where it is the entry of ``key``."""
    from .builds import record_entry

    kernel, head_dim, size = key
    recorder = Recorder(__package__, architecture)
    with entry(key, tile):
        for dtype in (torch.float32,) if size == 4 else (torch.bfloat16, torch.float16):
            record_entry(recorder, head_dim, dtype)
    return [b for b in recorder.builds.values() if b.kernel.__name__ == f"{kernel}_kernel"]


def faults(key: Key, tile: Tile, architecture: int, index: int) -> list[str]:
    """What ``alit_kernels.aot --check`` says of one of the builds that ``tile`` serves."""
    return served(key, tile, architecture)[index].code().faults


def sound(key: Key, tile: Tile, architecture: int, pool: Executor) -> bool:
    """Whether ``alit_kernels.aot --check`` would pass with ``tile`` as the entry."""
    count = len(served(key, tile, architecture))
    tasks = [(key, tile, architecture, index) for index in range(count)]
    return not any(pool.map(faults, *zip(*tasks, strict=True)))


def rendered(table: Mapping[Key, Entry]) -> str:
    """The table as ``configurations.py`` writes it."""

    def text(tile: Tile) -> str:
        masks = ", True" * tile.mask_all
        return f"Tile({tile.rows}, {tile.columns}, {tile.warps}, {tile.stages}{masks})"

    lines = []
    for (kernel, head_dim, size), tiles in table.items():
        same = len(set(tiles)) == 1
        entry = f"({text(tiles[0])},) * 3" if same else f"({', '.join(map(text, tiles))})"
        lines.append(f'    ("{kernel}", {head_dim}, {size}): {entry},\n')
    return BEGIN + "".join(lines) + END


def regenerated(source: str, table: Mapping[Key, Entry]) -> str:
    """``source`` with its table replaced."""
    before, found, rest = source.partition(BEGIN)
    _, closed, after = rest.partition("\n" + END)
    if not (found and closed):
        raise ValueError(f"source: expected a table from {BEGIN!r} to a line {END!r}")
    return before + rendered(table) + after


def write(path: Path, text: str) -> None:
    """Replace the file as a whole or not at all."""
    with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
        file.write(text)
    Path(file.name).chmod(path.stat().st_mode)
    Path(file.name).replace(path)


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
    if not options.rehearsal and not torch.cuda.is_available():
        parser.error("no GPU: --rehearsal tries the script out on the CPU")
    if options.rehearsal and os.environ.get("TRITON_INTERPRET") != "1":
        # Triton, which is imported by now, has read it.
        command = [
            sys.executable,
            "-m",
            "alit_kernels.attention.tune",
            *(arguments or sys.argv[1:]),
        ]
        os.execve(sys.executable, command, {**os.environ, "TRITON_INTERPRET": "1"})
    keys = [
        key
        for key in TABLE
        if key[0] in (options.kernel or [key[0]]) and key[1] in (options.head_dim or [key[1]])
    ]
    before = after = SOURCE.read_text()
    table = dict(TABLE)
    for key, entry in tuned(keys, options.rehearsal):
        table[key] = entry
        after = regenerated(before, table)
        if not options.rehearsal:  # at once: a run may be cut off
            write(SOURCE, after)
    old, new = (text.splitlines(keepends=True) for text in (before, after))
    print("".join(difflib.unified_diff(old, new, "configurations.py", "tuned")) or "no difference")
    if options.rehearsal:
        print("rehearsal: nothing is changed")


def tuned(keys: Iterable[Key], rehearsal: bool) -> Iterator[tuple[Key, Entry]]:
    """``keys``, one after another, with the fastest tile on this GPU's side of their entries."""
    device, place, lengths, heads, rounds = "cuda", 0, LENGTHS, HEADS, ROUNDS
    if rehearsal:
        device, lengths, heads, rounds = "cpu", (5, 17), 1, 1
    else:
        place = family(10 * torch.cuda.get_device_capability()[0])
    tried = {key: list(dict.fromkeys([TABLE[key][place], *candidates(key)])) for key in keys}
    if rehearsal:
        tried = {key: tiles[:2] for key, tiles in tried.items()}
    workers = 1 if rehearsal else min(14, os.cpu_count() or 1)
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        for key, tiles in tried.items():
            tasks = [(key, tile, lengths, heads, device) for tile in tiles]
            list(pool.map(compile_once, *zip(*tasks, strict=True)))
            times = measure(key, tiles, workload(key, lengths, heads, device), rounds)
            better = (
                tile
                for tile in faster(tiles[0], times)
                if rehearsal or sound(key, tile, FAMILIES[place], pool)
            )
            chosen = next(better, tiles[0])
            print(
                *key,
                chosen,
                *(f"{times[t] * 1e6:.0f} us" for t in (chosen, tiles[0]) if t in times),
                flush=True,
            )
            first, second, third = (
                chosen if i == place else tile for i, tile in enumerate(TABLE[key])
            )
            yield key, (first, second, third)


if __name__ == "__main__":
    main()
