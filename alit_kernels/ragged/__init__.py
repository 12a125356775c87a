"""Sequences of different lengths, packed one behind another: offsets, packing, compaction, growth, tail masks."""

from .op import append, compact, cumulative_offsets, pack, tail_mask, unpack

__all__ = ["append", "compact", "cumulative_offsets", "pack", "tail_mask", "unpack"]
