"""Configuration: frozen dataclasses, the named sizes, and the differences from the published system."""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass
from typing import Any, Literal

from .checks import (
    build,
    check_choice,
    check_flag,
    check_integers,
    check_number,
    integers,
    parse,
    shown,
)

SIZES: dict[str, tuple[int, int, int]] = {
    "nano": (128, 4, 4),
    "tiny": (512, 8, 8),
    "small": (1024, 8, 8),
    "base": (768, 12, 12),
    "semilarge": (1024, 16, 16),
}
#: Upper bounds: far beyond any model, and low enough that a damaged configuration is refused, not built.
MAX_SIZE = 2**16  # of widths, channels, sides of images, counts of tokens
MAX_CODES = 2**31 - 1
MAX_LAYERS = 128
MAX_BLOCKS = 16
MAX_LEVELS = 8
MAX_PATCH = 64


@dataclass(frozen=True)
class TransformerConfig:
    """Width, layers and heads of the encoder or the decoder."""

    width: int
    layers: int
    heads: int

    def __post_init__(self) -> None:
        check_integers(self, width=MAX_SIZE, layers=MAX_LAYERS, heads=MAX_SIZE)
        if self.width % self.heads:
            raise ValueError(f"heads: expected a divisor of width {self.width}, got {self.heads}")


@dataclass(frozen=True)
class VQGANConfig:
    """VQGAN base tokenizer; level i has ``channels * multipliers[i]`` channels and ``blocks`` residual blocks."""

    kind: Literal["vqgan"] = "vqgan"
    latent_channels: int = 256
    num_codes: int = 1024
    channels: int = 128
    multipliers: tuple[int, ...] = (1, 1, 2, 2, 4)
    blocks: int = 2

    def __post_init__(self) -> None:
        check_integers(self, num_codes=MAX_CODES)
        _check_convolutions(self)

    @property
    def patch_size(self) -> int:
        return 2 ** (len(self.multipliers) - 1)


@dataclass(frozen=True)
class KLVAEConfig:
    """KL-VAE base tokenizer; tokens are posterior samples times ``scale``. ``attention_levels`` have self-attention.

    ``stem``: side of the blocks of pixels whose values are the channels of the first convolution's input and of the
    last one's output (space to depth). 1, as published, convolves pixels; 4 spends a sixteenth as much on each of them.

    ``transform``: a fixed linear path beside encoder and decoder, the block DCT; they learn what it misses. Published:
    none.
    """

    kind: Literal["vae"] = "vae"
    latent_channels: int = 16
    scale: float = 0.2325
    channels: int = 128
    multipliers: tuple[int, ...] = (1, 1, 2, 2, 4)
    blocks: int = 2
    attention_levels: tuple[int, ...] = (4,)
    stem: int = 1
    transform: bool = False

    def __post_init__(self) -> None:
        check_integers(self, stem=MAX_PATCH)
        _check_convolutions(self)
        check_number("scale", self.scale, 0, math.inf)
        if not self.scale:
            raise ValueError("scale: expected a number above 0, got 0")
        check_flag("transform", self.transform)
        levels = integers("attention_levels", self.attention_levels, 0, MAX_LEVELS - 1)
        object.__setattr__(self, "attention_levels", levels)

    @property
    def patch_size(self) -> int:
        return self.stem * 2 ** (len(self.multipliers) - 1)


@dataclass(frozen=True)
class DCTConfig:
    """Base tokenizer without weights: the lowest block-DCT coefficients of each patch, per luma and chroma plane."""

    kind: Literal["dct"] = "dct"
    patch_size: int = 16
    luma: int = 28
    chroma: int = 6

    def __post_init__(self) -> None:
        check_integers(self, patch_size=MAX_PATCH)
        check_integers(self, luma=self.patch_size**2, chroma=self.patch_size**2)

    @property
    def latent_channels(self) -> int:
        return self.luma + 2 * self.chroma


BaseConfig = VQGANConfig | KLVAEConfig | DCTConfig
BASES: dict[str, type[VQGANConfig] | type[KLVAEConfig] | type[DCTConfig]] = {
    "vqgan": VQGANConfig,
    "vae": KLVAEConfig,
    "dct": DCTConfig,
}


