"""Specialization: overlap of attention maps with people's segments, compared with control maps.

A map is a value for each place of the model's grid; above a threshold it is a mask. Its overlap with a segment is
intersection over union, counted in pixels: a place counts with the share of it that the segment covers, as if
every place were enlarged to its pixels.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy.cluster.vq import kmeans2
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d, interpolate, max_pool2d

from ..attention_maps import attention_of_layers
from ..console import reported
from ..demo.sheet import Tile
from ..evaluation.probe import with_random_weights
from ..tokenizer import AdaptiveTokenizer
from .gallery import Gallery
from .inputs import ImageSet, batches, spaced
from .statistics import Interval, mean

#: Segments of a smaller share of the image do not count.
SMALLEST = 0.01
#: Numbers of clusters of k-means, up to half the places of the grid.
CLUSTERS = (2, 4, 8, 16, 32)
#: Smallest and largest standard deviation of blobs, as shares of the side.
BLOBS = (0.05, 0.4)
#: Most images, and most segments of each, on the sheet.
SHOWN, SEGMENTS = 4, 5
#: The color of outlines.
OUTLINE = torch.tensor([1.0, 0.85, 0.2])[:, None, None]


@dataclass(frozen=True)
class Overlap:
    """Overlap of segments with the best of some maps: mean over segments of the intersection over union.

    ``oracle``: the threshold is the best for map and segment; ``mean_std``: it is the map's mean plus its standard
    deviation.
    """

    maps: str
    oracle: Interval
    mean_std: Interval


@dataclass(frozen=True)
class Specialization:
    """Result of :func:`specialization`: overlap of attention maps with people's segments.

    Attributes:
        images, segments: number of images, and of segments in them that count.
        layer: encoder layer, from 1, whose maps overlap most; chosen on these very segments.
        tokens: overlap of that layer's maps, of all tokens.
        controls: maps of another image, of random weights (their own best layer), random blobs, k-means of color and
            place; and the most that any mask on this grid can reach.
        layers: ``oracle`` of each layer, all tokens.
        iterations: ``oracle`` of the tokens that each iteration added, in ``layer``.
    """

    images: int
    segments: int
    grid: tuple[int, int]
    layer: int
    tokens: Overlap
    controls: list[Overlap]
    layers: list[float]
    iterations: list[float]


def covered(labels: Tensor, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Share of each place that each segment covers (S, N), and the segments' labels (S,), from labels (height, width).

    Segments that are too small to count are left out.
    """
    (height, width), (down, across) = labels.shape, grid
    row = torch.arange(height) * down // height
    column = torch.arange(width) * across // width
    places, count = down * across, int(labels.max()) + 1
    index = labels * places + row[:, None] * across + column
    pixels = torch.bincount(index.flatten(), minlength=count * places).view(count, places)
    share = pixels.float() / (height * width / places)
    (kept,) = (share.mean(1) >= SMALLEST).nonzero(as_tuple=True)
    return share[kept], kept


