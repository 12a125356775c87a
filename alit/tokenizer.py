"""The adaptive tokenizer: recurrent encoder, bottleneck, decoder.

Parameters carry the published names, so that published checkpoints load. Shape suffixes: B images, N = 1 + H W
class and image tokens, L latent tokens, S = N + L, D width, C channels, V decoder outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from alit_kernels.nn import Linear, VectorQuantizer

from . import checkpoint, encoding, layers
from .alit_format import ModelIdentity
from .base import BaseTokens, Prediction, build_base
from .base.interface import to_rows
from .config import AdaptiveTokenizerConfig
from .criteria import Criterion
from .decoder import Decoder
from .encoding import Progress
from .layers import Transformer
from .rollout import Bottleneck, HaltingDraw, Rollout
from .sequence import TokenSequence


class AdaptiveTokenizer(nn.Module):
    """ALIT (Duggal et al., ICLR 2025, arXiv 2411.02393): an image in as few tokens as it needs.

    Args:
        config: see :class:`alit.AdaptiveTokenizerConfig`; ``AdaptiveTokenizer.from_size`` takes a name instead.
    """

    def __init__(self, config: AdaptiveTokenizerConfig) -> None:
        super().__init__()
        self.config = config
        width, decoder_width = config.encoder.width, config.decoder.width
        height, across = config.grid
        self.num_image_tokens = 1 + height * across
        self.base_tokenizer = build_base(config.base, config.quirks)
        patch = config.base.patch_size
        self.patch_embed = nn.Conv2d(3, width - config.base.latent_channels, patch, stride=patch)

        self.encoder_class_embedding = nn.Parameter(torch.empty(1, width))
        self.encoder_positional_embedding = nn.Parameter(torch.empty(self.num_image_tokens, width))
        self.encoder_mask_token = nn.Parameter(torch.empty(1, 1, width))
        self.latent_tokens = nn.Parameter(torch.empty(config.latents_per_iteration, width))
        self.latent_token_positional_embedding = nn.Parameter(
            torch.empty(config.latents_per_iteration, width)
        )
        self.timestep_embedding = nn.Parameter(
            torch.empty(config.iterations, config.latents_per_iteration, width)
        )
        self.encoder_ln_pre = nn.LayerNorm(width)
        self.encoder_ln_recursive = nn.LayerNorm(width)
        self.encoder_ln_post = nn.LayerNorm(width)
        self.encoder = Transformer(config.encoder)

        # The unfactorised published model keeps this layer, unused.
        self.pre_quantizer_mlp = Linear(width, config.code_dim)
        if config.bottleneck == "quantized":
            self.quantize = VectorQuantizer(
                config.codebook_size,
                config.code_dim,
                metric=config.metric,
                commitment=config.commitment,
                ema_decay=config.ema_decay,
                ema_rewrites_all=config.quirks.ema_rewrites_all_codes,
                dead_code_threshold=config.dead_code_threshold,
            )

        self.decoder_class_embedding = nn.Parameter(torch.empty(1, decoder_width))
        self.decoder_positional_embedding = nn.Parameter(
            torch.empty(self.num_image_tokens, decoder_width)
        )
        self.decoder_mask_token = nn.Parameter(torch.empty(1, 1, decoder_width))
        self.decoder = Decoder(
            config.decoder,
            max_tokens=config.max_tokens,
            code_dim=None if config.bottleneck == "unfactorised" else config.code_dim,
            outputs=self.base_tokenizer.outputs,
        )
        self.reset_parameters()

    @classmethod
    def from_size(cls, size: str, **options: Any) -> AdaptiveTokenizer:
        """A model with random weights; arguments as for :meth:`alit.AdaptiveTokenizerConfig.of_size`."""
        return cls(AdaptiveTokenizerConfig.of_size(size, **options))

    @classmethod
    def from_pretrained(cls, path_or_name: str | Path) -> AdaptiveTokenizer:
        """A model from a file of :meth:`save_pretrained`, or by the name of shipped weights; in evaluation mode.

        Raises:
            FileNotFoundError, alit.CheckpointError: no such file or name (the nearest name is suggested), a corrupt
                file, or keys that do not fit (listed).
        """
        return cls.from_state(*checkpoint.read(checkpoint.resolve(path_or_name))).eval()

    @classmethod
    def from_state(
        cls, config: AdaptiveTokenizerConfig, state: Mapping[str, Tensor]
    ) -> AdaptiveTokenizer:
        """A model with these weights, on the CPU.

        Raises:
            alit.CheckpointError: missing, unexpected or misshapen keys (listed).
        """
        with torch.device("meta"):
            model = cls(config)
        checkpoint.check_state(model, state)  # before there is memory for it
        model.to_empty(device="cpu")
        model.base_tokenizer = build_base(config.base, config.quirks)
        model.load_state_dict(dict(state))
        return model

    def save_pretrained(self, path: str | Path) -> None:
        """Write one safetensors file, configuration in its metadata; an old file is replaced only when all is written.

        Raises:
            OSError: the file cannot be written; what was there before is intact.
        """
        checkpoint.write(path, self.config, self.state_dict())

    def identity(self) -> ModelIdentity:
        """What ``.alit`` files say of the model that wrote them; reads every weight."""
        digest = checkpoint.fingerprint(self.config, self.state_dict())
        return ModelIdentity(digest, self.config.codebook_size, self.config.image_size)

    def reset_parameters(self) -> None:
        """Published initialisation of all but the base tokenizer: embeddings and tokens normal(0, width^-0.5).

        The linear layers on both sides of the quantizer get weights normal(0, fan-in^-0.5), unless
        ``Quirks.small_code_initialisation``.
        """
        for module in (self.patch_embed, self.encoder, self.pre_quantizer_mlp, self.decoder):
            layers.initialise(module)
        if not self.config.quirks.small_code_initialisation:
            for layer in (self.pre_quantizer_mlp, getattr(self.decoder, "decoder_embed", None)):
                if layer is not None:
                    nn.init.normal_(layer.weight, std=layer.in_features**-0.5)
        for name, parameter in self.named_parameters():
            if name.endswith(("_embedding", "_token", "_tokens")) and not name.startswith(
                "base_tokenizer"
            ):
                nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)

    # The recurrence, one step at a time.

    def first_input(self, images: Tensor, base: BaseTokens) -> Tensor:
        """Encoder input of iteration 0: class token, image tokens, the first latents. (B, N + L, D)"""
        patches_BCHW = torch.cat([base.tokens_BCHW, self.patch_embed(images)], dim=1)
        image_tokens_BND = to_rows(normalize(patches_BCHW, dim=1))
        batch = images.shape[0]
        class_token_B1D = self.encoder_class_embedding.expand(batch, -1, -1).to(
            image_tokens_BND.dtype
        )
        tokens_BND = (
            torch.cat([class_token_B1D, image_tokens_BND], dim=1)
            + self.encoder_positional_embedding
        )
        return self.encoder_ln_pre(
            torch.cat([tokens_BND, self.fresh_latents(0).expand(batch, -1, -1)], dim=1)
        )

    def fresh_latents(self, iteration: int) -> Tensor:
        """The latents that iteration adds. (L, D)"""
        return (
            self.latent_tokens
            + self.latent_token_positional_embedding
            + self.timestep_embedding[iteration]
        )

    def next_input(
        self, image_tokens_BND: Tensor, latents_BLD: Tensor, halted: Tensor | None, iteration: int
    ) -> Tensor:
        """Encoder input of a later iteration: ``halted`` ones masked, fresh latents appended, everything normalised."""
        if halted is not None:
            masked = self.encoder_mask_token + self.encoder_positional_embedding[1:]
            kept = torch.where(
                halted[..., None], masked.to(image_tokens_BND.dtype), image_tokens_BND[:, 1:]
            )
            image_tokens_BND = torch.cat([image_tokens_BND[:, :1], kept], dim=1)
        fresh = (
            self.fresh_latents(iteration).to(latents_BLD.dtype).expand(latents_BLD.shape[0], -1, -1)
        )
        return self.encoder_ln_recursive(torch.cat([image_tokens_BND, latents_BLD, fresh], dim=1))

    def read_out(self, latents_BLD: Tensor) -> Bottleneck:
        """Latents to codes for the decoder."""
        continuous_BLC = self.encoder_ln_post(latents_BLD)
        if self.config.bottleneck != "unfactorised":
            continuous_BLC = self.pre_quantizer_mlp(continuous_BLC)
        quantized = self.quantize(continuous_BLC) if self.config.bottleneck == "quantized" else None
        return Bottleneck(
            continuous_BLC if quantized is None else quantized.quantized, continuous_BLC, quantized
        )

    @property
    def decoder_query_ND(self) -> Tensor:
        """Class and mask tokens with their positions, as they enter the decoder."""
        mask_tokens = self.decoder_mask_token[0].expand(self.num_image_tokens - 1, -1)
        return (
            torch.cat([self.decoder_class_embedding, mask_tokens])
            + self.decoder_positional_embedding
        )

    def predict(
        self, codes_BLC: Tensor, target_BN: Tensor | None = None, lengths_B: Tensor | None = None
    ) -> Prediction:
        """Codes to base tokens; ``lengths_B`` where the images have different numbers of latents."""
        decoded_BNV = self.decoder.decode(codes_BLC, self.decoder_query_ND, lengths_B)
        return self.base_tokenizer.predict(decoded_BNV, target_BN)

    def predict_together(
        self, codes: Sequence[Tensor], target_BN: Tensor | None = None
    ) -> list[Prediction]:
        """What :meth:`predict` gives for the codes of several iterations (B, L, C), in one run of the decoder."""
        decoded_BNV = self.decoder.decode_together(codes, self.decoder_query_ND)
        targets = None if target_BN is None else target_BN.repeat(len(codes), 1)
        whole = self.base_tokenizer.predict(decoded_BNV, targets)
        sizes = [x.shape[0] for x in codes]
        fields = [[None] * len(sizes) if x is None else x.split(sizes) for x in whole]
        return [Prediction(*parts) for parts in zip(*fields, strict=True)]

    def halted(self, prediction: Prediction, base: BaseTokens, draw: HaltingDraw) -> Tensor:
        """Image tokens that are described well enough to be masked. (B, N - 1) bool"""
        threshold = self.config.halting_threshold
        if prediction.p_target_BN is not None:
            p = prediction.p_target_BN.detach()
            return draw(p) & (p >= (0.55 if threshold is None else threshold))
        error = (prediction.code_BNC.detach() - base.code_BNC).abs().mean(-1)
        if self.config.quirks.vae_halting_masks_nothing:
            return torch.zeros_like(error, dtype=torch.bool)
        return error < (0.025 if threshold is None else threshold)

    # Whole images.

    def rollout(
        self,
        images: Tensor,
        *,
        base: BaseTokens | None = None,
        predict_at: Collection[int] | None = None,
        generator: torch.Generator | None = None,
        halting_draw: HaltingDraw | None = None,
        through_time: bool = True,
        predict_later: bool = False,
    ) -> Rollout:
        """Run the recurrent encoder, one :class:`alit.rollout.Iteration` at a time.

        Args:
            images: (B, 3, height, width) floating point in [0, 1], of the configured size.
            base: their base tokens, if they are known already.
            predict_at: iterations (from 0) after which the decoder runs; all by default.
            generator: source of randomness for posterior and halting; evaluation is deterministic without one.
            halting_draw: replaces the Bernoulli draw of halting.
            through_time: gradients flow back through the iterations, as published. False: they end where an iteration
                begins, and iterations that are not in ``predict_at`` record none (truncated backpropagation).
            predict_later: leave the decoder to :meth:`predict_together`: no iteration has a prediction. Without halting
                alone, which needs each iteration's at once.

        Raises:
            TypeError, ValueError: images of the wrong dtype, shape, or (on the CPU) range; an iteration that is none.
        """
        self._check_images(images)
        for index in predict_at or ():
            if not 0 <= index < self.config.iterations:
                raise ValueError(
                    f"predict_at: expected iterations in 0..{self.config.iterations - 1}, got {index}"
                )
        if predict_later and self.config.halting != "off":
            raise ValueError(
                f"predict_later: halting {self.config.halting!r} needs predictions at once; expected 'off'"
            )
        quirks = self.config.quirks
        if base is None:
            sample = self.training or quirks.random_posterior_in_evaluation or generator is not None
            base = self.base_tokenizer.encode(images, sample=sample, generator=generator)
        if halting_draw is None:
            random = self.training or quirks.random_halting_in_evaluation or generator is not None

            def halting_draw(p: Tensor) -> Tensor:
                return (
                    torch.bernoulli(p, generator=generator).bool()
                    if random
                    else torch.ones_like(p, dtype=torch.bool)
                )

        return Rollout(
            self,
            images,
            base,
            predict_at=predict_at,
            halting_draw=halting_draw,
            through_time=through_time,
            predict_later=predict_later,
        )

    def encode(
        self,
        images: Tensor,
        criterion: Criterion,
        *,
        base: BaseTokens | None = None,
        generator: torch.Generator | None = None,
    ) -> TokenSequence:
        """Tokens of each image, as many as the criterion asks for; no gradients.

        An image leaves the batch as soon as it is done, or after the last iteration.

        Args:
            images: (B, 3, height, width) floating point in [0, 1], of the configured size.
            criterion: :class:`FixedLength`, :class:`MaxL1`, :class:`CodeError`, :class:`TokenAccuracy` or anything with
                their protocol.
            base, generator: as for :meth:`rollout`.

        Returns:
            Indices, or (without a quantizer) continuous latents. Under ``Quirks.unquantized_tokens`` always latents.

        Raises:
            TypeError, ValueError: as :meth:`rollout`; a criterion that does not fit the model or returns a wrong shape.
        """
        return encoding.encode(self, images, criterion, base=base, generator=generator)

    def encode_stream(
        self,
        images: Iterable[Tensor],
        criterion: Criterion,
        *,
        max_tokens_in_flight: int,
        generator: torch.Generator | None = None,
        on_progress: Callable[[Progress], None] | None = None,
    ) -> Iterator[TokenSequence]:
        """Tokens of any number of images, one after another in their order, in bounded memory; no gradients.

        New images take the places of finished ones, so images at different iterations share each run of the encoder.
        The source is read as places become free, never further ahead.

        Args:
            images: (3, height, width) each, otherwise as for :meth:`encode`.
            criterion: as for :meth:`encode`; sees the images that are at one iteration and came together as a batch,
                with ``image_index_B`` counted over the whole stream.
            max_tokens_in_flight: bound on the rows (class, image and latent tokens) of one run of the encoder, and so
                on memory; at least those of one image at its longest.
            generator: as for :meth:`rollout`.
            on_progress: called with :class:`alit.encoding.Progress` after every run of the encoder.

        Raises:
            TypeError, ValueError: as :meth:`encode`; a bound too small for one image; a criterion for whole batches.
        """
        return encoding.encode_stream(
            self,
            images,
            criterion,
            max_tokens_in_flight=max_tokens_in_flight,
            generator=generator,
            on_progress=on_progress,
        )

    @torch.no_grad()
    def decode(self, tokens: TokenSequence) -> Tensor:
        """Images (B, 3, height, width), about [0, 1], not clamped.

        Raises:
            TypeError, ValueError: no tokens, or some that do not fit the model: kind, channels, index or length out of
                range.
        """
        self._check_tokens(tokens)
        tokens = tokens.to(self.encoder_mask_token.device)
        if tokens.indices is not None:
            codes_BLC = self.codes(tokens.padded().long())
        else:
            codes_BLC = tokens.padded().to(self.latent_tokens.dtype)
            if self.config.bottleneck == "quantized":
                codes_BLC = self.quantize(codes_BLC).quantized
        equal = bool((tokens.lengths == codes_BLC.shape[1]).all())
        prediction = self.predict(codes_BLC, lengths_B=None if equal else tokens.lengths)
        return self.base_tokenizer.pixels(prediction.code_BNC, self.config.grid)

    def codes(self, index: Tensor) -> Tensor:
        """Codes (..., C) of indices, normalised as the decoder was trained on them (raw in compatibility mode)."""
        if self.config.quirks.raw_codebook_entries:
            return self.quantize.embedding(index)
        return self.quantize.codes(index)

    def _check_images(self, images: Tensor) -> None:
        height, width = self.config.image_size
        if not isinstance(images, Tensor) or not images.is_floating_point():
            got = images.dtype if isinstance(images, Tensor) else type(images).__name__
            raise TypeError(
                f"images: expected a floating-point tensor in [0, 1], got {got}; divide 8-bit images by 255"
            )
        if images.ndim != 4 or images.shape[1:] != (3, height, width):
            raise ValueError(
                f"images: expected shape (B, 3, {height}, {width}), got {tuple(images.shape)}"
            )
        if images.shape[0] == 0:
            raise ValueError("images: expected at least one, got none")
        own = self.latent_tokens
        if images.device != own.device:
            raise ValueError(
                f"images: expected device {own.device} like the model, got {images.device}"
            )
        if images.dtype != own.dtype and not torch.is_autocast_enabled(images.device.type):
            raise TypeError(
                f"images: expected dtype {own.dtype} like the model, got {images.dtype}"
            )
        if images.device.type == "cpu" and not torch.compiler.is_compiling():
            low, high = images.aminmax()
            if not (low >= 0 and high <= 1):
                raise ValueError(
                    f"images: expected values in [0, 1], got {float(low):.4g} to {float(high):.4g}"
                )

    def _check_tokens(self, tokens: TokenSequence) -> None:
        config = self.config
        if not isinstance(tokens, TokenSequence):
            raise TypeError(f"tokens: expected a TokenSequence, got {type(tokens).__name__}")
        if len(tokens) == 0:
            raise ValueError("tokens: expected at least one sequence, got none")
        if int(tokens.lengths.max()) > config.max_tokens:
            raise ValueError(
                f"tokens: expected at most {config.max_tokens} per image, got {int(tokens.lengths.max())}"
            )
        if tokens.indices is not None:
            if config.bottleneck != "quantized":
                raise ValueError(
                    f"tokens: expected latents, the model is {config.bottleneck}, got indices"
                )
            low, high = (
                (int(x) for x in tokens.indices.aminmax()) if len(tokens.indices) else (0, 0)
            )
            if low < 0 or high >= config.codebook_size:
                raise ValueError(
                    f"tokens: expected indices in 0..{config.codebook_size - 1}, got {low}..{high}"
                )
        else:
            channels = (
                config.encoder.width if config.bottleneck == "unfactorised" else config.code_dim
            )
            if tokens.rows.shape[1] != channels:
                raise ValueError(
                    f"tokens: expected latents of {channels} channels, got {tokens.rows.shape[1]}"
                )
            if not bool(tokens.rows.isfinite().all()):
                raise ValueError("tokens: expected finite latents, got NaN or Inf")
