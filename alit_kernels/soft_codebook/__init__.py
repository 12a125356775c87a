"""Expected code, negative log-likelihood and true-code probability from one set of logits."""

from .op import SoftCode, soft_codebook

__all__ = ["SoftCode", "soft_codebook"]
