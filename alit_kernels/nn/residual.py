"""Quantizers of several codes a vector: loops over :class:`alit_kernels.nn.VectorQuantizer`, one search a code."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .._checks import (
    FLOATING,
    INTEGER,
    check_choice,
    check_count,
    check_flag,
    check_same,
    check_tensor,
)
from ..vector_quantize import VectorQuantized
from .codebook import GRADIENTS, rotated, taking_part
from .vector_quantizer import VectorQuantizer


def _joined(
    quantized: Tensor, found: list[Any], axis: int, reduce: Callable[[Tensor], Tensor]
) -> VectorQuantized:
    """One result from those of all levels or groups: indices and masks stacked, losses reduced."""
    return VectorQuantized(
        quantized,
        torch.stack([x.index for x in found], axis),
        reduce(torch.stack([x.loss for x in found])),
        reduce(torch.stack([x.commitment_loss for x in found])),
        reduce(torch.stack([x.codebook_loss for x in found])),
        None if found[0].mask is None else torch.stack([x.mask for x in found], axis),
    )


class ResidualVQ(nn.Module):
    """Residual quantizer (SoundStream, Zeghidour et al., 2021; RQ-VAE, Lee et al., 2022): a sum of codes.

    Level i quantizes what the levels before it left: r_0 = z, r_{i+1} = r_i - q_i, the result is q_0 + q_1 + ...

    Args:
        num_levels: L, codes of each vector.
        num_codes, dim: K and D of each level.
        shared: one codebook for all levels, as in RQ-VAE. Its moving averages are updated by every level in turn.
        gradient: of the sum to the (normalized) vector z, "straight_through" or "rotation".
        options: of each :class:`VectorQuantizer`: metric, weights, moving averages, dead codes, layout, process group.

    State: ``levels.i`` is the quantizer of level i; of shared levels there is ``levels.0`` alone.
    """

    def __init__(
        self,
        num_levels: int,
        num_codes: int,
        dim: int,
        *,
        shared: bool = False,
        gradient: str = "straight_through",
        **options: Any,
    ) -> None:
        check_count("num_levels", num_levels, minimum=1)
        check_flag("shared", shared)
        check_choice("gradient", gradient, GRADIENTS)
        super().__init__()
        self.num_levels, self.gradient = num_levels, gradient
        books = 1 if shared else num_levels
        self.levels = nn.ModuleList(
            VectorQuantizer(num_codes, dim, **options) for _ in range(books)
        )

    def _level(self, i: int) -> Any:
        return self.levels[i % len(self.levels)]

    def forward(
        self, z: Tensor, mask: Tensor | None = None, *, levels: Tensor | None = None
    ) -> VectorQuantized:
        """Quantize vectors level by level; in training mode each level updates as :class:`VectorQuantizer` does.

        Args:
            z, mask: as :meth:`VectorQuantizer.forward` takes them.
            levels: (B,) int32 or int64, how many levels each entry of the first axis of ``z`` takes, all by default.
                Drawn at random in training it is SoundStream's quantizer dropout. Values are not looked at.

        Returns:
            :class:`VectorQuantized`: ``index`` (..., L), ``mask`` like it, False where a level takes no part (its index
            is 0 and adds nothing), or None; losses are the sums of those of the levels, each a mean over what takes
            part there.

        Raises:
            TypeError, ValueError: as :class:`VectorQuantizer`, or wrong dtype, shape or device of ``levels``.
        """
        taking = self._taking_part(z, mask, levels)
        found, residual = [], z
        for i, part in enumerate(taking):
            found.append(self._level(i)(residual, part))
            residual = residual - found[-1].quantized.detach()
        first, *others = found
        # The gradient passes once: the sum of the levels' own would be L times as large.
        quantized = first.quantized
        for each in others:
            quantized = quantized + each.quantized.detach()
        if self.gradient == "rotation":
            level = self._level(0)
            at = level.channel_dim
            quantized = rotated(
                quantized.movedim(at, -1), z.movedim(at, -1), first.mask, level.metric
            ).movedim(-1, at)
        return _joined(quantized, found, -1, torch.sum)

    def _taking_part(self, z: Tensor, mask: Tensor | None, levels: Tensor | None) -> list[Any]:
        """Mask (...) of each level, or None."""
        if levels is None:
            return [mask] * self.num_levels
        shape = self._level(0)._rows(z).shape[:-1]
        check_tensor("levels", levels, dtype=INTEGER, shape=shape[:1])
        check_same("device", z=z, levels=levels)
        mask = self._level(0)._mask(mask)
        if mask is not None:
            check_tensor("mask", mask, shape=shape)
            check_same("device", z=z, mask=mask)
        left = levels.view(levels.shape + (1,) * (len(shape) - levels.ndim)).expand(shape)
        taking = [left > i for i in range(self.num_levels)]
        return taking if mask is None else [part & mask for part in taking]

    def codes(self, index: Tensor | VectorQuantized, mask: Tensor | None = None) -> Tensor:
        """Sums of the codes of the first l of L levels, in the layout of ``forward``.

        Args:
            index: (..., l), or what :meth:`forward` returned, whose mask counts.
            mask: (..., l), True where a code is added.

        Raises:
            TypeError, ValueError: no integer tensor, or more levels than there are.
        """
        index, mask = taking_part(index, mask)
        if index.ndim == 0 or not 0 < index.shape[-1] <= self.num_levels:
            raise ValueError(
                f"index: expected shape (..., 1) to (..., {self.num_levels}), got {tuple(index.shape)}"
            )
        total: Any = 0
        for i, rows in enumerate(index.unbind(-1)):
            total = total + self._level(i).codes(rows, None if mask is None else mask[..., i])
        return total

    @torch.no_grad()
    def initialize(self, z: Tensor, mask: Tensor | None = None, **options: Any) -> None:
        """Initialize one level after another (:meth:`VectorQuantizer.initialize`), each with what those before it left;
        a shared codebook with ``z`` alone.
        """
        level: Any
        for level in self.levels:
            level.initialize(z, mask, **options)
            z = z - level(z, mask).quantized


class GroupedVQ(nn.Module):
    """Product quantizer: groups of channels, each with a quantizer of its own (HiFi-Codec, Yang et al., 2023).

    Args:
        num_groups: G, into which the channels are split.
        num_codes: K of each group.
        dim: D of all groups together, a multiple of G.
        num_levels: None for one code a group; else each group is a :class:`ResidualVQ` of so many levels.
        options: of each quantizer.

    State: ``groups.i`` is the quantizer of group i.
    """

    def __init__(
        self,
        num_groups: int,
        num_codes: int,
        dim: int,
        *,
        num_levels: int | None = None,
        channel_dim: int = -1,
        **options: Any,
    ) -> None:
        check_count("num_groups", num_groups, minimum=1)
        check_count("dim", dim, minimum=1)
        if dim % num_groups:
            raise ValueError(f"dim: expected a multiple of num_groups, {num_groups}, got {dim}")
        super().__init__()
        sizes: tuple[int, ...] = (num_codes, dim // num_groups)
        kind: Any = VectorQuantizer
        if num_levels is not None:
            sizes, kind = (num_levels, *sizes), ResidualVQ
        self.groups = nn.ModuleList(
            kind(*sizes, channel_dim=channel_dim, **options) for _ in range(num_groups)
        )
        self.dim, self.channel_dim = dim, channel_dim
        self._axis = -1 if num_levels is None else -2

    def forward(
        self, z: Tensor, mask: Tensor | None = None, *, levels: Tensor | None = None
    ) -> VectorQuantized:
        """Quantize each group of channels; arguments are those of the groups, ``levels`` where these have levels.

        Returns:
            :class:`VectorQuantized`: ``index`` (..., G) or (..., G, L), ``mask`` like it or None; losses are means
            over the groups: with one code a group, means over all elements of ``z``.

        Raises:
            TypeError, ValueError: as the groups.
        """
        check_tensor("z", z, dtype=FLOATING)
        if z.ndim <= self.channel_dim or z.ndim == 0 or z.shape[self.channel_dim] != self.dim:
            raise ValueError(
                f"z: expected {self.dim} channels in dimension {self.channel_dim}, got {tuple(z.shape)}"
            )
        if levels is not None and self._axis == -1:
            raise ValueError("levels: expected None without num_levels, got a tensor")
        taken = {} if levels is None else {"levels": levels}
        parts = z.chunk(len(self.groups), self.channel_dim)
        found = [g(part, mask, **taken) for g, part in zip(self.groups, parts, strict=True)]
        quantized = torch.cat([each.quantized for each in found], self.channel_dim)
        return _joined(quantized, found, self._axis, torch.mean)

    def initialize(self, z: Tensor, mask: Tensor | None = None, **options: Any) -> None:
        """Initialize each group with its channels of ``z``."""
        group: Any
        parts = z.chunk(len(self.groups), self.channel_dim)
        for group, part in zip(self.groups, parts, strict=True):
            group.initialize(part, mask, **options)

    def codes(self, index: Tensor | VectorQuantized, mask: Tensor | None = None) -> Tensor:
        """The codes of ``index`` (..., G) or (..., G, l), or of a result, in the layout of ``forward``.

        ``mask`` is of the shape of ``index``, True where a code counts.

        Raises:
            TypeError, ValueError: as the groups, or another number of groups.
        """
        index, mask = taking_part(index, mask)
        shape = index.shape
        if len(shape) < -self._axis or shape[self._axis] != len(self.groups):
            raise ValueError(
                f"index: expected {len(self.groups)} groups in dimension {self._axis}, got {tuple(shape)}"
            )
        masks = [None] * len(self.groups) if mask is None else mask.unbind(self._axis)
        parts: Any = zip(self.groups, index.unbind(self._axis), masks, strict=True)
        return torch.cat([group.codes(i, m) for group, i, m in parts], self.channel_dim)
