"""The tokenizer as users call it: files, encode, decode, stream."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import encoding, hub, model_card, model_file
from .alit_format import ModelIdentity
from .base import build_base
from .config import AdaptiveTokenizerConfig
from .features import features
from .model import AdaptiveModel
from .rollout import Rollout
from .sequence import TokenSequence
from .sizes import check_size, grid_of


class AdaptiveTokenizer(AdaptiveModel):
    """ALIT (Duggal et al., ICLR 2025, arXiv 2411.02393): tokenizer of images, each in as few tokens as it needs.

    Args:
        config: see :class:`alit.AdaptiveTokenizerConfig`; ``AdaptiveTokenizer.from_size`` takes a name instead.
    """

    # Functions of other modules, bound as methods: their first argument is the model.
    encode = encoding.encode
    encode_stream = encoding.encode_stream
    features = features

    def rollout(self, images: Tensor, **options: Any) -> Rollout:
        """Iterator over the iterations of the recurrent encoder; arguments as for :class:`alit.Rollout`."""
        return Rollout(self, images, **options)

    @classmethod
    def from_size(cls, size: str, **options: Any) -> AdaptiveTokenizer:
        """A model with random weights; arguments as for :meth:`alit.AdaptiveTokenizerConfig.of_size`."""
        return cls(AdaptiveTokenizerConfig.of_size(size, **options))

    @classmethod
    def from_pretrained(
        cls, path_or_name: str | Path, revision: str | None = None
    ) -> AdaptiveTokenizer:
        """A model from a file of :meth:`save_pretrained`, or by the name of shipped weights; in evaluation mode.

        A text ``owner/name`` that is neither is a repository on the Hugging Face Hub (``pip install 'alit[hub]'``): its
        ``model.safetensors`` is fetched, and kept in the Hub's cache.

        Args:
            revision: of a repository: branch, tag or commit; None: ``main``.

        Raises:
            FileNotFoundError, alit.CheckpointError: no such file or name (the nearest name is suggested), a corrupt
                file, or keys that do not fit (listed).
            ValueError: a revision of something else than a repository.
            OSError: of a repository, see :func:`alit.hub.fetch`.
        """
        return cls.from_state(*model_file.read(model_file.resolve(path_or_name, revision))).eval()

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

    def push_to_hub(
        self,
        name: str,
        *,
        private: bool | None = None,
        revision: str | None = None,
        commit_message: str = "Upload model",
        token: str | None = None,
        license: str | None = None,
        evaluation: str | Path | None = None,
    ) -> str:
        """Upload the file of :meth:`save_pretrained` and a model card to the Hugging Face Hub; returns a commit URL.

        ``model.safetensors`` and ``README.md`` of the repository are replaced, in one commit. Weights keep their
        precision; those of a loaded model are float32, so that its ``.alit`` files can be read with what is uploaded.

        Args:
            name: ``owner/name``; the repository is made where there is none.
            private: of a repository that is made; None: as the owner has it.
            revision: branch, made where there is none; None: ``main``.
            token: with the right to write; None: the one that ``hf auth login`` stored, or ``HF_TOKEN``.
            license: identifier for the card, such as "apache-2.0"; None: the card names none.
            evaluation: an ``evaluation.json`` of ``alit evaluate``, whose numbers the card shows; None: it has none.

        Raises:
            ValueError: no such name; an evaluation that is none, or of a model of other sizes; weights that are NaN or
                infinite.
            ModuleNotFoundError, OSError: see :func:`alit.hub.push`.
        """
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, hub.FILE)
            self.save_pretrained(path)
            loaded = self.from_pretrained(path)  # as others will have it
            named = loaded.named_parameters()
            count = sum(x.numel() for key, x in named if not key.startswith("quantize."))
            card = model_card.write(
                *(name, loaded.config, loaded.identity(), count),
                license=license,
                evaluation=evaluation,
            )
            return hub.push(
                name,
                {hub.FILE: path, "README.md": card.encode()},
                private=private,
                revision=revision,
                message=commit_message,
                token=token,
            )

    def identity(self) -> ModelIdentity:
        """Identity of the model, which ``.alit`` files hold of the model that wrote them; reads every weight."""
        digest = model_file.fingerprint(self.config, self.state_dict())
        return ModelIdentity(digest, self.config.codebook_size, self.config.image_size)

    @torch.no_grad()
    def decode(self, tokens: TokenSequence) -> Tensor | list[Tensor]:
        """Decoded images (B, 3, height, width) of the size that was encoded, about [0, 1], not clamped.

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
        """Input codes of the decoder, padded, (B, L, C)."""
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
