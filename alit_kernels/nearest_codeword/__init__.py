"""Index of the nearest codebook row."""

from .op import METRICS, nearest_codeword

__all__ = ["METRICS", "nearest_codeword"]
