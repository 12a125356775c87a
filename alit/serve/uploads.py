"""Encoding, reconstruction and attention of an uploaded image, without anything of HTTP."""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor

from ..alit_format import ModelIdentity
from ..attention_maps import latent_attention
from ..criteria import FixedLength
from ..evaluation.metrics import bits_per_token, eight_bits, l1, psnr, thumbnail
from ..fitting import fitted
from ..image_records import file_name
from ..images import to_image, upright
from ..sequence import TokenSequence
from ..tokenizer import AdaptiveTokenizer


@dataclass(frozen=True)
class Upload:
    """Uploaded image with all the tokens that the model gives.

    Attributes:
        name: of its file, as ``.alit`` files may hold it; may be empty.
        original: height and width in pixels.
        image: (3, height, width) in [0, 1], what was encoded; on the model's device.
        tokens: one sequence.
    """

    name: str
    original: tuple[int, int]
    image: Tensor
    tokens: TokenSequence

    def file(self, tokens: int, identity: ModelIdentity) -> bytes:
        """Bytes of an ``.alit`` file of the first ``tokens`` tokens."""
        return self.tokens.truncated(tokens).to_bytes(
            identity, names=[self.name], originals=[self.original]
        )


class Reconstruction(NamedTuple):
    """Reconstruction from the first tokens, in the size in which the image was encoded.

    Attributes:
        png: bytes of a PNG file.
        l1, psnr: errors of its 8-bit pixels, the latter in decibels.
        thumbnail_l1, thumbnail_psnr: errors of a thumbnail of as many bits, enlarged.
    """

    png: bytes
    l1: float
    psnr: float
    thumbnail_l1: float
    thumbnail_psnr: float


def encoded(model: AdaptiveTokenizer, data: bytes, name: str, max_megapixels: float) -> Upload:
    """Encode the image of a file: all of it, resized to about as many pixels as the model's own, see ``fitting.py``.

    Raises:
        OSError: as :func:`alit.images.upright`.
    """
    whole = upright(io.BytesIO(data), max_megapixels=max_megapixels)
    config = model.config
    image, original, _ = fitted(whole, config.image_size, config.base.patch_size, "whole")
    image = image.to(model.latent_tokens)
    tokens = model.encode([image], FixedLength(config.max_tokens))
    return Upload(file_name(name), original, image, tokens)


def reconstruction(model: AdaptiveTokenizer, upload: Upload, tokens: int) -> Reconstruction:
    """Reconstruct an upload from its first ``tokens`` tokens, 1 to as many as there are."""
    pixels = eight_bits(model.decode(upload.tokens.truncated(tokens))[0])
    bits = tokens * bits_per_token(model.config)
    shown = torch.stack([pixels, thumbnail(upload.image[None], bits)[0]])
    errors = torch.stack([l1(shown, upload.image).double(), psnr(shown, upload.image)])
    (ours, theirs), (our_psnr, their_psnr) = errors.tolist()
    return Reconstruction(png(to_image(pixels)), ours, our_psnr, theirs, their_psnr)


def attention(model: AdaptiveTokenizer, upload: Upload) -> Tensor:
    """Attention map of each token, scaled from its smallest to its largest value: (L, rows, columns) uint8.

    Raises:
        ValueError: as :func:`alit.attention_maps.latent_attention`.
    """
    maps = latent_attention(model, upload.image[None])[0].cpu()
    low, high = maps.amin((1, 2), keepdim=True), maps.amax((1, 2), keepdim=True)
    return ((maps - low) / (high - low).clamp(min=1e-12) * 255).round().to(torch.uint8)


def png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()
