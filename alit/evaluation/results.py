"""Results of an evaluation; each class is a part of ``evaluation.json``, by the names of its fields."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Quality:
    """Quality, means over images: ``l1`` (absolute pixel error), ``psnr`` (dB), ``ssim``, ``lpips``; pixels in [0, 1].

    ``top1``, ``top5``: the share of images whose class, as a network sees it in the original, comes first, or among
    the first five, in the reconstruction. ``rfid``: Frechet distance of Inception features. The last four are None
    where there is no network for them.
    """

    l1: float
    psnr: float
    ssim: float
    lpips: float | None = None
    top1: float | None = None
    top5: float | None = None
    rfid: float | None = None


@dataclass(frozen=True)
class FileQuality:
    """Quality of files of a codec that take no more bytes than the tokens.

    Attributes:
        bytes, side: means over images; a smaller side than the model's was enlarged.
        quality: L1, PSNR and SSIM of what the files show.
        wins: number of images for which the model's L1 is below the file's.
    """

    bytes: float
    side: float
    quality: Quality
    wins: int


@dataclass(frozen=True)
class Blockiness:
    """Mean absolute step between neighboring pixels across borders of blocks over that within blocks of 8 pixels.

    ``step_32``: across every 32nd pixel. ``step_8``: across every 8th that is no 32nd. About 1 for images without
    blocks; None where an image is too small for a border, or no pixel differs from its neighbor.
    """

    step_32: float | None
    step_8: float | None


@dataclass(frozen=True)
class LengthQuality:
    """Quality at one length.

    Attributes:
        tokens, bits: per image. Continuous tokens count 16 bits a channel.
        model: quality of the reconstructions.
        thumbnail: quality of a ``thumbnail_side`` squared image with 4 bits a channel, enlarged.
        codes_used, perplexity: share of the codebook that occurs, and exp(entropy) of code frequencies; their mean and
            geometric mean where each iteration has its own codebook; None without one.
        loses: number of images for which the thumbnail's L1 is below the model's.
        webp, avif: quality of files of as many bytes; None where Pillow does not write the format, or no file of some
            image is so small. The compressed image alone counts for AVIF, the whole file for WebP.
        blockiness: of the reconstructions.
    """

    tokens: int
    bits: float
    model: Quality
    thumbnail: Quality
    thumbnail_side: int
    codes_used: float | None
    perplexity: float | None
    loses: int
    webp: FileQuality | None
    avif: FileQuality | None
    blockiness: Blockiness


@dataclass(frozen=True)
class IterationQuality:
    """Quality of the tokens that one iteration added, as they are at the longest length.

    Attributes:
        first, last: their positions in the sequence, from 0.
        codes_used, perplexity: of these tokens alone, see :class:`LengthQuality`.
        replaced: L1 at the longest length with random codes in their place; that of a dead iteration does not rise.
    """

    first: int
    last: int
    codes_used: float
    perplexity: float
    replaced: float


@dataclass(frozen=True)
class KindLength:
    """L1 of one kind of images at one length."""

    tokens: int
    model: float
    thumbnail: float


@dataclass(frozen=True)
class KindQuality:
    """Quality on one kind of drawn images. ``beats_thumbnail``: the model's mean L1 is lower at every length."""

    kind: str
    images: int
    lengths: list[KindLength]
    beats_thumbnail: bool


@dataclass(frozen=True)
class Evaluation:
    """Result of :func:`evaluate`.

    Attributes:
        unreadable: names of files that were skipped.
        blockiness: of the images themselves.
        iterations: quality of each iteration; empty where tokens are not quantized.
        kinds: quality on each kind of drawn images; empty for files.
    """

    protocol: str
    images: int
    image_size: tuple[int, int]
    lengths: list[LengthQuality]
    unreadable: list[str]
    blockiness: Blockiness
    iterations: list[IterationQuality] = field(default_factory=list)
    kinds: list[KindQuality] = field(default_factory=list)
