"""Allocation of a total number of tokens over many images, by how their errors fall."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise

from torch import Tensor


def allocated(errors_BP: Tensor, lengths: Sequence[int], total: int) -> list[int]:
    """Length of each image, at most ``total`` tokens together, for a small sum of errors.

    Greedy on the lower convex hull of each curve, where each step lowers the error per token by less than the step
    before: the best steps of all images are taken first; of a step that does not fit, the best length that does; no
    step that does not lower the error.

    Args:
        errors_BP: error of each image at each of the ``lengths``, which ascend.
        total: tokens of all images together; at least the first length for each.
    """
    curves = errors_BP.cummin(1).values.tolist()
    steps = [
        ((curve[stop] - curve[start]) / (lengths[stop] - lengths[start]), image, start, stop)
        for image, curve in enumerate(curves)
        for start, stop in _hull(lengths, curve)
    ]
    chosen = [0] * len(curves)
    left = total - len(curves) * lengths[0]
    for slope, image, start, stop in sorted(steps):
        if slope >= 0 or chosen[image] != start:  # or an earlier step of the image did not fit
            continue
        fitting = (k for k in range(start, stop + 1) if lengths[k] - lengths[start] <= left)
        end = min(fitting, key=lambda k: (curves[image][k], k))
        left -= lengths[end] - lengths[start]
        chosen[image] = end
    return [lengths[place] for place in chosen]


def _hull(lengths: Sequence[int], curve: Sequence[float]) -> Iterator[tuple[int, int]]:
    """Yield the pairs of neighboring corners (indices) of the lower convex hull of a curve."""
    corners: list[int] = []
    for new in range(len(lengths)):
        while len(corners) > 1 and _above(lengths, curve, corners[-2], corners[-1], new):
            corners.pop()
        corners.append(new)
    yield from pairwise(corners)


def _above(x: Sequence[int], y: Sequence[float], first: int, middle: int, last: int) -> bool:
    """True if the middle point lies on or above the line between the others."""
    return (y[middle] - y[first]) * (x[last] - x[first]) >= (y[last] - y[first]) * (
        x[middle] - x[first]
    )
