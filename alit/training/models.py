"""Model of a run: where it comes from, its averaged weights, its state afterwards."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from .. import checks, model_file
from ..checks import CheckpointError
from ..config import BASES, AdaptiveTokenizerConfig, TransformerConfig
from ..console import reported
from ..generation import Generator, GeneratorConfig
from ..generation.model import write as write_generator
from ..tokenizer import AdaptiveTokenizer
from . import checkpoints
from .batches import preparation
from .config import TrainingConfig
from .image_data import ImageFolder, check_enough
from .initialization import as_transform_coder
from .processes import whole
from .stage import Stage
from .token_files import TokenFiles, TokenRows

#: Crops that the transform coder is made of, how many of them its last layer is fitted to, and how many at a time.
INITIAL_SAMPLE, INITIAL_FIT, INITIAL_BATCH = 24576, 512, 64
#: Share of crops that are small parts of images, magnified; sides of these as shares of the image's.
MAGNIFIED, PARTS = 1 / 8, (1 / 64, 1 / 8)


def build(config: TrainingConfig, checkpoint: Path | None) -> AdaptiveTokenizer | Generator:
    """Build the model that a configuration describes, or an untrained one that a checkpoint will fill.

    Raises:
        ValueError: unknown options; a base tokenizer with weights, but no file of them; one that does not fit; data
            that do not fit a generator.
    """
    if config.stage == "generator":
        return _generator(config) if checkpoint is None else _stored_generator(checkpoint)
    if checkpoint is not None:
        stored = json.dumps(checkpoints.about(checkpoint)["model"])
        try:
            described = AdaptiveTokenizerConfig.from_json(stored)
            model_file.check_sizes(described, checkpoints.shapes(checkpoint, "model"))
        except ValueError as error:
            raise CheckpointError(f"{checkpoint}: {error}") from error
        return AdaptiveTokenizer(described)
    if config.start_from is not None:
        return AdaptiveTokenizer.from_pretrained(Path(config.start_from))
    if config.stage == "length":
        raise ValueError(
            "start_from: stage length expects the model file that gets a length head, got none"
        )
    options = {"size": "nano", "base": "dct", **config.model}
    base_state: dict[str, Tensor] = {}
    if config.base_from is not None:
        base_config, state = model_file.read(model_file.resolve(Path(config.base_from)))
        options["base"] = base_config.base
        prefix = "base_tokenizer."
        base_state = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
    model = AdaptiveTokenizer(_described(options))
    if config.base_from is not None:
        model_file.load_state(model.base_tokenizer, base_state)
    elif config.stage != "base" and any(True for _ in model.base_tokenizer.parameters()):
        raise ValueError(
            f"model: a {model.config.base.kind} base tokenizer has weights; expected base_from or start_from, a model"
            " file to take them from, or base dct, which has none"
        )
    if config.initialization == "transform_coder":
        _as_transform_coder(model, config)
    return model


@torch.no_grad()
def _generator(config: TrainingConfig) -> Generator:
    """Generator that knows the classes of the data, and how often each has which length."""
    tokenizer = AdaptiveTokenizer.from_pretrained(Path(config.tokenizer))
    described = GeneratorConfig.of(tokenizer, config.generator)
    if config.start_from is not None:
        if config.generator:
            raise ValueError("generator: expected no options with start_from, which has its own")
        generator = Generator.from_pretrained(config.start_from)
        if generator.config.identity != described.identity:
            raise ValueError(
                f"start_from: expected a generator of the tokenizer {config.tokenizer}, got one of another"
            )
    files = TokenFiles(config.data, config.labels, described.identity, described.max_tokens)
    if config.start_from is None:
        classes = tuple(sorted(set(files.classes)))
        generator = Generator(dataclasses.replace(described, classes=classes))
    rows = TokenRows(files, generator.config.classes, generator.config.max_tokens)
    places = torch.tensor(rows.labels), torch.from_numpy(files.lengths)
    ones = torch.ones(len(rows))
    generator.lengths.zero_().index_put_(places, ones, accumulate=True)
    return generator


def _stored_generator(checkpoint: Path) -> Generator:
    """Untrained generator of the shape that a checkpoint holds."""
    shapes = checkpoints.shapes(checkpoint, "model")
    try:
        described = GeneratorConfig.from_json(json.dumps(checkpoints.about(checkpoint)["model"]))
        with torch.device("meta"):
            own = Generator(described).state_dict()
        if {name: tuple(x.shape) for name, x in own.items()} != shapes:
            raise ValueError("tensors of another generator")
    except ValueError as error:
        raise CheckpointError(f"{checkpoint}: {error}") from error
    return Generator(described)


@torch.no_grad()
def _as_transform_coder(model: AdaptiveTokenizer, config: TrainingConfig) -> None:
    """Initialize a model as a transform coder, from crops of images from all over the folder, as the run has them."""
    tokens: list[Tensor] = []
    some: list[Tensor] = []
    samples = _samples(config, model.config.image_size)
    for images in reported(samples, "reading crops", INITIAL_SAMPLE, "crops", size=len):
        tokens.append(model.base_tokenizer.encode(images).code_BNC)
        if sum(map(len, some)) < INITIAL_FIT:
            some.append(images)
    as_transform_coder(model, torch.cat(tokens), torch.cat(some))


def _samples(config: TrainingConfig, size: tuple[int, int]) -> Iterator[Tensor]:
    """Yield batches (B, 3, height, width) in [0, 1], each of images from all over the folder."""
    if config.data is None or not Path(config.data).is_dir():
        raise ValueError(f"data: transform_coder needs a folder of images, got {config.data!r}")
    folder = ImageFolder(config.data, size, **preparation(config))
    check_enough(folder, config.batch_size)  # the run would find out when this is done
    random, loaded = np.random.default_rng(config.seed), 0
    places = np.linspace(0, len(folder) - 1, INITIAL_SAMPLE).round().astype(int)
    chosen = random.permutation(places).tolist()
    for start in range(0, len(chosen), INITIAL_BATCH):
        found = []
        for index in chosen[start : start + INITIAL_BATCH]:
            with suppress(OSError):  # training skips and names it
                found.append(folder.load(index, random).float() / 255)
                if random.random() < MAGNIFIED:
                    found[-1] = _magnified(found[-1], random)
        loaded += len(found)
        if found:
            yield torch.stack(found)
    if not loaded:
        raise ValueError(f"data: none of {len(folder)} images can be read")


def _magnified(image: Tensor, random: np.random.Generator) -> Tensor:
    """Small part of an image (3, height, width) magnified to its size, each channel between random levels: smooth areas
    and soft edges of all colors, of which photographs have few.
    """
    height, width = image.shape[1:]
    share = PARTS[0] * (PARTS[1] / PARTS[0]) ** random.random()
    down, across = max(2, round(share * height)), max(2, round(share * width))
    top, left = int(random.integers(height - down + 1)), int(random.integers(width - across + 1))
    part = image[:, top : top + down, left : left + across]
    levels = torch.from_numpy(random.uniform(0, 1, (2, 3, 1, 1))).float()
    low, high = part.amin((1, 2), keepdim=True), part.amax((1, 2), keepdim=True)
    part = torch.lerp(levels[0], levels[1], (part - low) / (high - low).clamp(min=1 / 255))
    return interpolate(part[None], size=(height, width), mode="bicubic")[0].clamp(0, 1)


def _described(options: dict[str, Any]) -> AdaptiveTokenizerConfig:
    """Configuration from options of ``of_size``, with plain values, as YAML has them, in place of dataclasses."""
    values = dict(options)
    for name in ("encoder", "decoder"):
        if isinstance(values.get(name), dict):
            values[name] = checks.build(TransformerConfig, values[name], name)
    if isinstance(base := values.get("base"), dict):
        checks.check_choice("model.base.kind", base.get("kind"), tuple(BASES))
        values["base"] = checks.build(BASES[base["kind"]], base, "base")
    fields = [field.name for field in dataclasses.fields(AdaptiveTokenizerConfig)]
    for name in values:
        if name not in ("size", *fields):
            raise ValueError(f"model: no field {name!r}{checks.nearest(name, fields)}")
    try:
        return AdaptiveTokenizerConfig.of_size(values.pop("size"), **values)
    except TypeError as error:
        raise ValueError(f"model: {error}") from error


def check_same_model(model: AdaptiveTokenizer | Generator, checkpoint: Path) -> None:
    """Check that a given model has the configuration of the run that is resumed; raises ``ValueError``."""
    stored = model.config.from_json(json.dumps(checkpoints.about(checkpoint)["model"]))
    own, there = (json.loads(config.to_json()) for config in (model.config, stored))
    differ = sorted(name for name in own | there if own.get(name) != there.get(name))
    if differ:
        raise ValueError(
            f"model: {', '.join(differ)} differ from those of {checkpoint.name}, from which the run goes on"
        )


def averaged_state(stage: Stage) -> dict[str, Tensor]:
    """State dict of the model with averaged weights, gathered (every process calls it)."""
    state = stage.model.state_dict() | stage.average.tensors()
    return {name: whole(tensor).detach() for name, tensor in state.items()}


def write(path: Path, model: AdaptiveTokenizer | Generator, state: dict[str, Tensor]) -> None:
    """Write a file of the model with this state."""
    if isinstance(model, Generator):
        write_generator(path, model.config, state)
    else:
        model_file.write(path, model.config, state)


def rebuilt(
    model: AdaptiveTokenizer | Generator, state: dict[str, Tensor], *, sharded: bool
) -> AdaptiveTokenizer | Generator:
    """``model`` with this state, in evaluation mode; a new model where its weights are sharded."""
    if sharded:  # never a generator
        assert isinstance(model, AdaptiveTokenizer)
        model = AdaptiveTokenizer(model.config)
    with torch.no_grad():
        model.load_state_dict(state)
    return model.eval()


@contextmanager
def restoring_flags(model: AdaptiveTokenizer | Generator) -> Iterator[None]:
    """Context manager: at its end ``requires_grad`` is restored, and the model is in evaluation mode."""
    flags = [(p, p.requires_grad) for p in model.parameters()]
    try:
        yield
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
        model.eval()
