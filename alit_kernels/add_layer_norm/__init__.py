"""A residual connection and the layer norm behind it."""

from .op import AddedNormalized, add_layer_norm

__all__ = ["AddedNormalized", "add_layer_norm"]
