"""Rank correlations and differences of means, with bootstrap intervals over images."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.stats import rankdata

#: Bootstrap resamples: times that images are drawn with replacement.
RESAMPLES = 1000
#: A variance below this counts as rounding error.
NOTHING_LEFT = 1e-9

Values = Any  # array-like of numbers, (N,)
Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Interval:
    """Estimate and its 95 % interval (percentiles of the bootstrap); None where it is undefined."""

    value: float | None
    low: float | None
    high: float | None


def resamples(count: int, seed: int) -> Array:
    """Indices (1 + RESAMPLES, count) of images: all of them once, then draws with replacement."""
    drawn = np.random.default_rng(seed).integers(count, size=(RESAMPLES, count))
    return np.vstack([np.arange(count), drawn])


def interval(samples: Array) -> Interval:
    """Interval of a statistic from its values (1 + RESAMPLES,) on the rows of :func:`resamples`; NaN does not count."""
    known = samples[np.isfinite(samples)]
    if not np.isfinite(samples[0]):
        return Interval(None, None, None)
    low, high = np.percentile(known, (2.5, 97.5))
    return Interval(float(samples[0]), float(low), float(high))


def mean(values: Values, weights: Values | None = None, *, seed: int) -> Interval:
    """Mean of one value per image with its interval, or ratio of sums over images: ``values`` over ``weights``."""
    values = np.asarray(values, dtype=np.float64)
    rows = resamples(len(values), seed)
    count = np.ones(len(values)) if weights is None else np.asarray(weights, dtype=np.float64)
    with np.errstate(invalid="ignore"):
        return interval(values[rows].sum(1) / count[rows].sum(1))


def spearman(x: Values, y: Values, *, given: Values | None = None, seed: int) -> Interval:
    """Spearman's rank correlation of ``x`` and ``y``; the partial one given a third quantity, ``given``.

    Undefined where one of them is the same for all images, or where ``given`` explains all of one.
    """
    rows = resamples(len(x), seed)
    x, y, *z = (
        rankdata(np.asarray(values, dtype=np.float64)[rows], axis=1)
        for values in (x, y, *([] if given is None else [given]))
    )
    r_xy = _pearson(x, y)
    if not z:
        return interval(r_xy)
    r_xz, r_yz = _pearson(x, z[0]), _pearson(y, z[0])
    left = (1 - r_xz**2) * (1 - r_yz**2)
    left[left < NOTHING_LEFT] = np.nan
    return interval((r_xy - r_xz * r_yz) / np.sqrt(left))


def _pearson(x: Array, y: Array) -> Array:
    """Pearson's correlation of each row; NaN where one of the two is constant."""
    x, y = (v - v.mean(1, keepdims=True) for v in (x, y))
    with np.errstate(invalid="ignore"):
        return (x * y).sum(1) / np.sqrt((x * x).sum(1) * (y * y).sum(1))


def more(
    values: Values,
    sizes: Values,
    others: Values,
    other_sizes: Values,
    *,
    paired: bool,
    seed: int,
) -> tuple[Interval, Interval]:
    """Excess of the mean of ``others`` over that of ``values``: as it is, and matched for size.

    Matched: over what the least-squares line of ``values`` on the logarithm of ``sizes`` predicts at ``other_sizes``.

    Args:
        paired: True if others are changed versions of the same images, in their order: they are drawn together.
    """
    rows = resamples(len(values), seed)
    drawn = rows if paired else resamples(len(others), seed + 1)
    y, x = (np.asarray(v, dtype=np.float64)[rows] for v in (values, np.log(sizes)))
    y_other, x_other = (
        np.asarray(v, dtype=np.float64)[drawn] for v in (others, np.log(other_sizes))
    )
    spread = x - x.mean(1, keepdims=True)
    variance = (spread**2).sum(1)
    flat = variance < NOTHING_LEFT  # all of one size: there is no line
    slope = np.where(flat, 0, (spread * y).sum(1) / np.where(flat, 1, variance))
    raw = y_other.mean(1) - y.mean(1)
    return interval(raw), interval(raw - slope * (x_other.mean(1) - x.mean(1)))
