"""Drop-in modules built on the ops."""

from .linear import GELULinear, Linear
from .multihead_attention import MultiheadAttention
from .residual import GroupedVQ, ResidualVQ
from .self_attention import SelfAttention
from .usage_window import UsageWindow
from .vector_quantizer import VectorQuantizer

__all__ = [
    "GELULinear",
    "GroupedVQ",
    "Linear",
    "MultiheadAttention",
    "ResidualVQ",
    "SelfAttention",
    "UsageWindow",
    "VectorQuantizer",
]
