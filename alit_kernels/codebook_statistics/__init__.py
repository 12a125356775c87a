"""Number and sum of the vectors that each code received."""

from .op import codebook_statistics

__all__ = ["codebook_statistics"]
