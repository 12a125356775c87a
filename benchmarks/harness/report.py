"""Tables and plots of ``pytest benchmarks --benchmark-json=FILE``: ``python -m benchmarks.harness.report RESULT...``.

Writes ``benchmarks/results/README.md`` with its plots and the sections of other pages (``benchmarks.harness.pages``),
and compacts the result files. Losses are shown like wins: a ratio below 1 means that the contender was faster than
ours. A folder is one run on one machine; its files ``test_*.json`` are the parts.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Sequence
from itertools import zip_longest
from pathlib import Path

from alit.atomic_files import replacing

from . import outcome
from .outcome import table
from .plots import PLOTS, save
from .runs import BUSY, Row, Run, compact, files, ratios, read
from .targets import targets
from .timing import RESULTS

#: Mark of a time -> its meaning, and a function that is true of rows with it.
MARKS: dict[str, tuple[str, Callable[[Row], bool]]] = {
    r"\*": (
        f"other processes used more than {BUSY:.0f} % of the processors meanwhile",
        lambda row: (row.info.get("other_load_percent") or 0.0) > BUSY,
    ),
    "†": (
        "with the host's launches, which count where they take longer than the kernels",
        lambda row: row.info.get("clock") == "events" and "device_us" not in row.info,
    ),
    "‡": (
        "the sum of its kernels: one of this case waits for the device, or cannot be captured",
        lambda row: row.info.get("clock") == "kernels",
    ),
}


#: Explanations of the columns of runs on a GPU: with device and host measured apart, and together.
APART = (
    "Device: the time of the GPU alone, with a cold L2. Host: until the call returns. Call: what a caller of a model's"
    " path waits for, both in it; least and greatest time, operations and bytes a second are of the call where there is"
    " one, else of the device."
)
TOGETHER = (
    "Device and host are not apart in this run: its times are of calls, and those marked † have the host's launches in"
    " them where these take longer than the kernels."
)


def times(run: Run) -> str:
    """Table of all times of a run, ours first in each case."""
    return apart(run) if run.apart else together(run)


def _in_order(run: Run) -> Iterable[tuple[str, Row, Row | None]]:
    """(case, row, our row of that case or None) of every row, ours first in each case."""
    for group, rows in run.groups.items():
        for row in sorted(rows.values(), key=lambda row: row.contender != "ours"):
            yield group, row, rows.get("ours")


def _rates(run: Run, row: Row) -> list[str]:
    """Cells of ``RATES``: operations and bytes a second, each with its share of the ceiling, and peak memory."""
    cells = []
    for value, name in ((row.gigaflops, "matmul_gigaflops"), (row.gigabytes, "copy_gigabytes")):
        share = value / run.machine["ceilings"][name]
        cells += [f"{value:.3g}", f"{share:.0%}"] if value else ["", ""]
    return [*cells, f"{row.info['peak_megabytes']:.1f} MB"]


RATES = ("GFLOP/s", "of matmul", "GB/s", "of copy", "peak memory")


def together(run: Run) -> str:
    """Table with one time for each row: runs on a CPU, or whose device and host times are not measured apart."""
    lines = []
    for group, row, ours in _in_order(run):
        cells = [
            *(group, row.contender, f"{1e3 * row.median:.3g} ms{mark(row)}"),
            f"{1e3 * min(row.seconds):.3g} to {1e3 * max(row.seconds):.3g}",
            f"{row.median / ours.median:.2f}" if ours else "",
        ]
        lines.append([*cells, *_rates(run, row)])
    columns = ("case", "contender", "median", "min to max", "over ours", *RATES)
    return table(columns, "ll" + "r" * 8, lines)


def apart(run: Run) -> str:
    """Table of a GPU run: device time, host time, the time a caller of a model's path waits, and launches."""
    lines = []
    for group, row, ours in _in_order(run):
        cells = [group, row.contender]
        for kind in ("device", "host", "call"):
            own, other = (None if x is None else getattr(x, kind) for x in (row, ours))
            sign = mark(row) if kind == "device" else ""
            cells += [
                "" if own is None else f"{1e6 * own:.4g} us{sign}",
                f"{own / other:.2f}" if own and other else "",
            ]
        launches = row.info["launches"]
        seconds = f"{1e6 * min(row.seconds):.4g} to {1e6 * max(row.seconds):.4g}"
        cells += [seconds, "" if launches is None else str(launches)]
        lines.append([*cells, *_rates(run, row)])
    over = "over ours"
    columns = ("case", "contender", "device", over, "host", over, "call", over, "min to max, us")
    return table((*columns, "launches", *RATES), "ll" + "r" * 13, lines)


