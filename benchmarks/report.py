"""Tables and plots of ``pytest benchmarks --benchmark-json=FILE``: ``python -m benchmarks.report FILE...``.

Writes ``benchmarks/results/README.md`` and the plots it shows, and replaces the performance section of the project's
README. Losses are shown like wins: a ratio below 1 means that the contender was faster than ours.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
BEGIN, END = "<!-- performance: begin -->", "<!-- performance: end -->"
#: Readable on white and on black.
GREY, OURS, PEER = "#808080", "#2a9d8f", "#c97b4a"


class Row(NamedTuple):
    """One contender of one group: median and spread in seconds, and what the contest noted."""

    group: str
    contender: str
    median: float
    low: float
    high: float
    info: dict[str, Any]


class Run(NamedTuple):
    """One result file."""

    name: str
    machine: dict[str, Any]
    rows: list[Row]

    @property
    def groups(self) -> dict[str, list[Row]]:
        grouped: dict[str, list[Row]] = {}
        for row in self.rows:
            grouped.setdefault(row.group, []).append(row)
        return grouped


def read(path: Path) -> Run:
    """A file of pytest-benchmark.

    Raises:
        ValueError: it is no such file, or not one of this suite.
    """
    content = json.loads(path.read_text())
    if "benchmarks" not in content or "alit" not in content.get("machine_info", {}):
        raise ValueError(f"{path}: expected a result of 'pytest benchmarks --benchmark-json'")
    rows = [
        Row(
            entry["group"],
            entry["extra_info"]["contender"],
            *(entry["stats"][name] for name in ("median", "min", "max")),
            entry["extra_info"],
        )
        for entry in content["benchmarks"]
    ]
    return Run(path.stem, content["machine_info"]["alit"], rows)


def ratios(run: Run) -> list[tuple[str, str, float]]:
    """(group, contender, its median over ours), best contender of each group first."""
    result = []
    for group, rows in run.groups.items():
        ours = next((row for row in rows if row.contender == "ours"), None)
        if ours is None:
            continue
        others = sorted((row for row in rows if row is not ours), key=lambda row: row.median)
        result += [(group, row.contender, row.median / ours.median) for row in others]
    return result


COLUMNS = ("case", "contender", "median", "min to max", "over ours", "GFLOP/s", "of matmul", "GB/s")
COLUMNS += ("of copy", "peak memory")


def table(run: Run) -> str:
    lines = ["| " + " | ".join(COLUMNS) + " |", "|---|---|" + "--:|" * (len(COLUMNS) - 2)]
    for group, rows in run.groups.items():
        ours = next((row.median for row in rows if row.contender == "ours"), None)
        for row in sorted(rows, key=lambda row: row.contender != "ours"):
            info, compute, memory = row.info, ("", ""), ("", "")
            if info["flops"]:
                compute = (f"{info['gigaflops']:.3g}", f"{info['percent_of_matmul']:.0f} %")
            if info["bytes"]:
                memory = (f"{info['gigabytes_per_second']:.3g}", f"{info['percent_of_copy']:.0f} %")
            cells = [
                *(group, row.contender, f"{1e3 * row.median:.3g} ms"),
                f"{1e3 * row.low:.3g} to {1e3 * row.high:.3g}",
                "" if ours is None else f"{row.median / ours:.2f}",
                *(*compute, *memory, f"{info['peak_megabytes']:.1f} MB"),
            ]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def described(run: Run) -> str:
    machine, ceilings = run.machine, run.machine["ceilings"]
    device = machine["gpu"] or f"{machine['cpu']}, {machine['threads']} threads"
    return (
        f"{device}; torch {machine['torch']}; {machine['date']}. Measured ceilings: copy "
        f"{ceilings['copy_gigabytes']:.3g} GB/s, matrix product {ceilings['matmul_gigaflops']:.4g} GFLOP/s."
    )


def _axes(width: float, height: float) -> tuple[Any, Any]:
    figure, axes = plt.subplots(figsize=(width, height))
    figure.patch.set_alpha(0)
    axes.patch.set_alpha(0)
    axes.tick_params(which="both", colors=GREY, labelsize=8)
    axes.xaxis.label.set_color(GREY)
    axes.yaxis.label.set_color(GREY)
    for spine in axes.spines.values():
        spine.set_color(GREY)
    return figure, axes


def _save(figure: Any, path: Path) -> None:
    figure.savefig(path, bbox_inches="tight", transparent=True, metadata={"Date": None})
    plt.close(figure)


def plot_ratios(run: Run, path: Path) -> None:
    """One bar for each contender: how many times our time it took, on a logarithmic axis around 1."""
    entries = ratios(run)[::-1]
    figure, axes = _axes(7, 0.6 + 0.2 * len(entries))
    values = [ratio for _, _, ratio in entries]
    axes.barh(
        [f"{group}: {contender}" for group, contender, _ in entries],
        [value - 1 for value in values],
        left=1,
        color=[OURS if value >= 1 else PEER for value in values],
    )
    axes.set_xscale("log")
    axes.axvline(1, color=GREY, linewidth=1)
    for place, value in enumerate(values):
        axes.annotate(f" {value:.2g}", (max(value, 1), place), va="center", fontsize=7, color=GREY)
    axes.set_xlabel("time of the contender / time of ours (left of 1: the contender is faster)")
    _save(figure, path)


def plot_roofline(run: Run, path: Path) -> None:
    """Our cases against the machine's measured copy bandwidth and matrix-product rate."""
    copy, matmul = (run.machine["ceilings"][k] for k in ("copy_gigabytes", "matmul_gigaflops"))
    points = [r for r in run.rows if r.contender == "ours" and r.info["flops"] and r.info["bytes"]]
    intensities = [row.info["flops"] / row.info["bytes"] for row in points]
    figure, axes = _axes(7, 4)
    low, high = min([*intensities, 0.05]) / 2, max([*intensities, 2 * matmul / copy]) * 2
    roof = [low, matmul / copy, high]
    axes.plot(roof, [min(x * copy, matmul) for x in roof], color=GREY)
    for row, x in zip(points, intensities, strict=True):
        axes.scatter([x], [row.info["gigaflops"]], color=OURS, zorder=3)
        axes.annotate(
            row.group, (x, row.info["gigaflops"]), fontsize=6, color=GREY, rotation=20,
            xytext=(3, 3), textcoords="offset points",
        )  # fmt: skip
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("operations per byte that must move")
    axes.set_ylabel("GFLOP/s")
    _save(figure, path)


