"""Token sequences of different lengths, packed."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from alit_kernels import cumulative_offsets, unpack

from .alit_format import ModelIdentity, Reader, dump
from .image_records import ImageInfo


@dataclass(frozen=True, eq=False)
class TokenSequence:
    """Token sequences of a batch of images, packed one behind another: what ``encode`` returns and ``decode`` takes.

    Attributes:
        lengths: (B,) int64, tokens of each image.
        indices: (T,) int64 codebook indices, T = ``lengths.sum()``; None for continuous tokens.
        latents: (T, C) continuous tokens; None for indices.
        sizes: (B, 2) int64, on the CPU: height and width in pixels of what was encoded; None for the model's own.

    Raises:
        TypeError, ValueError: not exactly one of ``indices`` and ``latents``, wrong dtype or shape, sizes below 1, or
            (on the CPU) lengths that do not add up.
    """

    lengths: Tensor
    indices: Tensor | None = None
    latents: Tensor | None = None
    sizes: Tensor | None = None

    def __post_init__(self) -> None:
        if (self.indices is None) == (self.latents is None):
            raise ValueError("TokenSequence: expected either indices or latents")
        if self.lengths.ndim != 1 or self.lengths.dtype != torch.int64:
            raise TypeError(
                f"lengths: expected (B,) int64, got {tuple(self.lengths.shape)} {self.lengths.dtype}"
            )
        if self.lengths.is_cpu and self.lengths.numel() and self.lengths.min() < 0:
            raise ValueError(f"lengths: expected at least 0, got {int(self.lengths.min())}")
        if self.indices is not None and (
            self.indices.ndim != 1 or self.indices.dtype != torch.int64
        ):
            raise TypeError(
                f"indices: expected (T,) int64, got {tuple(self.indices.shape)} {self.indices.dtype}"
            )
        if self.latents is not None and (
            self.latents.ndim != 2 or not self.latents.is_floating_point()
        ):
            raise TypeError(
                f"latents: expected (T, C) floating point, got {tuple(self.latents.shape)} {self.latents.dtype}"
            )
        if self.lengths.is_cpu and len(self.rows) != int(self.lengths.sum()):
            raise ValueError(
                f"lengths: expected a sum of {len(self.rows)}, the tokens given, got {int(self.lengths.sum())}"
            )
        if self.sizes is not None:
            self._check_sizes(self.sizes)

    def _check_sizes(self, sizes: Tensor) -> None:
        if sizes.shape != (len(self), 2) or sizes.dtype != torch.int64:
            raise TypeError(
                f"sizes: expected ({len(self)}, 2) int64, got {tuple(sizes.shape)} {sizes.dtype}"
            )
        if not sizes.is_cpu:
            raise ValueError(f"sizes: expected them on the CPU, got {sizes.device}")
        if bool((sizes < 1).any()):
            raise ValueError(f"sizes: expected at least 1, got {int(sizes.min())}")

    @property
    def rows(self) -> Tensor:
        """Packed tokens: ``indices`` (T,) or ``latents`` (T, C)."""
        rows = self.latents if self.indices is None else self.indices
        assert rows is not None
        return rows

    @property
    def offsets(self) -> Tensor:
        """Row offsets (B + 1,) int32: image b owns rows ``offsets[b]`` to ``offsets[b + 1] - 1``."""
        return cumulative_offsets(self.lengths)

    def __len__(self) -> int:
        return self.lengths.shape[0]

    def __getitem__(self, image: int) -> TokenSequence:
        """The sequence of one image, as a batch of one."""
        count = len(self)
        if not -count <= image < count:
            raise IndexError(f"image: expected an index into {count} sequences, got {image}")
        image %= count
        start, stop = self.offsets[image : image + 2].tolist()
        sizes = None if self.sizes is None else self.sizes[image : image + 1]
        return self._of(self.rows[start:stop], self.lengths[image : image + 1], sizes)

    def padded(self, fill: float = 0) -> Tensor:
        """Padded batch: (B, longest) indices or (B, longest, C) latents, ``fill`` beyond each length."""
        longest = int(self.lengths.max()) if len(self) else 0
        return unpack(self.rows, self.offsets, max_length=longest, fill=fill)

    def truncated(self, tokens: int | Tensor) -> TokenSequence:
        """The first tokens of each image, which describe it by themselves, if less well.

        Args:
            tokens: one number, or (B,) integers; from 1 to the length of each sequence.

        Raises:
            ValueError: a number out of range, or not one per image.
        """
        wanted = torch.as_tensor(tokens, device=self.lengths.device)
        shapes = ((), self.lengths.shape)
        if wanted.dtype not in (torch.int32, torch.int64) or wanted.shape not in shapes:
            raise ValueError(
                f"tokens: expected an integer or ({len(self)},) of them, got {tokens!r}"
            )
        lengths = wanted.long().expand(len(self))
        bad = (lengths < 1) | (lengths > self.lengths)
        if bool(bad.any()):
            image = int(bad.nonzero()[0])
            found = f"{int(lengths[image])} for image {image}"
            raise ValueError(f"tokens: expected 1 to {int(self.lengths[image])}, got {found}")
        place = torch.arange(len(self.rows), device=wanted.device)
        place = place - self.offsets[:-1].long().repeat_interleave(self.lengths)
        rows = self.rows[place < lengths.repeat_interleave(self.lengths)]
        return self._of(rows, lengths.clone(), self.sizes)

    def to(self, device: torch.device | str) -> TokenSequence:
        """Copy with tokens and lengths on a device; sizes stay on the CPU."""
        return self._of(self.rows.to(device), self.lengths.to(device), self.sizes)

    def _of(self, rows: Tensor, lengths: Tensor, sizes: Tensor | None) -> TokenSequence:
        indices, latents = (None, rows) if self.indices is None else (rows, None)
        return TokenSequence(lengths, indices, latents, sizes)

    @classmethod
    def concatenate(cls, sequences: list[TokenSequence]) -> TokenSequence:
        """Concatenate batches, which all have ``sizes`` or none, into one."""
        if not sequences:
            raise ValueError("sequences: expected at least one")
        lengths = torch.cat([sequence.lengths for sequence in sequences])
        given = [x.sizes for x in sequences if x.sizes is not None]
        if len(given) not in (0, len(sequences)):
            raise ValueError(
                f"sequences: expected all with sizes or none, got {len(given)} of {len(sequences)} with"
            )
        rows = torch.cat([sequence.rows for sequence in sequences])
        return sequences[0]._of(rows, lengths, torch.cat(given) if given else None)

    def to_bytes(
        self,
        model: ModelIdentity,
        *,
        names: Sequence[str] | None = None,
        originals: Sequence[tuple[int, int]] | None = None,
        padding: Sequence[tuple[int, int]] | None = None,
    ) -> bytes:
        """Bytes of an ``.alit`` file (docs/alit-format.md): ceil(log2 K) bits a token, checksum, model fingerprint.

        Version 1 if all images have the model's size and nothing else is stored of them, else version 2.

        Args:
            model: ``AdaptiveTokenizer.identity()`` of the model that encoded.
            names, originals, padding: of each image, see :class:`alit.image_records.ImageInfo`; None: unknown.

        Raises:
            ValueError: continuous tokens; indices that are no codes of the model; more than 65,535 tokens for an image;
                a name or size that files cannot hold, or not one for each image.
        """
        if self.indices is None:
            raise ValueError("TokenSequence: expected indices, .alit files hold no latents")
        count, images = len(self), None
        own = torch.tensor([model.image_size]).expand(count, 2)
        sizes = own if self.sizes is None else self.sizes
        if not (names is originals is padding is None) or not torch.equal(sizes, own):
            nothing = np.zeros((count, 2), np.int64)
            images = ImageInfo(
                sizes.numpy(),
                nothing if originals is None else np.array(originals, np.int64).reshape(-1, 2),
                nothing if padding is None else np.array(padding, np.int64).reshape(-1, 2),
                [""] * count if names is None else names,
            )
        return dump(model, self.lengths.cpu().numpy(), self.indices.cpu().numpy(), images)

    @classmethod
    def from_bytes(cls, data: bytes, model: ModelIdentity | None = None) -> TokenSequence:
        """Inverse of :meth:`to_bytes`, of either version; :class:`alit.alit_format.Reader` has names and originals.

        Args:
            model: ``AdaptiveTokenizer.identity()`` of the model that is to decode; None: any model's file is read.

        Raises:
            FormatError: no ``.alit`` data, a damaged one, or one that another model wrote.
        """
        reader = Reader(io.BytesIO(data))
        if model is not None:
            reader.expect(model)
        count = reader.image_count
        parts = reader.lengths(0, count), reader.indices(0, reader.token_count)
        lengths, indices = map(torch.from_numpy, parts)
        if reader.version == 1:
            sizes = torch.tensor([reader.identity.image_size]).expand(count, 2)
        else:
            sizes = torch.from_numpy(reader.sizes(0, count))
        return cls(lengths, indices=indices, sizes=sizes)
