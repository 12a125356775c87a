"""How many vectors each code received, and their sum."""

from .op import codebook_statistics

__all__ = ["codebook_statistics"]
