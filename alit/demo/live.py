"""``alit demo --train``: a nano tokenizer trained live on photographs that come with scikit-image."""

from __future__ import annotations

import time
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from torch import Tensor

from ..console import printable
from ..criteria import FixedLength
from ..images import save_image, to_image
from ..tokenizer import AdaptiveTokenizer
from ..training import TrainingConfig, train
from .figures import pyplot, save, spread
from .photographs import photographs

#: It learns these; more would take longer.
COUNT = 12


def run(
    output: Path, *, seconds: float, image_size: int, seed: int, device: str, console: Console
) -> None:
    """Train, then write ``reconstructions.png``, ``error.png`` and ``loss.png`` to ``output``.

    Raises:
        ValueError: an image size that does not fit.
        OSError: ``output`` cannot be written.
    """
    start = time.monotonic()
    torch.manual_seed(seed)
    pyplot()  # a missing library is reported before any work
    model = AdaptiveTokenizer.from_size(
        "nano", base="dct", bottleneck="continuous", image_size=image_size, latents_per_iteration=8
    )
    photos = dict(list(photographs(image_size).items())[:COUNT])
    output.mkdir(parents=True, exist_ok=True)
    images = torch.stack(list(photos.values()))
    count = sum(p.numel() for p in model.parameters()) / 1e6
    console.print(
        f"nano tokenizer, {count:.1f} M parameters, DCT base, trained {seconds:.0f} s on {len(images)} photographs"
    )
    errors = _train(
        model,
        images,
        TrainingConfig(
            steps=1_000_000,
            seconds=seconds,
            batch_size=len(images),
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
        ),
        console,
    )
    console.print(
        f"{len(errors)} steps, code error {_mean(errors[:10]):.4f} at first, {_mean(errors[-10:]):.4f} at last"
    )

    rows, l1, inputs = [], [], images.to(model.latent_tokens.device)
    lengths = [model.config.latents_per_iteration * (i + 1) for i in range(model.config.iterations)]
    for length in lengths:
        decoded = model.decode(model.encode(inputs, FixedLength(length))).cpu()
        rows.append(decoded)
        l1.append((decoded - images).abs().mean((1, 2, 3)))
    table = torch.stack(l1, dim=1)
    save_image(
        _contact_sheet(list(photos), images, rows, lengths, table), output / "reconstructions.png"
    )
    _plot_error(list(photos), lengths, table, output / "error.png")
    _plot_loss(errors, output / "loss.png")
    _report(lengths, table, console)
    console.out(f"pictures in {printable(output.resolve())} after {time.monotonic() - start:.0f} s")


def _train(
    model: AdaptiveTokenizer, images: Tensor, config: TrainingConfig, console: Console
) -> list[float]:
    columns = (
        TextColumn("step {task.fields[step]}"),
        BarColumn(),
        TextColumn("code error {task.fields[error]:.4f}"),
    )
    with Progress(*columns, TimeRemainingColumn(), console=console) as progress:
        task = progress.add_task("training", total=1.0, step=0, error=float("nan"))

        errors: list[float] = []

        def on_log(record: dict[str, float]) -> None:
            errors.append(next(x for name, x in record.items() if name.startswith("code_")))
            progress.update(
                task, completed=min(record["done"], 1.0), step=len(errors), error=errors[-1]
            )

        train(config, model=model, images=images, on_log=on_log)
        return errors


def _report(lengths: list[int], table: Tensor, console: Console) -> None:
    view = Table("tokens", "L1, mean", "best", "worst", title="mean absolute pixel error")
    for length, column in zip(lengths, table.t(), strict=True):
        view.add_row(
            str(length),
            *(f"{float(value):.3f}" for value in (column.mean(), column.min(), column.max())),
        )
    console.print(view)


def _contact_sheet(
    names: list[str], images: Tensor, rows: list[Tensor], lengths: list[int], table: Tensor
) -> Image.Image:
    """One line per photograph: the original, then a reconstruction per length with its error below."""
    size, label, gap = images.shape[-1], 18, 4
    sheet = Image.new(
        "RGB",
        ((size + gap) * (len(lengths) + 1) + gap, (size + label + gap) * len(names) + label + gap),
        "white",
    )
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(12)
    for column, title in enumerate(["original", *(f"{length} tokens" for length in lengths)]):
        draw.text((gap + column * (size + gap), 2), title, fill="black", font=font)
    for line, name in enumerate(names):
        top = label + line * (size + label + gap)
        for column, picture in enumerate([images[line], *(row[line] for row in rows)]):
            left = gap + column * (size + gap)
            sheet.paste(to_image(picture), (left, top))
            caption = name if column == 0 else f"L1 {table[line, column - 1]:.3f}"
            draw.text((left, top + size + 1), caption, fill="black", font=font)
    return sheet


def _plot_error(names: list[str], lengths: list[int], table: Tensor, path: Path) -> None:
    figure, axes = pyplot().subplots(figsize=(7, 4.5))
    ends = spread(table[:, -1].tolist(), gap=float(table.max()) / 30)
    for name, row, height in zip(names, table.tolist(), ends, strict=True):
        axes.plot(lengths, row, color="0.75", linewidth=1)
        axes.text(lengths[-1] * 1.015, height, name, fontsize=7, va="center")
    axes.plot(
        lengths, table.mean(0).tolist(), color="tab:blue", linewidth=2.5, marker="o", label="mean"
    )
    axes.set(
        xlabel="tokens",
        ylabel="mean absolute pixel error (L1)",
        xticks=lengths,
        title="Error against tokens",
    )
    axes.margins(x=0.15)
    axes.set_ylim(bottom=0)
    axes.legend()
    figure.tight_layout()
    save(figure, path)


def _plot_loss(errors: list[float], path: Path) -> None:
    figure, axes = pyplot().subplots(figsize=(7, 3.5))
    axes.plot(range(1, len(errors) + 1), errors, linewidth=1)
    axes.set(xlabel="step", ylabel="code error (mse)", yscale="log", title="Training")
    figure.tight_layout()
    save(figure, path)


def _mean(values: list[float]) -> float:
    return sum(values) / max(1, len(values))
