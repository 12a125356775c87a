"""Softmax attention over dense batches and over packed sequences of different lengths."""

from .configurations import issued_work
from .op import attention, attention_map, varlen_attention

__all__ = ["attention", "attention_map", "issued_work", "varlen_attention"]
