"""Write the sections of the README and the pages of docs/ that show results: ``python -m benchmarks.harness.pages``.

A page marks the place of a section with ``<!-- NAME: begin -->`` and ``<!-- NAME: end -->``; the text between them is
replaced. ``tests/benchmarks/test_pages.py`` fails if a page differs from the result files.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from functools import cache
from pathlib import Path

from alit.atomic_files import replacing

from . import figures, headlines, report
from .outcome import table
from .runs import Row, Run, ratios, read
from .timing import RESULTS

DOCS = RESULTS.parents[1] / "docs"
#: Results of ``pytest benchmarks`` that are shown (file or folder), and the names of their machines on the pages.
RUNS = {
    "cpu": "EPYC, AVX-512",
    "cpu-xeon": "Xeon, AVX-512",
    "cpu-avx2": "EPYC, AVX2",
    "h200": "H200",
}
#: Op -> beginnings of the names of its cases.
CASES = {
    "attention": ("attention ",),
    "codebook_statistics": ("codebook_statistics ",),
    "nearest_codeword": ("nearest_codeword ",),
    "vector_quantize": ("VectorQuantizer ",),
    "codebook_entropy": ("codebook_entropy ",),
    "soft_codebook": ("soft_codebook ",),
    "add_layer_norm": ("add_layer_norm ",),
    "ragged": ("pack ", "unpack ", "compact ", "append ", "tail_mask "),
    "linear": ("MLP ",),
    "models": ("encode ", "decode "),
}
MARKER = re.compile(r"<!-- ([\w ]+): begin -->")


@cache
def runs() -> tuple[Run, ...]:
    paths = (
        RESULTS / name if (RESULTS / name).is_dir() else RESULTS / f"{name}.json" for name in RUNS
    )
    return tuple(map(read, paths))


def machines() -> str:
    """List of the machines that the tables have columns for, with what each is."""
    lines = []
    for run in runs():
        own = f" {report.TOGETHER}" if run.machine["gpu"] and not run.apart else ""
        lines.append(f"- **{RUNS[run.name]}**: {report.described(run)}{own}")
    return "\n".join(lines)


def speed(op: str) -> str:
    """Table of an op's cases by machine: our time, the fastest other contender's, and its time over ours."""
    rows: list[list[str]] = []
    marks: set[str] = set()
    for run in runs():
        for group, name, ratio in _best(run, CASES[op]):
            ours, other = run.groups[group]["ours"], run.groups[group][name]
            mark = report.mark(ours, other)
            marks.update(mark.split())
            times = (_time(ours), f"{_time(other)} {name}", f"{ratio:.2f}{mark}")
            rows.append([group, RUNS[run.name], *times])
    order = list(dict.fromkeys(row[0] for row in rows))
    rows.sort(key=lambda row: order.index(row[0]))
    head = ("case", "machine", "ours", "fastest other", "its time over ours")
    legend = "".join(f" {x}: {report.MARKS[x][0]}." for x in report.MARKS if x in marks)
    about = "Medians, on [these machines](../docs/speed.md#machines); below 1 the other was faster."
    return f"{table(head, 'lllll', rows)}\n\n{about}{legend}"


def _best(run: Run, beginnings: tuple[str, ...]) -> list[tuple[str, str, float]]:
    """(case, fastest other contender, its time over ours) of each case whose name begins with one of these."""
    found: dict[str, tuple[str, str, float]] = {}
    for group, name, ratio in ratios(run):
        if group.startswith(beginnings):
            found.setdefault(group, (group, name, ratio))
    return list(found.values())


def _time(row: Row) -> str:
    seconds = row.median
    if seconds >= 1:
        return f"{seconds:.3g} s"
    return f"{1e3 * seconds:.3g} ms" if seconds >= 1e-3 else f"{1e6 * seconds:.3g} us"


def performance() -> str:
    """Table of all cases: the fastest other contender's time over ours, a column for each machine."""
    return report.ratios_of(list(runs()), [RUNS[run.name] for run in runs()])


def losses() -> str:
    """Table of the cases in which another contender was faster than ours, worst first."""
    rows = []
    for run in runs():
        for group, name, ratio in _best(run, ("",)):
            if ratio < 1:
                mark = report.mark(run.groups[group]["ours"], run.groups[group][name])
                rows.append((ratio, [group, RUNS[run.name], name, f"{ratio:.2f}{mark}"]))
    head = ("case", "machine", "fastest other", "its time over ours")
    return table(head, "lllr", [cells for _, cells in sorted(rows)])


def training() -> str:
    parts = [(RUNS[run.name], report.training(run)) for run in runs()]
    return "\n".join(f"**{name}**\n\n{text}" for name, text in parts if text).rstrip()


def targets() -> str:
    return report.aims(list(runs())).rstrip()


SECTIONS: dict[str, Callable[[], str]] = {
    "headlines": headlines.table_of,
    "machines": machines,
    "losses": losses,
    "performance": performance,
    "training": training,
    "targets": targets,
    **{f"speed of {op}": (lambda op=op: speed(op)) for op in CASES},
    "adaptive": figures.adaptive,
    "command line": figures.command_line,
    "context": figures.sdpa_context,
    "context overhead": figures.sdpa_overhead,
    "stops": figures.stops,
    "wide heads": figures.wide_heads,
    "padding": figures.padding,
    "instruction sets": figures.instruction_sets,
    "quantizer step": figures.quantizer_step,
    "entropy loss": figures.entropy_loss,
    "packed sampling": figures.generation_packed,
    "causal generator": figures.generation_causal,
    "masked generator": figures.generation_masked,
    "cycles": figures.cycles,
    "host": figures.host,
    "machine code": figures.machine_code,
}


def pages() -> list[Path]:
    """README and pages of docs/ that hold the marker of at least one of ``SECTIONS``."""
    found = (
        path for path in [DOCS.parent / "README.md", *sorted(DOCS.rglob("*.md"))] if path.exists()
    )
    return [path for path in found if SECTIONS.keys() & set(MARKER.findall(path.read_text()))]


def current(path: Path) -> str:
    """Text of a page with its sections made anew from the result files.

    Raises:
        ValueError: a section does not end.
    """
    text = path.read_text()
    for name in MARKER.findall(text):
        if name in SECTIONS:
            text = report.with_section(text, _linked(SECTIONS[name](), path), name, path)
    return text


def _linked(section: str, page: Path) -> str:
    """``section`` with its links, written for a page in docs/, made relative to ``page``."""

    def link(match: re.Match[str]) -> str:
        place = DOCS / match[2] if match[1] else DOCS.parent / match[2]
        return f"]({os.path.relpath(place, page.parent)}"

    return re.sub(r"\]\(\.\./(docs/)?([^)#]+)", link, section)


def main() -> None:
    headlines.draw(DOCS / "images" / "speed.svg")
    for path in pages():
        text = current(path)
        if text != path.read_text():
            with replacing(path) as file:
                file.write_text(text)
            print(path.relative_to(DOCS.parent))


if __name__ == "__main__":
    main()
