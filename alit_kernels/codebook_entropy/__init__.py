"""Entropies of a codebook's use: how evenly its codes are used, and how certain each vector is of its code."""

from .op import CodebookEntropy, codebook_entropy

__all__ = ["CodebookEntropy", "codebook_entropy"]