def best_overlaps(maps_LN: Tensor, covered_SN: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Best attention map of each segment at its best threshold: overlap, map index, places above it, (S,) each."""
    order = maps_LN.argsort(dim=1, descending=True)
    inter = covered_SN[:, order].cumsum(-1)  # (S, L, N)
    taken = torch.arange(1, maps_LN.shape[1] + 1)
    overlap = inter / (taken + covered_SN.sum(1)[:, None, None] - inter)
    best, where = overlap.flatten(1).max(1)
    return best, where // len(taken), where % len(taken) + 1


def fixed_overlaps(maps_LN: Tensor, covered_SN: Tensor) -> Tensor:
    """Overlap (S,) of each segment with its best map; each map's threshold is its mean plus its standard deviation."""
    above = maps_LN.mean(1, keepdim=True) + maps_LN.std(1, keepdim=True, correction=0)
    mask = (maps_LN > above).float()
    inter = covered_SN @ mask.T
    return (inter / (mask.sum(1) + covered_SN.sum(1, keepdim=True) - inter)).max(1).values


def blobs(count: int, grid: tuple[int, int], generator: torch.Generator) -> Tensor:
    """Maps (count, N): Gaussians of random place, rotation and widths."""
    y, x = torch.meshgrid(*((torch.arange(n) + 0.5) / n for n in grid), indexing="ij")
    draw = torch.rand(5, count, 1, 1, generator=generator)
    x, y, turn = x - draw[0], y - draw[1], draw[2] * math.pi
    wide, high = (BLOBS[0] * (BLOBS[1] / BLOBS[0]) ** part for part in draw[3:])
    along, across = x * turn.cos() + y * turn.sin(), y * turn.cos() - x * turn.sin()
    return torch.exp(-((along / wide).square() + (across / high).square()) / 2).flatten(1)


def clusters(image: Tensor, grid: tuple[int, int], seed: int) -> Tensor:
    """Maps (at most the sum of CLUSTERS, N): negative distance of each place of an image (3, height, width) to each
    center of k-means, in the space of a place's mean color and position, all in [0, 1].
    """
    y, x = torch.meshgrid(*((torch.arange(n) + 0.5) / n for n in grid), indexing="ij")
    points = torch.cat([adaptive_avg_pool2d(image, grid), x[None], y[None]]).flatten(1).T
    found = []
    for count in CLUSTERS:
        if count <= len(points) // 2:
            centers = _centers(points, count, seed)
            found.append(-torch.cdist(centers, points))
    return torch.cat(found)


def _centers(points: Tensor, count: int, seed: int) -> Tensor:
    """Centers (K, F) of k-means of points (N, F); K is ``count``, or the number of different points if that is less."""
    data = points.double().numpy()
    count = min(count, len(np.unique(data, axis=0)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a cluster that lost its points keeps its center
        centers, _ = kmeans2(data, count, minit="++", seed=seed)
    return torch.from_numpy(centers).float()


class _Sums:
    """Accumulator of the overlaps with the segments of images."""

    def __init__(self) -> None:
        self.rows: list[tuple[float, float, int]] = []

    def add(self, maps_LN: Tensor, covered_SN: Tensor) -> None:
        """Add the overlaps of one image."""
        oracle = best_overlaps(maps_LN, covered_SN)[0].sum()
        fixed = fixed_overlaps(maps_LN, covered_SN).sum()
        self.rows.append((float(oracle), float(fixed), len(covered_SN)))

    @property
    def oracle(self) -> float:
        oracle, _, count = (sum(column) for column in zip(*self.rows, strict=True))
        return oracle / count

    def result(self, maps: str, seed: int) -> Overlap:
        oracle, fixed, count = zip(*self.rows, strict=True)
        return Overlap(maps, mean(oracle, count, seed=seed), mean(fixed, count, seed=seed))


def specialization(
    model: AdaptiveTokenizer,
    data: ImageSet,
    segments: Sequence[Tensor],
    *,
    batch_size: int = 8,
    seed: int = 0,
) -> tuple[Specialization, Gallery]:
    """Overlap of all tokens' maps after the last iteration with people's segments; a gallery of the best tokens.

    Args:
        segments: labels (height, width) from 0 of each image, see :func:`alit.analysis.inputs.read_segments`.
    """
    config, layers = model.config, range(model.config.encoder.layers)
    random = with_random_weights(model, seed)
    generator = torch.Generator().manual_seed(seed)
    own, other, unlearned = ([_Sums() for _ in layers] for _ in range(3))
    added = [[_Sums() for _ in range(config.iterations)] for _ in layers]
    blob, cluster, most = _Sums(), _Sums(), _Sums()
    covers = [covered(labels, config.grid)[0] for labels in segments]
    chosen, kept = spaced(len(data), SHOWN), {}
    maps = _maps(model, data, batch_size)
    before = first = next(maps)
    maps_of_random = _maps(random, data, batch_size)
    for n, of_random in enumerate(reported(maps_of_random, "looking at segments", len(data))):
        its, cover = (first if n == 0 else next(maps)), covers[n]
        for layer in layers:
            own[layer].add(its[layer], cover)
            if n:
                other[layer].add(before[layer], cover)
            unlearned[layer].add(of_random[layer], cover)
            parts = its[layer].split(config.latents_per_iteration)
            for sums, part in zip(added[layer], parts, strict=True):
                sums.add(part, cover)
        blob.add(blobs(its.shape[1], config.grid, generator), cover)
        cluster.add(clusters(data.levels[n].float() / 255, config.grid, seed), cover)
        most.add(cover, cover)
        before = its
        if n in chosen:
            kept[n] = its
    for layer in layers:  # the control of the first image is the last image
        other[layer].add(before[layer], covers[0])
    best = max(layers, key=lambda i: own[i].oracle)
    controls = [
        other[best].result("tokens, of another image", seed),
        max(unlearned, key=lambda x: x.oracle).result("random weights", seed),
        blob.result("random blobs", seed),
        cluster.result("k-means of color and place", seed),
        most.result("the most on this grid", seed),
    ]
    found = Specialization(
        *(len(data), sum(map(len, covers)), config.grid, best + 1),
        *(own[best].result("tokens", seed), controls),
        *([x.oracle for x in own], [x.oracle for x in added[best]]),
    )
    step = config.latents_per_iteration
    rows = [_owners(data, n, segments[n], x[best], config.grid, step) for n, x in kept.items()]
    return found, Gallery("Tokens that own a segment: its outline, and where the token looks", rows)


def _maps(model: AdaptiveTokenizer, data: ImageSet, batch_size: int) -> Iterator[Tensor]:
    """Yield the attention maps of each image, (layers, L, places)."""
    for images in batches(data.levels, batch_size):
        yield from (
            attention_of_layers(model, images.to(model.latent_tokens.device)).flatten(3).cpu()
        )


def _owners(
    data: ImageSet,
    number: int,
    labels: Tensor,
    maps_LN: Tensor,
    grid: tuple[int, int],
    step: int,
) -> list[Tile]:
    """Tiles of an image and its largest segments, each outlined, with the mask of the token that overlaps it most."""
    image = data.levels[number].float() / 255
    cover, kept = covered(labels, grid)
    overlap, token, count = best_overlaps(maps_LN, cover)
    tiles = [Tile(data.names[number].rpartition("/")[2], image)]
    for s in cover.sum(1).argsort(descending=True)[:SEGMENTS].tolist():
        mask = torch.zeros(maps_LN.shape[1])
        mask[maps_LN[token[s]].argsort(descending=True)[: count[s]]] = 1
        inside = interpolate(mask.view(1, 1, *grid), size=labels.shape, mode="nearest")[0]
        shown = torch.where(_outline(labels == kept[s]), OUTLINE, image * (0.25 + 0.75 * inside))
        iteration = int(token[s]) // step + 1
        tiles.append(Tile(f"{token[s] + 1} (it. {iteration}): {overlap[s]:.2f}", shown))
    return tiles + [Tile("")] * (1 + SEGMENTS - len(tiles))


def _outline(mask: Tensor) -> Tensor:
    """Pixels within one pixel of the border of a mask, (height, width) bool."""
    small = mask[None, None].float()
    return (max_pool2d(small, 3, 1, 1) != -max_pool2d(-small, 3, 1, 1))[0, 0]
