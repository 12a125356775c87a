"""Model card for the Hugging Face Hub, from a model's file and an evaluation of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from .alit_format import ModelIdentity
from .atomic_files import reading
from .checks import check_choice
from .config import AdaptiveTokenizerConfig

#: Columns of an evaluation's table, shown if every length has a value: field, title, format.
QUALITIES = (
    ("l1", "L1", ".4f"),
    ("psnr", "PSNR", ".2f"),
    ("ssim", "SSIM", ".3f"),
    ("lpips", "LPIPS", ".3f"),
    ("rfid", "rFID", ".2f"),
    ("top1", "top-1", ".2f"),
    ("top5", "top-5", ".2f"),
)
CARD = """\
---
library_name: alit
{license}tags:
- image-tokenization
- adaptive-length
---

# {title}

An adaptive-length image tokenizer: an image becomes as few tokens as it needs, and an image again. A model of `alit`,
an implementation of ALIT (Duggal et al., *Adaptive Length Image Tokenization via Recurrent Allocation*, ICLR 2025,
[arXiv 2411.02393](https://arxiv.org/abs/2411.02393)).

| | |
|---|---|
{rows}

## Use

With `alit` and its extra `hub`:

```python
from alit import AdaptiveTokenizer

model = AdaptiveTokenizer.from_pretrained("{name}")
```

```
alit reconstruct photo.jpg --model {name}
```
{evaluation}
This page was filled from {sources}.
"""
EVALUATION = """
## Evaluation

Of {images}, protocol "{protocol}", by `alit evaluate`: means over images, pixels in [0, 1].

{table}
"""


def write(
    name: str,
    config: AdaptiveTokenizerConfig,
    identity: ModelIdentity,
    parameters: int,
    *,
    license: str | None = None,
    evaluation: str | Path | None = None,
) -> str:
    """Model card, in Markdown.

    Args:
        name: ``owner/name``.
        parameters: how many the model has, without codebooks.
        license: identifier; None: the card names none.
        evaluation: file of ``alit evaluate``; None: the card has no numbers.

    Raises:
        ValueError: the file is no evaluation, or one of a model of another image size or other lengths.
        OSError: the evaluation cannot be read.
    """
    rows = _rows(config, identity, parameters)
    return CARD.format(
        name=name,
        title=name.rpartition("/")[2],
        license="" if license is None else f"license: {json.dumps(license)}\n",
        rows="\n".join(f"| {what} | {said} |" for what, said in rows.items()),
        evaluation="" if evaluation is None else _evaluation(Path(evaluation), config),
        sources="the model file, which does not say what the model was trained on"
        if evaluation is None
        else "the model file and the evaluation, which do not say what images the model was trained and evaluated on",
    )


def _rows(
    config: AdaptiveTokenizerConfig, identity: ModelIdentity, parameters: int
) -> dict[str, str]:
    height, width = config.image_size
    step, most, base = config.latents_per_iteration, config.max_tokens, config.base
    if config.bottleneck == "quantized":
        codes = f"{config.codebook_size} codes of {config.code_dim} channels"
        each = ", one for each iteration" * (config.codebooks == "each")
        tokens = {"bits per token": str(identity.bits), "codebook": codes + each}
    else:
        channels = config.encoder.width if config.bottleneck == "unfactorized" else config.code_dim
        tokens = {"a token": f"{channels} numbers ({config.bottleneck})"}
    return {
        "image size": f"{width}x{height} pixels",
        "tokens per image": f"1 to {most}"
        if config.any_length
        else f"{step} to {most}, in steps of {step}",
        **tokens,
        "recurrence": f"{config.recurrence}, {config.iterations} iterations",
        "base": f"{base.kind}, patches of {base.patch_size}x{base.patch_size} pixels, {base.latent_channels} channels",
        "encoder, decoder": ", ".join(
            f"{part.layers} layers of width {part.width}"
            for part in (config.encoder, config.decoder)
        ),
        "parameters": f"{parameters:,}, without codebooks",
        "fingerprint": f"`{identity.fingerprint.hex()[:12]}`, which `alit info` shows of files that the model wrote",
    }


def _evaluation(path: Path, config: AdaptiveTokenizerConfig) -> str:
    with reading(path) as file:
        text = file.read()
    try:
        found = json.loads(text)
        lengths = found["lengths"]
        measured = found["image_size"], [x["tokens"] for x in lengths]
        table = _table(lengths)
        kind = "drawn image" if found["kinds"] else "image"
        images = f"{found['images']:d} {kind}" + "s" * (found["images"] != 1)
        check_choice("protocol", protocol := found["protocol"], ("pinned", "official"))
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise ValueError(
            f"evaluation: expected the evaluation.json of alit evaluate, got {path} ({type(error).__name__}: {error})"
        ) from error
    own = (
        list(config.image_size),
        list(
            range(config.latents_per_iteration, config.max_tokens + 1, config.latents_per_iteration)
        ),
    )
    if measured != own:
        raise ValueError(
            f"evaluation: expected one of images {own[0]} and lengths {own[1]}, got {measured[0]} and {measured[1]}"
        )
    return EVALUATION.format(images=images, protocol=protocol, table=table)


def _table(lengths: list[dict[str, Any]]) -> str:
    """Markdown table of an evaluation; it shows numbers alone, nothing else of the file."""
    qualities = [x for x in QUALITIES if all(row["model"][x[0]] is not None for row in lengths)]
    lines = ["| " + " | ".join(["tokens", "bits", *(title for _, title, _ in qualities)]) + " |"]
    lines += ["|" + "---|" * (2 + len(qualities))]
    for row in lengths:
        cells = [f"{row['tokens']:d}", f"{row['bits']:.0f}"]
        cells += [f"{row['model'][field]:{form}}" for field, _, form in qualities]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)