def left_out(run: Run) -> str:
    """Table of the contenders without a time, by reason; "" if all have one."""
    cases: dict[tuple[str, str], list[str]] = {}
    for group, found in run.left_out.items():
        for name, reason in found.items():
            cases.setdefault((name, reason.replace("|", "/")), []).append(group)
    if not cases:
        return ""
    lines = [(*key, "; ".join(groups)) for key, groups in cases.items()]
    return table(("without a time", "why", "case"), "lll", lines) + "\n"


def described(run: Run) -> str:
    machine, ceilings = run.machine, run.machine["ceilings"]
    device = machine["gpu"]
    if device is None:
        instructions = f" ({machine['instructions']})" if "instructions" in machine else ""
        device = f"{machine['cpu']}{instructions}, {machine['threads']} threads"
    revision = f"; commit {machine['revision']}" if machine.get("revision") else ""
    return (
        f"{device}; torch {machine['torch']}; {machine['date']}{revision}. Measured ceilings: copy "
        f"{ceilings['copy_gigabytes']:.3g} GB/s, matrix product {ceilings['matmul_gigaflops']:.4g} GFLOP/s."
    )


def training(run: Run) -> str:
    """Table of the training steps: images per second, model FLOP utilization, memory; "" if the run has none."""
    lines = []
    for group, rows in run.groups.items():
        eager = rows.get("eager baseline")
        for row in rows.values():
            if "state_megabytes" not in row.info:
                continue
            parts = (f"{part} {seconds:.3g}" for part, seconds in (row.parts or {}).items())
            cells = [
                *(group, row.contender, f"{row.info['images'] / row.median:.3g}"),
                "" if eager is None else f"{eager.median / row.median:.2f}",
                f"{row.gigaflops / run.machine['ceilings']['matmul_gigaflops']:.0%}",
                *(_beside(row, eager, state) for state in (0.0, row.info["state_megabytes"])),
                ", ".join(parts),
            ]
            lines.append(cells)
    if not lines:
        return ""
    columns = ("step", "contender", "images/s", "times the eager baseline", "FLOP utilization")
    columns += ("MB of the step (of eager)", "with weights and moments", "seconds by part")
    note = (
        "\n\nUtilization: operations of the eager step, counted, over time and the measured matrix-product ceiling."
        " The parts are those of one step with a stopwatch in it, and are left out where it was"
        " disturbed.\n"
    )
    return table(columns, "llrrrrrl", lines) + note


def _beside(row: Row, eager: Row | None, state: float) -> str:
    """Peak memory plus ``state``, equal for all contenders, in MB, and its ratio to the eager step's."""
    own = row.info["peak_megabytes"] + state
    return f"{own:.0f}" + (
        f" ({own / (eager.info['peak_megabytes'] + state):.2f})" if eager else ""
    )


def aims(runs: list[Run]) -> str:
    """Table of the targets of kernels on a GPU beside the values that GPU runs have measured."""
    measured = [run for run in runs if run.apart]
    names = [run.name for run in measured] or ["measured"]
    rows = [
        [x.what, x.wanted, *([x.found(run) for run in measured] or ["unmeasured"])]
        for x in targets()
    ]
    about = (
        "On an H100 or H200; times of ops are the device's, those of encoding and of the training step what a caller"
        " waits for. A backward's time is that of the step less the forward's.\n\n"
    )
    return about + table(("target", "wanted", *names), "ll" + "l" * len(names), rows) + "\n"


