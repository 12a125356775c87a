"""What generators learn in minutes: ``python -m benchmarks.studies.generation causal`` and ``... masked``.

Drawn shapes on plain backgrounds, encoded in as many tokens as their contrast asks for (``RelativeL1``) by a transform
coder that is made of such images; a generator of the three kinds of shape, trained on their tokens; samples of it,
decoded. A judge (``tests/helpers/shapes.py``) tells whether an image is a shape on a background, and which: of
reconstructions, of samples, and of what it must refuse: noise, means of two images, tokens of two images in one, a
shape with rows out of place. Distances of lengths are half the sum of absolute differences of shares; that of two parts
of the data shows what chance does. Seconds are those of the process. Everything is made anew, with one thread.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from PIL.Image import Dither, Quantize
from torch import Tensor

from alit import AdaptiveTokenizer, RelativeL1, TokenSequence
from alit.generation import Generator, sample
from alit.images import save_image, to_image
from alit.training import TrainingConfig, train
from tests.helpers.coder import OPTIONS
from tests.helpers.shapes import KINDS, SIDE, judged, shapes

from ..harness.timing import RESULTS, OtherLoad, write

IMAGES, SAMPLES = 4000, 500
CRITERION = 0.17
BATCH = 50
#: Options of samples that are sharper than the generator's own, chosen by the share of valid ones.
SHARP: dict[str, dict[str, Any]] = {
    "causal": {"temperature": 0.7, "top_p": 0.95},
    "masked": {"temperature": 0.3, "steps": 48},
}
STEPS = {"causal": 1500, "masked": 6000}
COMMON: dict[str, Any] = {
    **{"device": "cpu", "precision": "float32", "tensorboard": False, "workers": 0},
    **{"crop": 1, "flip": False},
}


def coder(folder: Path) -> AdaptiveTokenizer:
    """Made of images, without a step of training."""
    (folder / "images").mkdir()
    for number, image in enumerate(shapes(IMAGES).images):
        save_image(to_image(image), folder / "images" / f"{number:05}.png")
    model = {"size": "nano", **OPTIONS, "codebook_size": 1024, "code_dim": 16}
    model |= {name: dataclasses.asdict(OPTIONS[name]) for name in ("encoder", "decoder")}
    model["base"] = {"kind": "dct", "patch_size": 8, "luma": 20, "chroma": 8, "lapped": True}
    config = TrainingConfig(
        model=model,
        initialization="transform_coder",
        data=str(folder / "images"),
        steps=0,
        **COMMON,
    )
    made = train(config).model
    assert isinstance(made, AdaptiveTokenizer)
    made.save_pretrained(folder / "coder.safetensors")
    return made


def encoded(model: AdaptiveTokenizer, folder: Path) -> TokenSequence:
    """The data, with a file for each kind of shape."""
    drawn = shapes(IMAGES, seed=1)
    parts = [model.encode(x, RelativeL1(CRITERION)) for x in drawn.images.split(BATCH)]
    tokens = TokenSequence.concatenate(parts)
    (folder / "tokens").mkdir()
    for kind, name in enumerate(KINDS):
        own = [tokens[number] for number, x in enumerate(drawn.kinds) if x == kind]
        data = TokenSequence.concatenate(own).to_bytes(model.identity())
        (folder / "tokens" / f"{name}.alit").write_bytes(data)
    return tokens


def decoded(model: AdaptiveTokenizer, tokens: TokenSequence) -> Tensor:
    each = [tokens[number] for number in range(len(tokens))]
    some = (TokenSequence.concatenate(each[n : n + BATCH]) for n in range(0, len(each), BATCH))
    return torch.cat([torch.stack(list(model.decode(x))) for x in some])


def valid(images: Tensor) -> float:
    """The share that the judge takes for shapes."""
    return sum(judged(image) is not None for image in images) / len(images)


def calibration(model: AdaptiveTokenizer, tokens: TokenSequence) -> dict[str, float]:
    """What the judge says of reconstructions, and of what is no shape; those images are other kinds or colors."""
    some = TokenSequence.concatenate([tokens[number] for number in range(SAMPLES)])
    images, random = decoded(model, some), torch.Generator().manual_seed(0)
    kinds = shapes(IMAGES, seed=1).kinds[:SAMPLES]
    other = torch.randperm(SAMPLES, generator=random)
    padded, of_other = some.padded(), some.padded()[other]
    longest = int(some.lengths.max())
    both = some.lengths.minimum(some.lengths[other])
    mixed = torch.where(torch.arange(longest) % 2 == 0, padded, of_other)
    inside = torch.arange(longest) < both[:, None]
    shuffled = some.rows[torch.randperm(len(some.rows), generator=random)]
    right = sum(judged(image) == kind for image, kind in zip(images, kinds, strict=True))
    bands = [x.roll(12 * (number % 2), 3) for number, x in enumerate(images.split(8, 2))]
    return {
        "reconstructions": valid(images),
        "reconstructions_right_kind": right / SAMPLES,
        "noise": valid(torch.rand(SAMPLES, 3, SIDE, SIDE, generator=random)),
        "means_of_two": valid((images + images[other]) / 2),
        "tokens_of_two_in_turns": valid(decoded(model, TokenSequence(both, mixed[inside]))),
        "rows_out_of_place": valid(torch.cat(bands, 2)),
        "shuffled_tokens": valid(decoded(model, TokenSequence(some.lengths, shuffled))),
    }


def distance(one: Tensor, other: Tensor) -> float:
    """Total variation of two samples of lengths."""
    shares = [x.bincount(minlength=129) / len(x) for x in (one, other)]
    return float((shares[0] - shares[1]).abs().sum() / 2)


def commit() -> str:
    """Of the sources, with a word behind it where they differ."""
    command = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    found = subprocess.run(command, cwd=RESULTS, check=True, capture_output=True, text=True)
    return found.stdout.strip()


def main(kind: str, keep: Path | None, again: bool) -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name, OtherLoad() as load:
        folder = Path(name)
        model = coder(folder)
        tokens = encoded(model, folder)
        if again:
            assert keep is not None
            trained = Generator.from_pretrained(keep / f"{kind}.safetensors")
            assert trained.config.identity == model.identity()
            facts = json.loads((RESULTS / f"generation-{kind}.json").read_text())["results"]
        else:
            trained, facts = learned(kind, model, tokens, folder)
            if keep is not None:
                trained.save_pretrained(keep / f"{kind}.safetensors")
        for sharpness, options in {"plain": {}, "sharp": SHARP[kind]}.items():
            file = RESULTS / f"generation-{kind}-{sharpness}.png"
            facts[sharpness] = options | sampled(trained, model, tokens, options, file)
    write("generation", {**facts, "other_load_percent": load.percent}, part=kind)


def learned(
    kind: str, model: AdaptiveTokenizer, tokens: TokenSequence, folder: Path
) -> tuple[Generator, dict[str, Any]]:
    """Generator trained on the tokens, and what its result file says of the data, the judge and the training."""
    judge = calibration(model, tokens)
    print(float(tokens.lengths.double().mean()), judge, flush=True)
    config = TrainingConfig(
        stage="generator",
        data=str(folder / "tokens"),
        labels="files",
        tokenizer=str(folder / "coder.safetensors"),
        generator={"causal": kind == "causal", "width": 192, "layers": 4, "heads": 4},
        steps=STEPS[kind],
        batch_size=32,
        learning_rate=1.5e-3,
        warmup=0.03,
        ema=0.99,
        log_every=50,
        **COMMON,
    )
    start, losses = time.process_time(), []

    def on_log(record: dict[str, float]) -> None:
        losses.append(round(record["loss"], 4))
        print(record["step"], losses[-1], flush=True)

    trained = train(config, on_log=on_log).model
    seconds = time.process_time() - start
    assert isinstance(trained, Generator)
    return trained, {
        "commit": commit(),
        "images": IMAGES,
        "mean_tokens": float(tokens.lengths.double().mean()),
        "judge": judge,
        "generator": config.generator,
        "steps": config.steps,
        "parameters": sum(x.numel() for x in trained.parameters()),
        "training_seconds": seconds,
        "losses": losses,
        "length_distance_of_halves": distance(*tokens.lengths[: 2 * SAMPLES].split(SAMPLES)),
        "samples": SAMPLES,
    }


def sampled(
    generator: Generator,
    model: AdaptiveTokenizer,
    tokens: TokenSequence,
    options: dict[str, Any],
    file: Path,
) -> dict[str, float]:
    """How good samples are; some of them go to a file."""
    start = time.process_time()
    samples = sample(generator, SAMPLES, **options)
    seconds = time.process_time() - start
    images, lengths = decoded(model, samples.tokens), samples.tokens.lengths
    found = [judged(image) for image in images]
    right = sum(x == label for x, label in zip(found, samples.labels, strict=True))
    rows = [torch.cat(list(row), 2) for row in images[:60].split(12)]
    sheet = to_image(torch.cat(rows, 1))
    save_image(sheet.quantize(256, Quantize.FASTOCTREE, dither=Dither.NONE), file)
    each = (samples.tokens[number] for number in range(SAMPLES))
    return {
        "seconds": seconds,
        "different": len({tuple(one.rows.tolist()) for one in each}),
        "valid": sum(x is not None for x in found) / SAMPLES,
        "valid_and_of_the_class": right / SAMPLES,
        "mean_tokens": float(lengths.double().mean()),
        "length_distance": distance(lengths, tokens.lengths),
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kind", choices=STEPS)
    parser.add_argument("--keep", type=Path, help="folder for the generator")
    parser.add_argument("--again", action="store_true", help="only sample from the one kept there")
    options = parser.parse_args()
    if options.again and options.keep is None:
        parser.error("--again: expected --keep with the folder of the generator")
    main(options.kind, options.keep, options.again)
