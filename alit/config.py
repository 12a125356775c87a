"""Configuration: frozen dataclasses, the named sizes, and the differences from the published system."""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from .base_config import BASES, MAX_SIZE, BaseConfig, Codes, Size
from .checks import Checked, Range, build, check_choice, parse, renamed, shown

SIZES: dict[str, tuple[int, int, int]] = {
    "nano": (128, 4, 4),
    "tiny": (512, 8, 8),
    "small": (1024, 8, 8),
    "base": (768, 12, 12),
    "semilarge": (1024, 16, 16),
}


@dataclass(frozen=True)
class TransformerConfig(Checked):
    """Width, layers and heads of the encoder or the decoder."""

    width: Size
    layers: Annotated[int, Range(1, 128)]
    heads: Size

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.width % self.heads:
            raise ValueError(f"heads: expected a divisor of width {self.width}, got {self.heads}")


@dataclass(frozen=True)
class Quirks(Checked):
    """Differences of the published code; every field is off by default and on in ``Quirks.official()``.

    Attributes:
        halt_after_last_iteration: tokens are halted once more after the last iteration, to no visible effect.
        vae_halting_masks_nothing: with a continuous base, halting leaves every token as it is.
        halt_only_at_predicted_iterations: in training, iterations without a prediction (a loss on a subset)
            halt nothing; else the decoder runs for halting alone.
        batch_mean_criterion: ``encode`` runs and decodes every iteration, compares the mean error of the batch with the
            threshold and gives every image the same length.
        best_iteration_fallback: where the threshold is never met, ``encode`` returns the iteration with the smallest
            error, not the longest.
        unclamped_pixel_error: ``MaxL1`` measures predicted pixels before they are clamped to [0, 1].
        unquantized_tokens: ``encode`` returns the vectors before normalization and quantization, not indices.
        random_halting_in_evaluation: halting draws from a Bernoulli distribution outside training too.
        random_posterior_in_evaluation: the KL-VAE posterior is sampled outside training too, not its mean taken.
        vae_unit_range: the KL-VAE, trained on images in [-1, 1], gets and gives images in [0, 1].
        vae_scaled_decoding: scaled KL-VAE latents enter the base decoder without division by the scale.
        detached_base_codebook: the expected code passes no gradient to the base codebook.
        small_code_initialization: the linear layers on both sides of the quantizer start as small as all others, so
            that latents of different images hardly differ, and codes hardly enter the decoder.
        ema_rewrites_all_codes: every update of a moving-average codebook writes all codes anew from averages that start
            at the codebook with counts of 0: codes that no vector chose grow in the first steps.
        raw_codebook_entries: indices are looked up without the normalization that the decoder was trained on.
        perceptual_unit_range: stage 2: LPIPS, made for images in [-1, 1], gets them in [0, 1].
        perceptual_dropout: stage 2: LPIPS drops features at random.
    """

    halt_after_last_iteration: bool = False
    vae_halting_masks_nothing: bool = False
    halt_only_at_predicted_iterations: bool = False
    batch_mean_criterion: bool = False
    best_iteration_fallback: bool = False
    unclamped_pixel_error: bool = False
    unquantized_tokens: bool = False
    random_halting_in_evaluation: bool = False
    random_posterior_in_evaluation: bool = False
    vae_unit_range: bool = False
    vae_scaled_decoding: bool = False
    detached_base_codebook: bool = False
    small_code_initialization: bool = False
    ema_rewrites_all_codes: bool = False
    raw_codebook_entries: bool = False
    perceptual_unit_range: bool = False
    perceptual_dropout: bool = False

    @classmethod
    def official(cls) -> Quirks:
        return cls(**{field.name: True for field in dataclasses.fields(cls)})


