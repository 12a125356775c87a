"""x, branch, weight, bias -> x + branch, and its layer norm."""

from .op import AddedNormalized, add_layer_norm

__all__ = ["AddedNormalized", "add_layer_norm"]