@dataclass(frozen=True)
class Quirks:
    """What the published code does differently; every field is off by default and on in ``Quirks.official()``.

    Attributes:
        halt_after_last_iteration: tokens are halted once more after the last iteration, to no visible effect.
        vae_halting_masks_nothing: with a continuous base, halting leaves every token as it is.
        halt_only_at_predicted_iterations: in training, iterations without a prediction (a loss on a subset)
            halt nothing; else the decoder runs for halting alone.
        batch_mean_criterion: ``encode`` runs and decodes every iteration, compares the mean error of the batch with the
            threshold and gives every image the same length.
        best_iteration_fallback: where the threshold is never met, ``encode`` returns the iteration with the smallest
            error, not the longest.
        unquantized_tokens: ``encode`` returns the vectors before normalisation and quantization, not indices.
        random_halting_in_evaluation: halting draws from a Bernoulli distribution outside training too.
        random_posterior_in_evaluation: the KL-VAE posterior is sampled outside training too, not its mean taken.
        vae_unit_range: the KL-VAE, trained on images in [-1, 1], gets and gives images in [0, 1].
        vae_scaled_decoding: scaled KL-VAE latents enter the base decoder without division by the scale.
        detached_base_codebook: the expected code passes no gradient to the base codebook.
        small_code_initialisation: the linear layers on both sides of the quantizer start as small as all others, so
            that latents of different images hardly differ, and codes hardly enter the decoder.
        ema_rewrites_all_codes: every update of a moving-average codebook writes all codes anew from averages that start
            at the codebook with counts of 0: codes that no vector chose grow in the first steps.
        raw_codebook_entries: indices are looked up without the normalisation that the decoder was trained on.
        perceptual_unit_range: stage 2: LPIPS, made for images in [-1, 1], gets them in [0, 1].
        perceptual_dropout: stage 2: LPIPS drops features at random.
    """

    halt_after_last_iteration: bool = False
    vae_halting_masks_nothing: bool = False
    halt_only_at_predicted_iterations: bool = False
    batch_mean_criterion: bool = False
    best_iteration_fallback: bool = False
    unquantized_tokens: bool = False
    random_halting_in_evaluation: bool = False
    random_posterior_in_evaluation: bool = False
    vae_unit_range: bool = False
    vae_scaled_decoding: bool = False
    detached_base_codebook: bool = False
    small_code_initialisation: bool = False
    ema_rewrites_all_codes: bool = False
    raw_codebook_entries: bool = False
    perceptual_unit_range: bool = False
    perceptual_dropout: bool = False

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            check_flag(field.name, getattr(self, field.name))

    @classmethod
    def official(cls) -> Quirks:
        return cls(**{field.name: True for field in dataclasses.fields(cls)})


