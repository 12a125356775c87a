"""What a user calls: files, encode, decode, stream."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import encoding, model_file
from .alit_format import ModelIdentity
from .base import build_base
from .config import AdaptiveTokenizerConfig
from .features import features
from .model import AdaptiveModel
from .rollout import Rollout
from .sequence import TokenSequence
from .sizes import check_size, grid_of


class AdaptiveTokenizer(AdaptiveModel):
    """ALIT (Duggal et al., ICLR 2025, arXiv 2411.02393): an image in as few tokens as it needs.

    Args:
        config: see :class:`alit.AdaptiveTokenizerConfig`; ``AdaptiveTokenizer.from_size`` takes a name instead.
    """

    # Functions of the files that do the work, bound as methods: their first argument is the model.
    encode = encoding.encode
    encode_stream = encoding.encode_stream
    features = features

    def rollout(self, images: Tensor, **options: Any) -> Rollout:
        """The recurrent encoder, one iteration at a time; arguments as for :class:`alit.Rollout`."""
        return Rollout(self, images, **options)

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
        return cls.from_state(*model_file.read(model_file.resolve(path_or_name))).eval()

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
        model_file.check_state(model, state)  # before there is memory for it
        model.to_empty(device="cpu")
        model.base_tokenizer = build_base(config.base, config.quirks)
        model.load_state_dict(dict(state))
        return model

    def save_pretrained(self, path: str | Path) -> None:
        """Write one safetensors file, configuration in its metadata; an old file is replaced only when all is written.

        Raises:
            OSError: the file cannot be written; what was there before is intact.
        """
        model_file.write(path, self.config, self.state_dict())

    def identity(self) -> ModelIdentity:
        """What ``.alit`` files say of the model that wrote them; reads every weight."""
        digest = model_file.fingerprint(self.config, self.state_dict())
        return ModelIdentity(digest, self.config.codebook_size, self.config.image_size)

    @torch.no_grad()
    def decode(self, tokens: TokenSequence) -> Tensor | list[Tensor]:
        """Images (B, 3, height, width) of the size that was encoded, about [0, 1], not clamped.

        A list of (3, height, width) where ``tokens.sizes`` are not all the same.

        Raises:
            TypeError, ValueError: no tokens, or some that do not fit the model: kind, channels, index, length or size
                out of range.
        """
        self._check_tokens(tokens)
        tokens = tokens.to(self.encoder_mask_token.device)
        of_size: dict[tuple[int, ...], list[int]] = {}
        sizes = [self.config.image_size] if tokens.sizes is None else tokens.sizes.tolist()
        for number, size in enumerate(sizes):
            of_size.setdefault(tuple(size), []).append(number)
        batches = [tokens]
        if len(of_size) > 1:
            each = [tokens[number] for number in range(len(tokens))]
            groups = ([each[number] for number in numbers] for numbers in of_size.values())
            batches = [TokenSequence.concatenate(group) for group in groups]
        codes = [self._codes(batch) for batch in batches]
        equal = (
            bool((batch.lengths == x.shape[1]).all())
            for batch, x in zip(batches, codes, strict=True)
        )
        predictions = self.predict_each(
            codes,
            [self.places(grid_of(self.config, *size)) for size in of_size],
            targets=[None] * len(codes),
            lengths=[None if x else batch.lengths for x, batch in zip(equal, batches, strict=True)],
        )
        if len(of_size) == 1:
            return self.pixels(predictions[0])
        images: dict[int, Tensor] = {}
        for numbers, prediction in zip(of_size.values(), predictions, strict=True):
            images |= zip(numbers, self.pixels(prediction), strict=True)
        return [images[number] for number in range(len(tokens))]

    def _codes(self, tokens: TokenSequence) -> Tensor:
        """(B, L, C) what the decoder gets, padded."""
        if tokens.indices is not None:
            return self.codes(tokens.padded().long())
        codes_BLC = tokens.padded().to(self.latent_tokens.dtype)
        return (
            self.quantize(codes_BLC).quantized
            if self.config.bottleneck == "quantized"
            else codes_BLC
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
        for image, (height, width) in enumerate(
            [] if tokens.sizes is None else tokens.sizes.tolist()
        ):
            check_size(config, height, width, f"tokens.sizes[{image}]")
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
                config.encoder.width if config.bottleneck == "unfactorized" else config.code_dim
            )
            if tokens.rows.shape[1] != channels:
                raise ValueError(
                    f"tokens: expected latents of {channels} channels, got {tokens.rows.shape[1]}"
                )
            if not bool(tokens.rows.isfinite().all()):
                raise ValueError("tokens: expected finite latents, got NaN or Inf")
