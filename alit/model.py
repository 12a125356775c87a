"""The model: layers, parameters, and each step of the recurrence. ``rollout.py`` takes the steps in turn.

Parameters carry the published names, so that published checkpoints load. Shape suffixes: B images, N = 1 + H W
class and image tokens, L latent tokens, S = N + L, D width, C channels, V decoder outputs.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from alit_kernels.nn import Linear, VectorQuantizer

from .base import BaseTokens, Prediction, build_base
from .base.interface import to_grid, to_rows
from .codebooks import CodebookPerIteration, vector_quantizer
from .config import AdaptiveTokenizerConfig
from .decoder import Decoder
from .iteration import Bottleneck, HaltingDraw
from .layers import Transformer, initialize
from .length_head import LengthHead
from .pixel_filter import PixelFilter
from .sizes import Grid, Places, learned_place


class AdaptiveModel(nn.Module):
    """Layers, parameters and single steps of :class:`alit.AdaptiveTokenizer`."""

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

        # The unfactorized published model keeps this layer, unused.
        self.pre_quantizer_mlp = Linear(width, config.code_dim)
        if config.bottleneck == "quantized":
            each = config.codebooks == "each"
            self.quantize = CodebookPerIteration(config) if each else vector_quantizer(config)

        self.decoder_class_embedding = nn.Parameter(torch.empty(1, decoder_width))
        self.decoder_positional_embedding = nn.Parameter(
            torch.empty(self.num_image_tokens, decoder_width)
        )
        self.decoder_mask_token = nn.Parameter(torch.empty(1, 1, decoder_width))
        self.decoder = Decoder(
            config.decoder,
            max_tokens=config.max_tokens,
            code_dim=None if config.bottleneck == "unfactorized" else config.code_dim,
            outputs=self.base_tokenizer.outputs,
        )
        self.length_head = LengthHead(config) if config.length_head else None
        self.pixel_filter = PixelFilter(config.pixel_filter) if config.pixel_filter else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialize all but the base tokenizer as published: embeddings and tokens normal(0, width^-0.5).

        The linear layers on both sides of the quantizer get weights normal(0, fan-in^-0.5), unless
        ``Quirks.small_code_initialization``.
        """
        for module in (self.patch_embed, self.encoder, self.pre_quantizer_mlp, self.decoder):
            initialize(module)
        if not self.config.quirks.small_code_initialization:
            for layer in (self.pre_quantizer_mlp, getattr(self.decoder, "decoder_embed", None)):
                if layer is not None:
                    nn.init.normal_(layer.weight, std=layer.in_features**-0.5)
        for name, parameter in self.named_parameters():
            if name.endswith(("_embedding", "_token", "_tokens")) and not name.startswith(
                "base_tokenizer"
            ):
                nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)

    def places(self, grid: Grid | None = None) -> Places:
        """Positions of a grid of image tokens: the learned ones on the model's own grid, on others a choice of them,
        see :func:`alit.sizes.learned_place`.
        """
        own = self.config.grid
        learned = self.encoder_positional_embedding, self.decoder_positional_embedding
        if grid is None or grid == own:
            return Places(own, *learned)
        rows = torch.cat([torch.zeros(1, dtype=torch.int64), 1 + learned_place(own, grid)])
        rows = rows.to(self.latent_tokens.device)
        return Places(grid, *(x[rows] for x in learned))

    def first_input(self, images: Tensor, base: BaseTokens, places: Places | None = None) -> Tensor:
        """Encoder input of iteration 0: class token, image tokens, the first latents, (B, N + L, D).

        ``places``, here and below: positions of the images' grid; the model's own by default.
        """
        tokens_BND = self.image_tokens(images, base.tokens_BCHW, places)
        latents = self.fresh_latents(0).expand(images.shape[0], -1, -1)
        return self.encoder_ln_pre(torch.cat([tokens_BND, latents], dim=1))

    def image_tokens(
        self, images: Tensor, tokens_BCHW: Tensor, places: Places | None = None
    ) -> Tensor:
        """Class and image tokens with their positions, base tokens beside patches of pixels: (B, N, D)."""
        places = self.places() if places is None else places
        patches_BCHW = torch.cat([tokens_BCHW, self.patch_embed(images)], dim=1)
        image_tokens_BND = to_rows(normalize(patches_BCHW, dim=1))
        class_token_B1D = self.encoder_class_embedding.expand(images.shape[0], -1, -1).to(
            image_tokens_BND.dtype
        )
        return torch.cat([class_token_B1D, image_tokens_BND], dim=1) + places.encoder_ND

    def missing_tokens(
        self, images: Tensor, base: BaseTokens, prediction: Prediction, places: Places | None = None
    ) -> Tensor:
        """Class and image tokens of the residual, the base tokens minus a prediction of them: (B, N, D)."""
        places = self.places() if places is None else places
        missing_BNC = base.code_BNC - prediction.code_BNC.to(base.code_BNC.dtype)
        missing = self.base_tokenizer.tokens(to_grid(missing_BNC, places.grid))
        return self.image_tokens(images, missing.tokens_BCHW, places)

    def fresh_latents(self, iteration: int) -> Tensor:
        """Initial latents that an iteration adds, (L, D)."""
        return (
            self.latent_tokens
            + self.latent_token_positional_embedding
            + self.timestep_embedding[iteration]
        )

    def next_input(
        self,
        image_tokens_BND: Tensor,
        latents_BLD: Tensor,
        halted: Tensor | None,
        iteration: int,
        places: Places | None = None,
    ) -> Tensor:
        """Encoder input of a later iteration, (B, S, D): ``halted`` tokens masked, latents appended, all normalized."""
        if halted is not None:
            places = self.places() if places is None else places
            masked = self.encoder_mask_token + places.encoder_ND[1:]
            kept = torch.where(
                halted[..., None], masked.to(image_tokens_BND.dtype), image_tokens_BND[:, 1:]
            )
            image_tokens_BND = torch.cat([image_tokens_BND[:, :1], kept], dim=1)
        fresh = (
            self.fresh_latents(iteration).to(latents_BLD.dtype).expand(latents_BLD.shape[0], -1, -1)
        )
        return self.encoder_ln_recursive(torch.cat([image_tokens_BND, latents_BLD, fresh], dim=1))

    def read_out(self, latents_BLD: Tensor, earlier: Bottleneck | None = None) -> Bottleneck:
        """Codes of latents for the decoder, appended to the final codes of an ``earlier`` iteration."""
        known = 0 if earlier is None else earlier.codes_BLC.shape[1]
        continuous_BLC = self.encoder_ln_post(latents_BLD)
        if self.config.bottleneck != "unfactorized":
            continuous_BLC = self.pre_quantizer_mlp(continuous_BLC)
        if self.config.bottleneck != "quantized":
            return Bottleneck(continuous_BLC, continuous_BLC)
        at = (known,) if isinstance(self.quantize, CodebookPerIteration) else ()
        quantized = self.quantize(continuous_BLC, *at)
        codes_BLC, index_BL = quantized.quantized, quantized.index
        if earlier is not None and earlier.index_BL is not None:
            codes_BLC = torch.cat([earlier.codes_BLC.detach(), codes_BLC], dim=1)
            continuous_BLC = torch.cat([earlier.continuous_BLC.detach(), continuous_BLC], dim=1)
            index_BL = torch.cat([earlier.index_BL, index_BL], dim=1)
        return Bottleneck(codes_BLC, continuous_BLC, quantized, index_BL)

    @property
    def decoder_query_ND(self) -> Tensor:
        """Class and mask tokens with their positions, as they enter the decoder, (N, D)."""
        return self.query(self.places())

    def query(self, places: Places) -> Tensor:
        """Class and mask tokens with their positions on any grid, (N, D)."""
        mask_tokens = self.decoder_mask_token[0].expand(len(places.decoder_ND) - 1, -1)
        return torch.cat([self.decoder_class_embedding, mask_tokens]) + places.decoder_ND

    def predict(
        self,
        codes_BLC: Tensor,
        target_BN: Tensor | None = None,
        lengths_B: Tensor | None = None,
        places: Places | None = None,
    ) -> Prediction:
        """Predict base tokens from codes (B, L, C); ``lengths_B`` if the images have different numbers of latents."""
        places = self.places() if places is None else places
        decoded_BNV = self.decoder.decode([codes_BLC], self.query(places), lengths_B)
        return self.base_tokenizer.predict(decoded_BNV, target_BN)._replace(grid=places.grid)

    def predict_each(
        self,
        codes: Sequence[Tensor],
        places: Sequence[Places],
        *,
        targets: Sequence[Tensor | None],
        lengths: Sequence[Tensor | None],
    ) -> list[Prediction]:
        """Predict base tokens of batches of codes (B, L, C) of any grids and lengths, in one run of the decoder."""
        if not codes:
            return []
        if len(codes) == 1:
            return [self.predict(codes[0], targets[0], lengths[0], places[0])]
        queries = [self.query(each) for each in places]
        decoded = self.decoder.decode_each(codes, queries, lengths)
        return [
            self.base_tokenizer.predict(decoded_BNV, target_BN)._replace(grid=each.grid)
            for decoded_BNV, target_BN, each in zip(decoded, targets, places, strict=True)
        ]

    def pixels(self, prediction: Prediction) -> Tensor:
        """Images of a prediction, (B, 3, height, width), about [0, 1], not clamped."""
        grid = self.config.grid if prediction.grid is None else prediction.grid
        images = self.base_tokenizer.pixels(prediction.code_BNC, grid)
        return images if self.pixel_filter is None else self.pixel_filter(images)

    def predict_together(
        self,
        codes: Sequence[Tensor],
        target_BN: Tensor | None = None,
        lengths: Sequence[Tensor] | None = None,
    ) -> list[Prediction]:
        """Predict base tokens from the codes (B, L, C) of several iterations, in one run of the decoder.

        ``lengths``: (B,) for each iteration, if the images have different numbers of latents.
        """
        together = None if lengths is None else torch.cat(list(lengths))
        decoded_BNV = self.decoder.decode(codes, self.decoder_query_ND, together)
        targets = None if target_BN is None else target_BN.repeat(len(codes), 1)
        whole = self.base_tokenizer.predict(decoded_BNV, targets)
        sizes = [x.shape[0] for x in codes]
        tensors = whole.decoded_BNV, whole.code_BNC, whole.nll_BN, whole.p_target_BN
        fields = [[None] * len(sizes) if x is None else x.split(sizes) for x in tensors]
        return [Prediction(*parts) for parts in zip(*fields, strict=True)]

    def halted(self, prediction: Prediction, base: BaseTokens, draw: HaltingDraw) -> Tensor:
        """True for image tokens that are described well enough to halt, (B, N - 1) bool."""
        threshold = self.config.halting_threshold
        if prediction.p_target_BN is not None:
            p = prediction.p_target_BN.detach()
            return draw(p) & (p >= (0.55 if threshold is None else threshold))
        error = (prediction.code_BNC.detach() - base.code_BNC).abs().mean(-1)
        if self.config.quirks.vae_halting_masks_nothing:
            return torch.zeros_like(error, dtype=torch.bool)
        return error < (0.025 if threshold is None else threshold)

    def codes(self, index: Tensor) -> Tensor:
        """Codes (B, L, C) of indices (B, L), normalized as the decoder was trained on them; raw in compatibility
        mode.
        """
        quantizer = self.quantize
        if isinstance(quantizer, VectorQuantizer) and self.config.quirks.raw_codebook_entries:
            return quantizer.embedding(index)
        return quantizer.codes(index)
