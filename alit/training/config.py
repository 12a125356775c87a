"""Configuration of a training run: one flat dataclass, from YAML or Python."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import reprlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_type_hints

import numpy as np

from ..atomic_files import reading
from ..checks import check_choice, nearest, renamed
from .fields import LARGEST_TEXT, LIMITS, converted, expect, read

CHOICES = {
    "stage": ("base", "1", "2", "length", "generator"),
    "precision": ("auto", "float32", "bfloat16"),
    "parallel": ("ddp", "fsdp"),
    "initialization": ("published", "transform_coder"),
    "perceptual": ("lpips", "efficientnet", "off"),
    "discriminators": ("each", "shared"),
}

#: Fields that a resumed run may change: they alter no result.
FREE = {
    *("output", "device", "keep", "tensorboard"),
    *("log_every", "image_every", "checkpoint_every"),
    # Places; what lies there has to be the same.
    *("data", "start_from", "base_from", "tokenizer"),
    "workers",  # which only decode, but for the order of shards
}


@dataclass(frozen=True)
class TrainingConfig:
    """Configuration of a training run.

    Attributes:
        stage: "base" trains the base tokenizer alone (the file it leaves is a later run's ``base_from``), "1" the
            adaptive tokenizer on a frozen base (latent distillation), "2" the adaptive tokenizer on pixels, its base
            frozen or trained with it; "length" only the length head of the model in ``start_from``, on what ``steps``
            batches record (:mod:`alit.training.length_stage`); "generator" a generator of token sequences.
        data: folder of images, or a pattern of WebDataset shards, ``shards/train-{000..099}.tar``: a local path,
            as are ``output``, ``start_from``, ``base_from`` and ``tokenizer``. In stage "generator" a file of tokens or
            a folder of them (:class:`alit.training.token_files.TokenFiles`).
        output: folder of the run: checkpoints, log, model. None keeps nothing.
        model: options of :meth:`alit.AdaptiveTokenizerConfig.of_size`, such as ``size``, ``base``, ``image_size``;
            ``base`` (with its ``kind``), ``encoder`` and ``decoder`` may be fields by name.
        generator: stage "generator": ``causal``, ``width``, ``layers``, ``heads`` (see
            :class:`alit.generation.GeneratorConfig`).
        tokenizer: stage "generator": the model that wrote the tokens, a file or the name of shipped weights.
        labels: stage "generator": where classes of images are: "files" (in the files' paths), or a CSV file of names
            and classes; None: there are none.
        initialization: of the weights that come from no file: "published", or "transform_coder" (see
            :func:`alit.training.initialization.as_transform_coder`), which needs a folder of images.
        start_from: model file (or name of shipped weights) to start from, instead of ``model``.
        base_from: model file whose base tokenizer is used; a VQGAN or KL-VAE has to come from somewhere.
        steps: optimizer steps. The learning rate follows their fraction. None, 0: the model as it starts.
        seconds: end of the run by the clock, if that comes first; a resumed run has what was left (one process only;
            never the same twice).
        batch_size: images of an optimizer step, over all processes and accumulated parts.
        accumulate: parts in which each process computes its share of the batch, one after another.
        learning_rate: at its peak; None: as published, 1.5e-4 (stage 2: 1e-4) times batch_size / 256; in stage
            "generator" 1e-3.
        warmup: fraction of the run in which the learning rate rises linearly; then it falls to 0 as a cosine.
        weight_decay: of linear and convolution weights; embeddings, norms, biases and codebook have none.
        betas, clip: of AdamW, and the largest gradient norm (a large number for none).
        ema: decay of the moving average of the weights, which becomes the model; less in the first steps.
        crop: smallest share of an image's area that a random crop keeps; 1 takes the center always.
        flip: mirror half of the images.
        convert_profiles: convert embedded color profiles to sRGB, as all commands do.
        max_megapixels: larger images are skipped and named, like damaged ones.
        regularizer: in stage "base", weight of the base tokenizer's own term beside the mean absolute pixel error: a
            KL-VAE's divergence in nats per pixel value, a VQGAN's quantizer loss.
        iterations_per_step: iterations whose loss counts, drawn anew for each step; the rollout ends with the last of
            them. None: all; in stage 2 one, in turn.
        through_time: gradients flow through all iterations, as published; False: each iteration learns from its own
            loss alone, and those without a loss run forward only, which is several times cheaper.
        first_only: fraction of the run, below 0.75, in which only the first iteration counts; the range grows to all
            of them until three quarters of the run: a latent has to carry something before the recurrence can refine
            it. None: all iterations from the start.
        tail_drop: stages 1 and 2: probability for each image and iteration that the decoder sees only the first of its
            tokens (see :mod:`alit.losses.tails`), so that a part of an iteration can be kept. With it belongs
            ``any_length: true`` in ``model``, by which criteria do so.
        perceptual: stage 2: "lpips", whose weights are fetched at the first run; "efficientnet", whose weights come
            with the extra ``perceptual`` (:class:`alit.losses.FeatureDistance`); or "off".
        perceptual_weight, l2_weight, ssim_weight: stage 2: of mean LPIPS, of the mean squared error and of 1 - SSIM;
            L1 has weight 1.
        code_weight: stage 2: of the mean squared error of the code, as in stage 1.
        base_weight: stage 2: of the base tokenizer's own L1 and regularizer, from its own tokens; 0 leaves it out.
        gan_schedule: stage 2: pairs of a fraction of the run and the GAN weight from there on, times the adaptive
            weight; 0 before the first. Without a weight above 0 there are no discriminators.
        discriminators: stage 2: "each" iteration has one, or one is "shared" by all.
        discriminator_learning_rate: at its peak; None: the generator's.
        train_base: stage 2: train the base tokenizer too.
        train_encoder: stages 1 and 2: False leaves all before the quantizer as it is; codebooks go on. Where a few bits
            stand for many channels, the straight-through gradient asks the encoder to undo what quantization loses.
        train_decoder: stage 2: False leaves everything as it is, codebooks too, but the model's pixel filter.
        precision: "float32", "bfloat16" (autocast), or "auto": bfloat16 where the device multiplies faster in it.
        compile: ``torch.compile`` the blocks of encoder and decoder, but for the decoder's last, and a frozen base
            tokenizer's encoder.
        cuda_graph: stage 1 on one GPU: replay loss and gradients as one CUDA graph, captured in the first step and
            where ``first_only`` brings another iteration. The host then launches a step at once, but the memory of the
            step's activations stays taken.
        activation_checkpointing: compute the activations of each iteration's encoder and decoder again in the
            backward, instead of keeping them; under FSDP2 block by block.
        parallel: under torchrun "ddp", or "fsdp" (FSDP2), which shards weights and optimizer.
        seed: of weights, order, crops, and every draw in a step.
        workers: processes that decode images, per training process.
        shuffle_buffer: images of a shard that are read together and permuted.
        device: "auto", "cpu", "cuda", "cuda:1", ...
        log_every, image_every, checkpoint_every: steps between lines of the log, images, checkpoints.
        keep: newest checkpoints that stay.
        tensorboard: write scalars and images for TensorBoard.

    Values are converted to the type of their field. Raises:
        ValueError: a value of another type (a boolean is no number), or one beyond ``LIMITS``. NaN and infinity pass,
            and :func:`alit.training.train` refuses them (:meth:`check_finite`).
    """

    stage: str = "1"
    data: str | None = None
    output: str | None = None
    model: dict[str, Any] = field(default_factory=lambda: {"size": "nano", "base": "dct"})
    generator: dict[str, Any] = field(default_factory=dict)
    tokenizer: str = "nano"
    labels: str | None = None
    initialization: str = "published"
    start_from: str | None = None
    base_from: str | None = None
    steps: int = 10_000
    seconds: float | None = None
    batch_size: int = 8
    accumulate: int = 1
    learning_rate: float | None = None
    warmup: float = 0.1
    weight_decay: float = 0.05
    betas: tuple[float, float] = (0.9, 0.95)
    clip: float = 3.0
    ema: float = 0.999
    crop: float = 0.8
    flip: bool = True
    convert_profiles: bool = True
    max_megapixels: float = 250.0
    regularizer: float = 0.1
    iterations_per_step: int | None = None
    through_time: bool = True
    first_only: float | None = None
    tail_drop: float = 0.0
    perceptual: str = "lpips"
    perceptual_weight: float = 1.0
    l2_weight: float = 0.0
    ssim_weight: float = 0.0
    code_weight: float = 0.0
    base_weight: float = 0.0
    gan_schedule: tuple[tuple[float, float], ...] = ((0.1, 0.2), (0.5, 0.8))
    discriminators: str = "each"
    discriminator_learning_rate: float | None = None
    train_base: bool = True
    train_encoder: bool = True
    train_decoder: bool = True
    precision: str = "auto"
    compile: bool = False
    cuda_graph: bool = False
    activation_checkpointing: bool = False
    parallel: str = "ddp"
    seed: int = 0
    workers: int = 2
    shuffle_buffer: int = 1000
    device: str = "auto"
    log_every: int = 10
    image_every: int = 500
    checkpoint_every: int = 500
    keep: int = 2
    tensorboard: bool = True

    def __post_init__(self) -> None:
        for name, kind in _types().items():
            object.__setattr__(self, name, converted(name, kind, getattr(self, name)))
        for name, choices in CHOICES.items():
            check_choice(name, getattr(self, name), choices)
        starts = [start for start, _ in self.gan_schedule if math.isfinite(start)]
        rising = starts == sorted(set(starts)) and all(start <= 1 for start in starts)
        expect(
            "gan_schedule", rising, "rising fractions of the run, from 0 to 1", self.gan_schedule
        )
        started = self.start_from is not None
        for name, needed, applies, where in (
            ("stage", "1", self.cuda_graph, "with cuda_graph"),
            ("iterations_per_step", None, self.cuda_graph, "with cuda_graph"),
            ("base_from", None, started, "where start_from gives the weights"),
            ("initialization", "published", started, "where start_from gives the weights"),
            ("stage", "2", not self.train_decoder, "without train_decoder"),
            ("train_encoder", False, not self.train_decoder, "without train_decoder"),
            ("train_base", False, not self.train_decoder, "without train_decoder"),
        ):
            value = getattr(self, name)
            expect(name, not applies or value == needed, f"{needed!r} {where}", value)

    def check_finite(self) -> None:
        """Check that all numbers are finite, so that a run can begin with them.

        Raises:
            ValueError: a field that is NaN or infinite.
        """
        for name in LIMITS:
            if (value := getattr(self, name)) is not None:
                finite = bool(np.isfinite(np.asarray(value, np.float64)).all())
                expect(name, finite, f"a finite number in {LIMITS[name]}", value)

    @property
    def peak_learning_rate(self) -> float:
        if self.learning_rate is not None:
            return self.learning_rate
        if self.stage == "generator":
            return 1e-3
        return (1e-4 if self.stage == "2" else 1.5e-4) * self.batch_size / 256

    def gan_weight(self, done: float) -> float:
        """GAN weight after a fraction ``done`` of the run."""
        return next((weight for start, weight in self.gan_schedule[::-1] if done >= start), 0.0)

    @property
    def adversarial(self) -> bool:
        """True if the run has discriminators."""
        return self.stage == "2" and any(weight > 0 for _, weight in self.gan_schedule)

    @classmethod
    def from_mapping(cls, fields: dict[str, Any]) -> TrainingConfig:
        """Configuration from plain values, converted to the fields' types.

        Raises:
            ValueError: an unknown field (the nearest one is suggested), a value of another type or out of range.
        """
        known, fields = _types(), renamed(fields)
        for name in fields:
            if name not in known:
                short = str(name)[:100]
                hint = nearest(short, tuple(known))
                raise ValueError(f"configuration: no field {short!r}{hint}")
        return cls(**fields)

    @classmethod
    def read(cls, path: str | Path, **overrides: Any) -> TrainingConfig:
        """Read a configuration from a YAML or JSON file; ``overrides`` that are not None replace fields.

        Nothing in it is executed or looked up: paths are local, and text is literal.

        Raises:
            OSError: a file that cannot be read.
            ValueError: not such a file, or as :meth:`from_mapping`.
        """
        path = Path(path)
        try:
            with reading(path) as file:
                content = read(file.read(4 * LARGEST_TEXT).decode())
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}: not a configuration in YAML, nor any text") from error
        except ValueError as error:
            raise ValueError(f"{path}: not a configuration in YAML ({error})") from error
        if not isinstance(content, dict):
            raise ValueError(f"{path}: expected fields by name, got {reprlib.repr(content)}")
        return cls.from_mapping(
            {**content, **{k: v for k, v in overrides.items() if v is not None}}
        )

    def differences(self, other: dict[str, Any]) -> list[str]:
        """Differences to a stored configuration (of :meth:`asdict`), a line for each field that is not in ``FREE``.

        A field that the stored one lacks, since it was added later, is at its default there.
        """
        own, there = self.asdict(), {**TrainingConfig().asdict(), **renamed(other)}
        return [
            f"{name}: {there[name]!r} there, {own[name]!r} here"
            for name in own
            if name not in FREE and own[name] != there[name]
        ]

    def asdict(self) -> dict[str, Any]:
        """Fields by name, as plain JSON values."""
        return json.loads(json.dumps(dataclasses.asdict(self)))


@functools.cache
def _types() -> dict[str, Any]:
    """Types of the fields, by name."""
    return get_type_hints(TrainingConfig)