@dataclass(frozen=True)
class AdaptiveTokenizerConfig:
    """Everything that determines an :class:`alit.AdaptiveTokenizer`.

    Attributes:
        base: the base tokenizer; its ``patch_size`` divides the image size.
        encoder, decoder: the transformers.
        bottleneck: "quantized" (indices), "continuous" (``code_dim`` channels) or "unfactorised" (encoder width).
        image_size: (height, width) in pixels.
        latents_per_iteration: tokens that each iteration adds.
        iterations: at most this many; the longest description has ``iterations * latents_per_iteration`` tokens.
        codebook_size, code_dim, metric, commitment, ema_decay, dead_code_threshold: of the latent quantizer, see
            :class:`alit_kernels.nn.VectorQuantizer`; the published one replaces no dead codes.
        halting: what happens to image tokens that are described well enough: nothing ("off"), they are replaced by the
            mask token ("mask", as published), or they leave the sequence for good ("drop"); see docs/halting.md.
        halting_threshold: probability of the true code from which a token may halt; with a continuous base, the mean
            absolute code error below which it halts. None: 0.55 and 0.025, as published.
        quirks: differences from the corrected system.

    Raises:
        ValueError: a field of the wrong kind or out of range, which is named; sizes have upper bounds (``MAX_SIZE`` and
            so on in this module).
    """

    base: BaseConfig
    encoder: TransformerConfig
    decoder: TransformerConfig
    bottleneck: Literal["quantized", "continuous", "unfactorised"] = "quantized"
    image_size: tuple[int, int] = (256, 256)
    latents_per_iteration: int = 32
    iterations: int = 8
    codebook_size: int = 4096
    code_dim: int = 12
    metric: Literal["cosine", "euclidean"] = "cosine"
    commitment: float = 0.25
    ema_decay: float | None = None
    dead_code_threshold: float = 0.0
    halting: Literal["off", "mask", "drop"] = "off"
    halting_threshold: float | None = None
    quirks: Quirks = Quirks()

    def __post_init__(self) -> None:
        check_integers(self, latents_per_iteration=MAX_SIZE, iterations=MAX_SIZE)
        check_integers(self, codebook_size=MAX_CODES, code_dim=MAX_SIZE)
        check_choice("bottleneck", self.bottleneck, ("quantized", "continuous", "unfactorised"))
        check_choice("halting", self.halting, ("off", "mask", "drop"))
        check_choice("metric", self.metric, ("cosine", "euclidean"))
        check_number("commitment", self.commitment, 0, math.inf)
        check_number("dead_code_threshold", self.dead_code_threshold, 0, 1)
        if self.ema_decay is not None:
            check_number("ema_decay", self.ema_decay, 0, 1)
        if self.halting_threshold is not None:
            check_number("halting_threshold", self.halting_threshold, 0, math.inf)
        # A list hashes otherwise.
        size = integers("image_size", self.image_size, 1, MAX_SIZE)
        object.__setattr__(self, "image_size", size)
        if len(size) != 2 or any(side % self.base.patch_size for side in size):
            raise ValueError(
                f"image_size: expected (height, width), each a multiple of the base's patch size "
                f"{self.base.patch_size}, got {size}"
            )
        if self.encoder.width <= self.base.latent_channels:
            raise ValueError(
                f"encoder.width: expected more than the {self.base.latent_channels} channels of the "
                f"{self.base.kind} base, got {self.encoder.width}; choose a larger size, or another base"
            )
        if self.bottleneck == "unfactorised" and self.encoder.width != self.decoder.width:
            raise ValueError("decoder.width: expected the encoder's width in an unfactorised model")

    @property
    def grid(self) -> tuple[int, int]:
        """Image tokens down and across."""
        height, width = self.image_size
        return height // self.base.patch_size, width // self.base.patch_size

    @property
    def max_tokens(self) -> int:
        return self.iterations * self.latents_per_iteration

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
        """The named size ("nano", "tiny", "small", "base", "semilarge") on a base tokenizer ("vqgan", "vae", "dct").

        Raises:
            ValueError: an unknown name; the message suggests the nearest one.
        """
        check_choice("size", size, tuple(SIZES))
        check_choice("compatibility", compatibility, ("corrected", "official"))
        if isinstance(base, str):
            check_choice("base", base, tuple(BASES))
            base = BASES[base]()
        transformer = TransformerConfig(*SIZES[size])
        return cls(
            base=base,
            encoder=overrides.pop("encoder", transformer),
            decoder=overrides.pop("decoder", transformer),
            image_size=(image_size, image_size) if isinstance(image_size, int) else image_size,
            quirks=overrides.pop(
                "quirks", Quirks.official() if compatibility == "official" else Quirks()
            ),
            **overrides,
        )

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> AdaptiveTokenizerConfig:
        """Inverse of :meth:`to_json`.

        Raises:
            ValueError: not JSON; an unknown, missing or doubled field, a value of the wrong kind or out of range. The
                message names the field.
        """
        fields = parse(text)
        base = fields.get("base") if isinstance(fields, dict) else None
        kind = base.get("kind") if isinstance(base, dict) else None
        if not isinstance(kind, str) or kind not in BASES:
            raise ValueError(
                f"configuration: base.kind: expected one of {', '.join(BASES)}, got {shown(kind)}"
            )
        parts: dict[str, Any] = {"base": BASES[kind], "quirks": Quirks}
        parts |= {"encoder": TransformerConfig, "decoder": TransformerConfig}
        for name, part in parts.items():
            if name in fields:
                fields[name] = build(part, fields[name], name)
        return build(cls, fields)


def _check_convolutions(config: VQGANConfig | KLVAEConfig) -> None:
    """What both bases have; makes a tuple of the multipliers."""
    check_integers(config, latent_channels=MAX_SIZE, channels=MAX_SIZE, blocks=MAX_BLOCKS)
    multipliers = integers("multipliers", config.multipliers, 1, MAX_SIZE)
    object.__setattr__(config, "multipliers", multipliers)
    if not 1 <= len(multipliers) <= MAX_LEVELS:
        raise ValueError(
            f"multipliers: expected at least one level and at most {MAX_LEVELS}, got {len(multipliers) or 'none'}"
        )
    if config.channels % 32:
        raise ValueError(
            f"channels: expected a multiple of 32, the groups that are normalised, got {config.channels}"
        )
    if config.channels * max(multipliers) > MAX_SIZE:
        raise ValueError(f"multipliers: expected at most {MAX_SIZE} channels in a level")
    if config.patch_size > MAX_PATCH:
        raise ValueError(
            f"patch_size: expected at most {MAX_PATCH} pixels, got {config.patch_size}"
        )
