"""Correlations of a model's tokens with people's judgment: ``python -m benchmarks.studies.analysis MODEL [NAME]``.

The sections of ``alit analyze`` that need people's judgment: complexity on images with ``scores.csv``,
specialization on images with segments. Writes ``results/analysis/NAME.json`` (``nano`` by default) and the tables of
``docs/analysis.md``, of all files there.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from alit import AdaptiveTokenizer
from alit.analysis import Interval, errors, read_images, read_scores, read_segments
from alit.analysis.complexity import complexity
from alit.analysis.specialization import specialization
from alit.atomic_files import replacing

from ..harness.report import with_section
from ..harness.timing import RESULTS, machine, write_json

FOLDER = RESULTS / "analysis"
PAGE = RESULTS.parents[1] / "docs" / "analysis.md"
BATCH = 20
#: Measures that tokens are compared with -> their names in the table.
YARDSTICKS = {
    "first": "L1 after the first iteration",
    "jpeg": "JPEG size",
    "entropy": "entropy of gray levels",
}


def rounded(interval: Interval | None) -> list[float | None]:
    """Value, lower and upper bound, each rounded to four decimals or None."""
    assert interval is not None
    found = (interval.value, interval.low, interval.high)
    return [None if x is None else round(x, 4) for x in found]


def of_objects(model: AdaptiveTokenizer, folder: Path) -> dict[str, Any]:
    """Spearman's correlations of tokens and of ``YARDSTICKS`` with the people's scores in ``scores.csv``."""
    images = read_images("objects", folder, model.config.image_size)
    scores = read_scores(folder / "scores.csv", images)
    its_errors = errors(model, images.levels, batch_size=BATCH)
    found = complexity(images, its_errors, model.config.lengths, scores)
    rows = [
        {
            "max_l1": row.max_l1,
            "tokens": round(row.tokens, 2),
            "met": round(row.met, 4),
            "scores": rounded(row.scores),
            "scores_given_first": rounded(row.scores_given_first),
            "jpeg": rounded(row.jpeg),
            "entropy": rounded(row.entropy),
        }
        for row in found.thresholds
    ]
    yardsticks = {name: rounded(getattr(found, name)) for name in YARDSTICKS}
    return {"images": len(images), "scores_with": yardsticks, "tokens_at": rows}


def of_scenes(model: AdaptiveTokenizer, folder: Path, segments: Path) -> dict[str, Any]:
    """Overlaps of attention maps and of controls with people's segments."""
    size = model.config.image_size
    images = read_images("scenes", folder, size)
    found, _ = specialization(
        model, images, read_segments(segments, images, size), batch_size=BATCH
    )
    return {
        "images": found.images,
        "segments": found.segments,
        "grid": list(found.grid),
        "layer": found.layer,
        "maps": [
            {"of": row.maps, "oracle": rounded(row.oracle), "mean_std": rounded(row.mean_std)}
            for row in (found.tokens, *found.controls)
        ],
    }


def read(folder: Path) -> dict[str, Any]:
    """Results of the JSON files of a folder, by file name without suffix."""
    return {x.stem: json.loads(x.read_text())["results"] for x in sorted(folder.glob("*.json"))}


def tables(found: Mapping[str, Any]) -> str:
    """Markdown tables of these results, a column for each name; values with their intervals."""
    scores: dict[str, list[str]] = {}
    overlaps: dict[str, list[str]] = {}
    for each in found.values():
        objects, scenes = each["objects"], each["scenes"]
        for row in objects["tokens_at"]:
            scores.setdefault(f"tokens at L1 {row['max_l1']}", []).append(_shown(row["scores"]))
        for name, text in YARDSTICKS.items():
            scores.setdefault(text, []).append(_shown(objects["scores_with"][name]))
        for row in objects["tokens_at"]:
            name = f"tokens at L1 {row['max_l1']}, given L1 after the first iteration"
            scores.setdefault(name, []).append(_shown(row["scores_given_first"]))
        for row in scenes["maps"]:
            overlaps.setdefault(row["of"], []).append(_shown(row["oracle"]))
    return "\n".join(
        [*_table("scores with", found, scores), "", *_table("segments with", found, overlaps)]
    )


def _shown(values: list[float | None]) -> str:
    value, low, high = values
    return "undefined" if value is None else f"{value:.3f} ({low:.3f} to {high:.3f})"


def _table(first: str, columns: Iterable[str], rows: Mapping[str, list[str]]) -> list[str]:
    head = [first, *columns]
    lines = [head, ["---"] * len(head), *([name, *cells] for name, cells in rows.items())]
    return [f"| {' | '.join(line)} |" for line in lines]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("model", help="model file, or the name of shipped weights")
    parser.add_argument("name", nargs="?", default="nano", help="of the file of results")
    parser.add_argument("--objects", type=Path, default=Path("complexity_objects"))
    parser.add_argument("--scenes", type=Path, default=Path("photos256/val"))
    parser.add_argument("--segments", type=Path, default=Path("photos256/val_segments"))
    options = parser.parse_args()
    model = AdaptiveTokenizer.from_pretrained(options.model)
    with torch.no_grad():
        results = {
            "model": model.identity().fingerprint.hex(),
            "objects": of_objects(model, options.objects),
            "scenes": of_scenes(model, options.scenes, options.segments),
        }
    command = " ".join(["python -m benchmarks.studies.analysis", *sys.argv[1:]])
    FOLDER.mkdir(exist_ok=True)
    write_json(
        FOLDER / f"{options.name}.json",
        {"command": command, "machine": machine(), "results": results},
    )
    text = with_section(PAGE.read_text(), tables(read(FOLDER)), "analysis", PAGE)
    with replacing(PAGE) as file:
        file.write_text(text)


if __name__ == "__main__":
    main()
