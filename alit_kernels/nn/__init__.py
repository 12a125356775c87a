"""Drop-in modules built on the ops."""

from .self_attention import SelfAttention
from .vector_quantizer import VectorQuantizer

__all__ = ["SelfAttention", "VectorQuantizer"]
