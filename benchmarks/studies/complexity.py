"""Whether pictures that look busy get more tokens: ``python -m benchmarks.studies.complexity MODEL FOLDER``.

FOLDER holds pictures and ``scores.csv`` (columns ``file`` and ``complexity``: people's judgement, higher is busier).
Spearman's rank correlation of the judgement with the tokens that a picture needs at each of some pixel errors, and, as
a yardstick, with the size of its JPEG file.
"""

from __future__ import annotations

import argparse
import csv
from pathlib import Path
from typing import Any

import torch
from scipy.stats import spearmanr
from torch import Tensor

from alit import AdaptiveTokenizer, MaxL1
from alit.images import load

from ..harness.timing import write

#: Errors at which tokens are counted.
LIMITS = (0.04, 0.05, 0.06, 0.07, 0.08, 0.09, 0.1)


@torch.no_grad()
def errors(model: AdaptiveTokenizer, files: list[Path], batch_size: int) -> Tensor:
    """Pixel L1 of each picture after each iteration, (B, iterations)."""
    parts = []
    for start in range(0, len(files), batch_size):
        some = files[start : start + batch_size]
        images = torch.stack([load(file, model.config.image_size) for file in some])
        parts.append(
            torch.stack([MaxL1(0.0).error(x, model) for x in model.rollout(images)], dim=1)
        )
    return torch.cat(parts)


def measure(model: AdaptiveTokenizer, folder: Path, batch_size: int) -> dict[str, Any]:
    with (folder / "scores.csv").open(newline="") as file:
        scores = {row["file"]: float(row["complexity"]) for row in csv.DictReader(file)}
    files = [folder / name for name in scores]
    found, rows = errors(model, files, batch_size), []

    def spearman(values: Any) -> float:
        return float(spearmanr(list(scores.values()), values).statistic)

    for limit in LIMITS:
        met = found < limit
        first = torch.where(met.any(1), met.int().argmax(1), found.shape[1] - 1)
        tokens = model.config.latents_per_iteration * (first + 1)
        rows.append(
            {
                "max_l1": limit,
                "spearman": spearman(tokens),
                "tokens": float(tokens.float().mean()),
                "met": float(met.any(1).float().mean()),
            }
        )
    jpeg = spearman([file.stat().st_size for file in files])
    return {"pictures": len(files), "tokens_at": rows, "jpeg_size": jpeg}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("model", help="model file, or the name of shipped weights")
    parser.add_argument("folder", type=Path)
    options = parser.parse_args()
    model = AdaptiveTokenizer.from_pretrained(options.model)
    write("complexity", measure(model, options.folder, batch_size=20))


if __name__ == "__main__":
    main()
