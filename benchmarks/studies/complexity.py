"""Whether pictures that look busy get more tokens: ``python -m benchmarks.studies.complexity MODEL FOLDER``.

FOLDER holds pictures and ``scores.csv`` (columns ``file`` and ``complexity``: people's judgement, higher is busier).
Spearman's rank correlation of the judgement with the tokens that a picture needs at each of some pixel errors, and, as
a yardstick, with the size of its file. ``alit analyze`` says more, with intervals.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from alit import AdaptiveTokenizer
from alit.analysis import THRESHOLDS, errors, lengths, read_pictures, read_scores, spearman
from alit.analysis.rollouts import tokens_needed

from ..harness.timing import write


def measure(model: AdaptiveTokenizer, folder: Path, batch_size: int) -> dict[str, Any]:
    pictures = read_pictures("folder", folder, model.config.image_size)
    scores = read_scores(folder / "scores.csv", pictures)
    found = errors(model, pictures.levels, batch_size=batch_size)
    rows = []
    for limit in THRESHOLDS:
        tokens, met = tokens_needed(found, lengths(model), limit)
        rows.append(
            {
                "max_l1": limit,
                "spearman": spearman(tokens, scores, seed=0).value,
                "tokens": float(tokens.float().mean()),
                "met": float(met.float().mean()),
            }
        )
    sizes = [(folder / name).stat().st_size for name in pictures.names]
    jpeg = spearman(sizes, scores, seed=0).value
    return {"pictures": len(pictures), "tokens_at": rows, "jpeg_size": jpeg}


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
