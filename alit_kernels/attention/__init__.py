"""Softmax attention over dense batches and over packed sequences of different lengths."""

from .configurations import issued_work
from .op import attention, attention_map, varlen_attention
from .stops import stops_blocks, stops_causal, stops_prefix

__all__ = [
    "attention",
    "attention_map",
    "issued_work",
    "stops_blocks",
    "stops_causal",
    "stops_prefix",
    "varlen_attention",
]
