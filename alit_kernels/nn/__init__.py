"""Drop-in modules built on the ops."""

from .linear import GELULinear, Linear
from .multihead_attention import MultiheadAttention
from .self_attention import SelfAttention
from .vector_quantizer import VectorQuantizer

__all__ = ["GELULinear", "Linear", "MultiheadAttention", "SelfAttention", "VectorQuantizer"]