def write(runs: list[Run], folder: Path, notes: Sequence[str] = ()) -> None:
    """Write plots and ``README.md`` to ``folder``; ``notes``: further text for each run."""
    folder.mkdir(parents=True, exist_ok=True)
    pages = ["# Benchmark results\n", f"## Targets\n\n{aims(runs)}"]
    for run, note in zip_longest(runs, notes, fillvalue=""):
        assert isinstance(run, Run)
        pages.append(f"## {run.name}\n\n{described(run)}\n\n`{run.machine.get('command', '')}`\n")
        pages.append(note)
        if run.machine["gpu"]:
            pages.append(f"{APART if run.apart else TOGETHER}\n")
        pages.append(
            "Ratios are of medians, contenders timed in turns; every result was verified first"
            f" ([how](../../docs/benchmarks.md)).{_legend([run])}\n"
        )
        for kind, (title, plot) in PLOTS.items():
            file = f"{run.name}-{kind}.svg"
            if figure := plot(run):
                save(figure, folder / file)
                pages.append(f"![{title}]({file})\n")
        pages += [training(run), times(run) + "\n", left_out(run)]
    _replace(folder / "README.md", "\n".join(page for page in pages if page))


def ratios_of(runs: Sequence[Run], names: Sequence[str]) -> str:
    """Table of the fastest other contender's time over ours in each case, one column a run; ``names`` head them."""
    cells: dict[str, dict[str, str]] = {}
    for run in runs:
        for group, name, ratio in ratios(run):
            own = mark(run.groups[group]["ours"], run.groups[group][name])
            cells.setdefault(group, {}).setdefault(
                run.name, f"{ratio:.2f}{own} {name}{_host(run, group, name)}"
            )
    text = f"The fastest other contender's time over ours.{_legend(runs)}"
    if any(run.apart for run in runs):
        text += " On a GPU the device's time, of a model's paths the caller's; then the host's over ours."
    rows = [[group, *(cells[group].get(run.name, "") for run in runs)] for group in cells]
    return f"{text}\n\n{table(['case', *names], 'l' * (1 + len(names)), rows)}"


def _host(run: Run, group: str, name: str) -> str:
    """Text of the contender's host time over ours; "" if either is unknown."""
    theirs, ours = (run.groups[group][x].host for x in (name, "ours"))
    return f" (host {theirs / ours:.2f})" if theirs and ours else ""


def mark(*rows: Row) -> str:
    """The marks of ``MARKS`` that apply to any of the rows, each after a space."""
    return "".join(f" {mark}" for mark, (_, has) in MARKS.items() if any(map(has, rows)))


def _legend(runs: Iterable[Run]) -> str:
    rows = [row for run in runs for row in run.rows]
    used = ((mark, meaning) for mark, (meaning, has) in MARKS.items() if any(map(has, rows)))
    return "".join(f" {mark}: {meaning}." for mark, meaning in used)


def _replace(path: Path, text: str) -> None:
    with replacing(path) as file:
        file.write_text(text)


def with_section(text: str, section: str, name: str, page: Path) -> str:
    """``text`` of ``page`` with ``section`` between the markers of this name.

    Raises:
        ValueError: the markers are missing.
    """
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    if begin not in text or end not in text:
        raise ValueError(f"{page}: expected the markers {begin} and {end}")
    head, rest = text.split(begin, 1)
    tail = rest.split(end, 1)[1]
    return f"{head}{begin}\n{section}\n{end}{tail}"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("results", nargs="+", type=Path, help="files, or folders of one run each")
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    notes = [outcome.parts(path) + outcome.tiles(path) for path in arguments.results]
    write([read(path) for path in arguments.results], arguments.output, notes)
    for file in (file for path in arguments.results for file in files(path)):
        compact(file)
    if arguments.output == RESULTS:
        from . import pages

        pages.main()


if __name__ == "__main__":
    main()
