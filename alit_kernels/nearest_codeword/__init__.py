"""Index of the nearest codebook row."""

from .op import nearest_codeword

__all__ = ["nearest_codeword"]
