"""``alit demo --train``: a nano tokenizer trained live on photographs that come with scikit-image."""

from __future__ import annotations

from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from rich.table import Table

from ..console import console
from ..tokenizer import AdaptiveTokenizer
from ..training import TrainingConfig, train
from . import figures, photographs
from .measure import Measured, measure

#: Photographs to train on; more would take longer.
COUNT = 12


def run(output: Path, seconds: float, image_size: int, seed: int, device: str) -> dict[str, Any]:
    """Train, then write ``reconstructions.png``, ``error.png`` and ``loss.png`` to ``output``.

    Returns:
        Results: folder, steps, the code error at first and at last, and the mean pixel error at each length.

    Raises:
        ValueError: an image size that does not fit.
        OSError: ``output`` cannot be written.
    """
    torch.manual_seed(seed)
    model = AdaptiveTokenizer.from_size(
        "nano", base="dct", bottleneck="continuous", image_size=image_size, latents_per_iteration=8
    )
    photos = dict(list(photographs(image_size).items())[:COUNT])
    output.mkdir(parents=True, exist_ok=True)
    count = sum(p.numel() for p in model.parameters()) / 1e6
    console.print(
        f"nano tokenizer, {count:.1f} M parameters, DCT base, trained {seconds:.0f} s on {COUNT} photographs"
    )
    config = TrainingConfig(
        steps=1_000_000,
        seconds=seconds,
        batch_size=COUNT,
        learning_rate=1e-3,
        warmup=0.03,
        flip=False,
        ema=0.99,
        iterations_per_step=1,
        first_only=0.25,
        precision="float32",
        log_every=1,
        seed=seed,
        device=device,
    )
    errors: list[float] = []

    def on_log(record: dict[str, float]) -> None:
        errors.append(next(x for name, x in record.items() if name.startswith("code_")))

    train(config, model=model, images=torch.stack(list(photos.values())), on_log=on_log)
    first, last = fmean(errors[:10]), fmean(errors[-10:])
    console.print(f"{len(errors)} steps, code error {first:.4f} at first, {last:.4f} at last")
    measured = measure(model, photos)
    figures.reconstructions(measured, output / "reconstructions.png", photos)
    figures.error(measured, output / "error.png")
    figures.loss(errors, output / "loss.png")
    if not console.as_json:
        console.print(_table(measured))
    return {
        "folder": str(output.resolve()),
        "steps": len(errors),
        "code_error": {"first": first, "last": last},
        "l1": dict(zip(map(str, measured.lengths), measured.l1.mean(1).tolist(), strict=True)),
    }


def _table(measured: Measured) -> Table:
    table = Table("tokens", "L1, mean", "best", "worst", title="mean absolute pixel error")
    for length, errors in zip(measured.lengths, measured.l1, strict=True):
        numbers = errors.mean(), errors.min(), errors.max()
        table.add_row(str(length), *(f"{x:.3f}" for x in numbers))
    return table
