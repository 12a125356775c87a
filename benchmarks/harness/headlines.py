"""Speed figures of the project's README: a few numbers, each with its file, and a plot of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

from .outcome import table
from .plots import GRAY, OURS, PEER, plt, save
from .runs import ratios, read
from .timing import RESULTS


class Headline(NamedTuple):
    """One measured speedup: what, over which peer, on which machine, our speed over the peer's, and its result file."""

    what: str
    peer: str
    machine: str
    ratio: float
    file: str


def headlines() -> list[Headline]:
    """Headlines: CPU kernels, each in its least favorable case; adaptive encoding; host time of a step; a GPU step."""
    cpu, h200 = read(RESULTS / "cpu.json"), read(RESULTS / "h200")
    amd = f"{cpu.machine['cpu']}, {cpu.machine['threads']} threads"
    found = []
    fastest: dict[str, tuple[float, str]] = {}
    for group, peer, ratio in ratios(cpu):
        fastest.setdefault(group, (ratio, peer))
    for op in ("attention step", "VectorQuantizer step", "nearest_codeword"):
        (ratio, peer), group = min(
            (x, group) for group, x in fastest.items() if group.startswith(op)
        )
        found.append(Headline(group, peer, amd, ratio, "cpu.json"))
    adaptive = json.loads((RESULTS / "adaptive-encode.json").read_text())
    ratio = adaptive["results"]["wall"]["times_faster_than_official"]["CodeError"]
    machine = f"{adaptive['machine']['cpu']}, {adaptive['machine']['threads']} threads"
    what, peer = "encode until a limit is met, `small`", "published rule"
    found.append(Headline(what, peer, machine, ratio, "adaptive-encode.json"))
    host = json.loads((RESULTS / "host.json").read_text())
    ours, eager = (host["step"][name]["ms"] for name in ("ours", "eager baseline, fused attention"))
    what, machine = "host time of a training step, `base`", f"{host['machine']['cpu']}, no device"
    found.append(Headline(what, "eager, fused attention", machine, eager / ours, "host.json"))
    rows = h200.groups["stage-1 step base bfloat16 batch 12"]
    ratio = rows["eager baseline"].median / rows["ours, compiled and captured"].median
    what = "training step as a CUDA graph, `base`"
    found.append(Headline(what, "eager baseline", "NVIDIA H200", ratio, "h200/test_models.json"))
    return found


def table_of() -> str:
    rows = [
        [x.what, x.peer, f"**{x.ratio:.1f}**", f"[{x.machine}](../benchmarks/results/{x.file})"]
        for x in headlines()
    ]
    return table(("", "beside", "times as fast", "measured on"), "llrl", rows)


def draw(path: Path) -> None:
    """Write a bar chart of the headlines, on a logarithmic axis that begins at 1, as SVG to ``path``."""
    found = headlines()[::-1]
    figure, axes = plt.subplots(figsize=(7.2, 0.5 + 0.34 * len(found)))
    for place, x in enumerate(found):
        axes.barh(place, x.ratio - 1, left=1, height=0.62, color=OURS if x.ratio >= 1 else PEER)
        axes.text(x.ratio * 1.04, place, f"{x.ratio:.1f}", va="center", color=GRAY, fontsize=9)
    names = [f"{x.what.replace('`', '')}\nbeside {x.peer}" for x in found]
    axes.set_yticks(range(len(found)), names)
    axes.set_xscale("log")
    axes.set_xlim(1, 1.5 * max(x.ratio for x in found))
    axes.set_xticks(ticks := [1, 2, 5, 10, 20], list(map(str, ticks)))
    axes.minorticks_off()
    axes.set_xlabel("times as fast")
    axes.tick_params(axis="y", left=False)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    save(figure, path)