def write(runs: list[Run], folder: Path) -> str:
    """Plots and ``README.md`` in ``folder``; returns the section for the project's README."""
    folder.mkdir(parents=True, exist_ok=True)
    pages, section = ["# Benchmark results\n"], []
    for run in runs:
        plot_ratios(run, folder / f"{run.name}-ratios.svg")
        plot_roofline(run, folder / f"{run.name}-roofline.svg")
        pages.append(
            f"## {run.name}\n\n{described(run)}\n\nRatios are of medians, contenders timed in turns; every result was"
            f" verified first.\n\n![Time of each contender over ours]({run.name}-ratios.svg)\n\n"
            f"![Roofline]({run.name}-roofline.svg)\n\n{table(run)}\n"
        )
        best = {}
        for group, contender, ratio in ratios(run):
            best.setdefault(group, (contender, ratio))
        lines = [f"| {group} | {name} | {ratio:.2f} |" for group, (name, ratio) in best.items()]
        section.append(
            f"{described(run)}\n\n| case | fastest other | its time over ours |\n|---|---|--:|\n"
            + "\n".join(lines)
        )
    (folder / "README.md").write_text("\n".join(pages))
    return "\n\n".join(section)


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
    readme.write_text(f"{head}{BEGIN}\n{section}\n{END}{tail}")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    section = write([read(path) for path in arguments.files], arguments.output)
    if arguments.output == RESULTS:
        replace_section(ROOT / "README.md", section)


if __name__ == "__main__":
    main()
