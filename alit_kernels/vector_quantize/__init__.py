"""Search, gather, losses and straight-through gradient of a vector quantizer in one op."""

from .op import VectorQuantized, vector_quantize

__all__ = ["VectorQuantized", "vector_quantize"]
