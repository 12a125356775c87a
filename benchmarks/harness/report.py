"""Tables and plots of ``pytest benchmarks --benchmark-json=FILE``: ``python -m benchmarks.harness.report RESULT...``.

Writes ``benchmarks/results/README.md`` and the plots it shows, replaces the performance section of the project's
README, and takes the indentation out of the results. Losses are shown like wins: a ratio below 1 means that the
contender was faster than ours. A folder is one run on one machine, its files ``test_*.json`` are the parts.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from alit.atomic_files import replacing

from .plots import PLOTS, save
from .runs import BUSY, Row, Run, compact, files, ratios, read
from .timing import RESULTS

ROOT = RESULTS.parents[1]
#: Mark of a time -> what it means, and whether a row has it.
MARKS: dict[str, tuple[str, Callable[[Row], bool]]] = {
    r"\*": (
        f"other processes used more than {BUSY:.0f} % of the processors meanwhile",
        lambda row: (row.info.get("other_load_percent") or 0.0) > BUSY,
    ),
    "†": (
        "with the host's launches, which count where they take longer than the kernels",
        lambda row: row.info.get("clock") == "events",
    ),
}
BEGIN, END = "<!-- performance: begin -->", "<!-- performance: end -->"


def _table(columns: Sequence[str], sides: str, rows: Iterable[Sequence[str]]) -> str:
    """In Markdown; columns are left (l) or right (r)."""
    line = "|" + "".join("--:|" if side == "r" else "---|" for side in sides)
    head, *lines = ("| " + " | ".join(cells) + " |" for cells in (columns, *rows))
    return "\n".join([head, line, *lines])


COLUMNS = ("case", "contender", "median", "min to max", "over ours", "GFLOP/s", "of matmul", "GB/s")
COLUMNS += ("of copy", "peak memory")


def table(run: Run) -> str:
    """Every time of a run, ours first in each case."""
    lines, ceilings = [], run.machine["ceilings"]

    def rate(value: float, ceiling: str) -> tuple[str, str]:
        return (f"{value:.3g}", f"{value / ceilings[ceiling]:.0%}") if value else ("", "")

    for group, rows in run.groups.items():
        for row in sorted(rows.values(), key=lambda row: row.contender != "ours"):
            cells = [
                *(group, row.contender, f"{1e3 * row.median:.3g} ms{_mark(row)}"),
                f"{1e3 * min(row.seconds):.3g} to {1e3 * max(row.seconds):.3g}",
                f"{row.median / rows['ours'].median:.2f}" if "ours" in rows else "",
                *rate(row.gigaflops, "matmul_gigaflops"),
                *rate(row.gigabytes, "copy_gigabytes"),
                f"{row.info['peak_megabytes']:.1f} MB",
            ]
            lines.append(cells)
    return _table(COLUMNS, "ll" + "r" * 8, lines)


def left_out(run: Run) -> str:
    """Contenders without a time, by reason; empty without any."""
    cases: dict[tuple[str, str], list[str]] = {}
    for group, found in run.left_out.items():
        for name, reason in found.items():
            cases.setdefault((name, reason.replace("|", "/")), []).append(group)
    if not cases:
        return ""
    lines = [(*key, "; ".join(groups)) for key, groups in cases.items()]
    return _table(("without a time", "why", "case"), "lll", lines) + "\n"


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
    """The training steps: pictures per second, model FLOP utilisation, memory; empty without any."""
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
    columns = ("step", "contender", "images/s", "times the eager baseline", "FLOP utilisation")
    columns += ("MB of the step (of eager)", "with weights and moments", "seconds by part")
    note = (
        "\n\nUtilisation: operations of the eager step, counted, over time and the measured matrix-product ceiling."
        " The parts are those of one step with a stopwatch in it, and are left out where it was"
        " disturbed.\n"
    )
    return _table(columns, "llrrrrrl", lines) + note


def _beside(row: Row, eager: Row | None, state: float) -> str:
    """Peak memory and ``state``, the same in all, in MB; of the eager step's."""
    own = row.info["peak_megabytes"] + state
    return f"{own:.0f}" + (
        f" ({own / (eager.info['peak_megabytes'] + state):.2f})" if eager else ""
    )


def write(runs: list[Run], folder: Path) -> str:
    """Plots and ``README.md`` in ``folder``; returns the section for the project's README."""
    folder.mkdir(parents=True, exist_ok=True)
    pages = ["# Benchmark results\n"]
    for run in runs:
        pages.append(f"## {run.name}\n\n{described(run)}\n\n`{run.machine.get('command', '')}`\n")
        pages.append(
            "Ratios are of medians, contenders timed in turns; every result was verified first"
            f" ([how](../../docs/benchmarks.md)).{_legend([run])}\n"
        )
        for kind, (title, plot) in PLOTS.items():
            file = f"{run.name}-{kind}.svg"
            if figure := plot(run):
                save(figure, folder / file)
                pages.append(f"![{title}]({file})\n")
        pages += [training(run), table(run) + "\n", left_out(run)]
    _replace(folder / "README.md", "\n".join(page for page in pages if page))
    return summary(runs)


def summary(runs: list[Run]) -> str:
    """The fastest other contender of each case: its time over ours, a column for each run."""
    cells: dict[str, dict[str, str]] = {}
    for run in runs:
        for group, name, ratio in ratios(run):
            mark = _mark(run.groups[group]["ours"], run.groups[group][name])
            cells.setdefault(group, {}).setdefault(run.name, f"{ratio:.2f}{mark} {name}")
    names = [run.name for run in runs]
    lines = [f"- **{run.name}**: {described(run)}" for run in runs]
    lines += ["", f"The fastest other contender's time over ours.{_legend(runs)}", ""]
    rows = [[group, *(cells[group].get(name, "") for name in names)] for group in cells]
    return "\n".join([*lines, _table(["case", *names], "l" * (1 + len(names)), rows)])


def _mark(*rows: Row) -> str:
    return "".join(f" {mark}" for mark, (_, has) in MARKS.items() if any(map(has, rows)))


def _legend(runs: list[Run]) -> str:
    rows = [row for run in runs for row in run.rows]
    used = ((mark, meaning) for mark, (meaning, has) in MARKS.items() if any(map(has, rows)))
    return "".join(f" {mark}: {meaning}." for mark, meaning in used)


def _replace(path: Path, text: str) -> None:
    with replacing(path) as file:
        file.write_text(text)


def replace_section(readme: Path, section: str) -> None:
    """Put ``section`` between the performance markers of ``readme``.

    Raises:
        ValueError: the markers are missing.
    """
    text = readme.read_text()
    if BEGIN not in text or END not in text:
        raise ValueError(f"{readme}: expected the markers {BEGIN} and {END}")
    head, rest = text.split(BEGIN, 1)
    tail = rest.split(END, 1)[1]
    _replace(readme, f"{head}{BEGIN}\n{section}\n{END}{tail}")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("results", nargs="+", type=Path, help="files, or folders of one run each")
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    section = write([read(path) for path in arguments.results], arguments.output)
    for file in (file for path in arguments.results for file in files(path)):
        compact(file)
    if arguments.output == RESULTS:
        replace_section(ROOT / "README.md", section)


if __name__ == "__main__":
    main()