@dataclass(frozen=True)
class AdaptiveTokenizerConfig(Checked):
    """Configuration of an :class:`alit.AdaptiveTokenizer`; it determines all but the weights.

    Attributes:
        base: the base tokenizer; its ``patch_size`` divides the image size.
        encoder, decoder: the transformers.
        bottleneck: "quantized" (indices), "continuous" (``code_dim`` channels) or "unfactorized" (encoder width).
        image_size: (height, width) in pixels.
        latents_per_iteration: tokens that each iteration adds.
        iterations: at most this many; the longest description has ``iterations * latents_per_iteration`` tokens.
        codebook_size, code_dim, metric, commitment, ema_decay, dead_code_threshold: of the latent quantizer, see
            :class:`alit_kernels.nn.VectorQuantizer`; the published one replaces no dead codes.
        codebooks: one "shared" by all tokens, as published, or "each" iteration its own, for the tokens that it added:
            an index is looked up by its position and takes as many bits as before.
        recurrence: what an iteration hands to the next. "latents", as published: image tokens as the encoder gave them,
            and all tokens are read out anew. "residual": image tokens of what the decoder still misses, given the
            tokens so far. Those tokens are final, and leave the encoder: a longer description begins with the shorter
            one, and an iteration costs the encoder no more than the first.
        halting: what happens to image tokens that are described well enough: nothing ("off"), they are replaced by the
            mask token ("mask", as published), or they leave the sequence for good ("drop"); see docs/halting.md.
        halting_threshold: probability of the true code from which a token may halt; with a continuous base, the mean
            absolute code error below which it halts. None: 0.55 and 0.025, as published.
        any_length: whether parts of an iteration's tokens decode well (by ``tail_drop`` or their start), which criteria
            then may keep.
        length_head: whether there is a network that predicts lengths (:class:`alit.Predicted`).
        pixel_filter: channels of a network that mends decoded pixels (:mod:`alit.pixel_filter`); 0: there is none.
        quirks: differences from the corrected system.

    Raises:
        ValueError: a field of the wrong kind or out of range, which is named; sizes have upper bounds (``MAX_SIZE`` and
            so on in :mod:`alit.base_config`).
    """

    base: BaseConfig
    encoder: TransformerConfig
    decoder: TransformerConfig
    bottleneck: Literal["quantized", "continuous", "unfactorized"] = "quantized"
    image_size: Annotated[tuple[int, int], Range(1, MAX_SIZE)] = (256, 256)
    latents_per_iteration: Size = 32
    iterations: Size = 8
    codebook_size: Codes = 4096
    codebooks: Literal["shared", "each"] = "shared"
    recurrence: Literal["latents", "residual"] = "latents"
    code_dim: Size = 12
    metric: Literal["cosine", "euclidean"] = "cosine"
    commitment: Annotated[float, Range(0, math.inf)] = 0.25
    ema_decay: Annotated[float | None, Range(0, 1)] = None
    dead_code_threshold: Annotated[float, Range(0, 1)] = 0.0
    halting: Literal["off", "mask", "drop"] = "off"
    halting_threshold: Annotated[float | None, Range(0, math.inf)] = None
    any_length: bool = False
    length_head: bool = False
    pixel_filter: Annotated[int, Range(0, MAX_SIZE)] = 0
    quirks: Quirks = Quirks()

    def __post_init__(self) -> None:
        super().__post_init__()
        size = self.image_size
        if len(size) != 2 or any(side % self.base.patch_size for side in size):
            raise ValueError(
                f"image_size: expected (height, width), each a multiple of the base's patch size "
                f"{self.base.patch_size}, got {shown(size)}"
            )
        if self.pixel_filter and self.base.patch_size % 2:
            raise ValueError(
                f"pixel_filter: expected 0 with patches of {self.base.patch_size} pixels, an odd number"
            )
        if self.encoder.width <= self.base.latent_channels:
            raise ValueError(
                f"encoder.width: expected more than the {self.base.latent_channels} channels of the "
                f"{self.base.kind} base, got {self.encoder.width}; choose a larger size, or another base"
            )
        if self.recurrence == "residual":
            for name, needed in (
                ("bottleneck", "quantized"),
                ("codebooks", "each"),
                ("halting", "off"),
            ):
                if getattr(self, name) != needed:
                    raise ValueError(
                        f"{name}: expected {needed!r} with recurrence 'residual', got {getattr(self, name)!r}"
                    )
            if self.base.kind == "vqgan":
                raise ValueError("base: recurrence 'residual' needs a continuous base, got 'vqgan'")
        if self.bottleneck == "unfactorized" and self.encoder.width != self.decoder.width:
            raise ValueError("decoder.width: expected the encoder's width in an unfactorized model")

    @property
    def grid(self) -> tuple[int, int]:
        """Numbers of image tokens down and across."""
        height, width = self.image_size
        return height // self.base.patch_size, width // self.base.patch_size

    @property
    def max_tokens(self) -> int:
        return self.iterations * self.latents_per_iteration

    @property
    def lengths(self) -> list[int]:
        """Number of tokens after each iteration."""
        step = self.latents_per_iteration
        return list(range(step, self.max_tokens + 1, step))

    @classmethod
    def of_size(
        cls,
        size: str,
        *,
        base: str | BaseConfig = "vqgan",
        compatibility: Literal["corrected", "official"] = "corrected",
        image_size: int | tuple[int, int] = 256,
        **overrides: Any,
    ) -> AdaptiveTokenizerConfig:
        """Configuration of a named size, with ``overrides`` of its fields.

        Args:
            size: "nano", "tiny", "small", "base" or "semilarge".
            base: "vqgan", "vae" or "dct", or its configuration.

        Raises:
            ValueError: an unknown name; the message suggests the nearest one.
        """
        check_choice("size", size, tuple(SIZES))
        check_choice("compatibility", compatibility, ("corrected", "official"))
        if isinstance(base, str):
            check_choice("base", base, tuple(BASES))
            base = BASES[base]()
        transformer = TransformerConfig(*SIZES[size])
        fields: dict[str, Any] = {
            "encoder": transformer,
            "decoder": transformer,
            "image_size": (image_size, image_size) if isinstance(image_size, int) else image_size,
            "quirks": Quirks.official() if compatibility == "official" else Quirks(),
        }
        return cls(base=base, **{**fields, **overrides})

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> AdaptiveTokenizerConfig:
        """Inverse of :meth:`to_json`.

        Raises:
            ValueError: not JSON; an unknown, missing or doubled field, a value of the wrong kind or out of range. The
                message names the field.
        """
        return build(cls, renamed(parse(text)))
