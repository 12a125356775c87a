"""Plot curves of training runs: ``python -m benchmarks.studies.curves OUT.png RUN/log.jsonl ...``, one panel a run.

The terms drawn are those of the first, second, fourth and last iteration (``code_0``, ``l1_7``), or ``l1`` of a run
without iterations. Values are means over a fiftieth of the run.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("Agg")
from matplotlib import pyplot

ITERATIONS = (0, 1, 3, 7)
UNITS = {"code": "squared error of base tokens", "l1": "L1, pixels in [0, 1]"}


def terms(records: list[dict[str, float]]) -> list[str]:
    """Names of the terms of a run that are drawn."""
    names = {name for record in records for name in record}
    wanted = [f"{kind}_{i}" for kind in ("code", "l1") for i in ITERATIONS]
    return [name for name in wanted if name in names] or ["l1"]


def smooth(records: list[dict[str, float]], name: str) -> np.ndarray:
    """Steps and values of a term, (2, n), each a mean over a fiftieth of the run."""
    found = np.array([(record["step"], record[name]) for record in records if name in record])
    size = max(1, len(found) // 50)
    return np.stack([found[i : i + size].mean(0) for i in range(0, len(found), size)], axis=1)


def main() -> None:
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    out, *logs = map(Path, sys.argv[1:])
    size = (4.6 * len(logs), 3.6)
    figure, panels = pyplot.subplots(1, len(logs), figsize=size, squeeze=False)
    for axes, path in zip(panels[0], logs, strict=True):
        records = [json.loads(line) for line in path.read_text().splitlines()]
        for name in terms(records):
            kind, _, iteration = name.partition("_")
            label = f"iteration {int(iteration) + 1}" if iteration else "L1"
            axes.plot(*smooth(records, name), label=label)
            axes.set_ylabel(UNITS[kind])
        axes.set(xlabel="step", title=path.parent.name, yscale="log")
        axes.legend(frameon=False)
        axes.grid(alpha=0.3, which="both")
    figure.tight_layout()
    figure.savefig(out, dpi=80, pil_kwargs={"optimize": True})


if __name__ == "__main__":
    main()
