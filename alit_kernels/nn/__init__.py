"""Drop-in modules built on the ops."""

from .linear import GELULinear, Linear
from .self_attention import SelfAttention
from .vector_quantizer import VectorQuantizer

__all__ = ["GELULinear", "Linear", "SelfAttention", "VectorQuantizer"]
