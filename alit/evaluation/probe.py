"""Linear probe: classification of images by the features of their tokens at each length, beside controls."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..console import report, reported
from ..features import check_tokens, features_at
from ..images import MAX_MEGAPIXELS, load
from ..tokenizer import AdaptiveTokenizer
from .labeled import Labeled, check_counts, split
from .logistic import Accuracy, Parts, accuracy
from .metrics import bits_per_token, thumbnail_pixels

#: Fewest images of a class: one for the test, one for validation, and two to fit.
FEWEST = 4
#: Share of each class for the test, and of the rest for validation.
SHARE = 0.25


class Described(NamedTuple):
    """Features (N, F) of images at one length, named as in :class:`LengthAccuracy`."""

    latents: Tensor
    codes: Tensor
    all_codes: Tensor
    random_latents: Tensor
    random_codes: Tensor
    random_all_codes: Tensor
    thumbnail: Tensor


@dataclass(frozen=True)
class LengthAccuracy:
    """Accuracy by kind of features at one length of a model.

    Attributes:
        tokens, bits: per image; latents hold more than these bits.
        latents, codes: from the mean over the tokens, before and after quantization.
        all_codes: from the codes of all tokens, concatenated.
        random_latents, random_codes, random_all_codes: the same for a model of this shape with random weights.
        thumbnail: from the pixels of a thumbnail of at most as many bits.
    """

    tokens: int
    bits: float
    latents: Accuracy
    codes: Accuracy
    all_codes: Accuracy
    random_latents: Accuracy
    random_codes: Accuracy
    random_all_codes: Accuracy
    thumbnail: Accuracy


@dataclass(frozen=True)
class Probe:
    """Result of :func:`probe`.

    Attributes:
        training, test: numbers of images.
        chance: accuracy on the test images of always naming the class that is most frequent in training.
        unreadable: names of files that were skipped.
    """

    classes: list[str]
    training: int
    test: int
    chance: float
    seed: int
    lengths: list[LengthAccuracy]
    unreadable: list[str]


@torch.no_grad()
def probe(
    model: AdaptiveTokenizer,
    data: Labeled,
    test: Labeled | None = None,
    *,
    lengths: Sequence[int] | None = None,
    seed: int = 0,
    batch_size: int = 8,
    max_megapixels: float = MAX_MEGAPIXELS,
) -> Probe:
    """Measure how well a linear classifier names the class of images from their tokens, at each length.

    A logistic regression is fitted to standardized features of the training images, its L2 penalty chosen on a
    quarter of them. Images are center crops of the model's shape, resized to its size.

    Args:
        model: in evaluation mode, on its device.
        data: see :func:`alit.evaluation.labeled`; a quarter of each class, at least one image, is left out for the
            test unless there is a ``test``, of the same classes.
        lengths: numbers of tokens; by default all whole iterations.
        seed: for the parts, the random weights and the bootstrap.

    Raises:
        ValueError: a length that :func:`alit.features.check_tokens` refuses; other classes in ``test``; fewer than
            ``FEWEST`` images of a class that can be read, or none in ``test``.
    """
    config = model.config
    wanted = sorted(set(config.lengths if lengths is None else lengths))
    for tokens in wanted:
        check_tokens(config, tokens, "lengths")
    if not wanted:
        raise ValueError("lengths: expected at least one, got none")
    sets = {"data": data} if test is None else {"data": data, "test": test}
    if test is not None and test.classes != data.classes:
        raise ValueError(f"test: expected the classes of data, {data.classes}, got {test.classes}")
    for name, each in sets.items():
        check_counts(name, each.classes, _labels(each), FEWEST if name == "data" else 1)
    models = model, with_random_weights(model, seed)
    read: dict[str, tuple[list[Described], Tensor]] = {}
    for name, each in sets.items():
        read[name] = _read(models, each, wanted, batch_size, max_megapixels)
        check_counts(name, each.classes, read[name][1], FEWEST if name == "data" else 1)
    rows = [_joined(each) for each in zip(*(x for x, _ in read.values()), strict=True)]
    parts = _parts([labels for _, labels in read.values()], torch.Generator().manual_seed(seed))
    found = []
    pairs = list(zip(wanted, rows, strict=True))
    for tokens, described in reported(pairs, "fitting classifiers", len(pairs), "lengths"):
        draws = torch.Generator().manual_seed(seed)
        each_of = {name: accuracy(x, parts, draws) for name, x in described._asdict().items()}
        found.append(LengthAccuracy(tokens, tokens * bits_per_token(config), **each_of))
    training = parts.label_N[torch.cat([parts.fitting, parts.validation])]
    tested = parts.label_N[parts.test]
    return Probe(
        classes=data.classes,
        training=len(training),
        test=len(tested),
        chance=float((tested == training.bincount().argmax()).double().mean()),
        seed=seed,
        lengths=found,
        unreadable=[line for each in sets.values() for line in each.listing.unreadable],
    )


def _labels(labeled: Labeled) -> Tensor:
    return torch.tensor([labeled.labels[path] for path in labeled.listing.images])


def with_random_weights(model: AdaptiveTokenizer, seed: int) -> AdaptiveTokenizer:
    """Model of the same shape with random weights, base tokenizer included, in evaluation mode."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return AdaptiveTokenizer(model.config).to(model.latent_tokens).eval()


def _read(
    models: Sequence[AdaptiveTokenizer],
    labeled: Labeled,
    lengths: Sequence[int],
    batch_size: int,
    max_megapixels: float,
) -> tuple[list[Described], Tensor]:
    """Features at each length, on the CPU, and labels (N,), of the images that can be read."""
    size, listing = models[0].config.image_size, labeled.listing
    batches: list[list[Described]] = []
    labels: list[int] = []
    report("reading", 0, listing.readable, "images")
    for paths, images in listing.batches(
        lambda path: load(path, size, max_megapixels=max_megapixels), batch_size
    ):
        labels += [labeled.labels[path] for path in paths]
        batches.append(_described(models, images, lengths))
        report("reading", len(labels), listing.readable, "images")
    return [_joined(each) for each in zip(*batches, strict=True)], torch.tensor(labels).long()


def _described(
    models: Sequence[AdaptiveTokenizer], images: Tensor, lengths: Sequence[int]
) -> list[Described]:
    """Features of a batch at each length."""
    given = images.to(models[0].latent_tokens)
    found = []
    for tokens, *features in zip(
        lengths, *(features_at(model, given, lengths) for model in models), strict=True
    ):
        bits = tokens * bits_per_token(models[0].config)
        kinds = [(x.pooled_BD, x.pooled_codes_BC, x.codes_BLC.flatten(1)) for x in features]
        rows = [x.float().cpu() for each in kinds for x in each]
        rows.append(thumbnail_pixels(images, bits).flatten(1))
        found.append(Described(*rows))
    return found


def _joined(parts: Sequence[Described]) -> Described:
    """Features of several batches or sets, concatenated."""
    return Described(*(torch.cat(x) for x in zip(*parts, strict=True)))


def _parts(labels: Sequence[Tensor], generator: torch.Generator) -> Parts:
    """Parts of the training images alone, or of these followed by the test images."""
    label_N = torch.cat(list(labels))
    if len(labels) == 1:
        known, test = split(label_N, SHARE, generator)
    else:
        known, test = torch.arange(len(label_N)).split([len(x) for x in labels])
    fitting, validation = split(label_N[known], SHARE, generator)
    return Parts(label_N, known[fitting], known[validation], test)
