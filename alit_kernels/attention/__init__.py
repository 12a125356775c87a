"""Softmax attention over dense batches and over packed sequences of different lengths."""

from .op import attention, attention_map, varlen_attention

__all__ = ["attention", "attention_map", "varlen_attention"]
