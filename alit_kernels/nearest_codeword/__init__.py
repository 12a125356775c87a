"""Index of the nearest codebook row."""

from .op import METRICS, PRECISIONS, nearest_codeword

__all__ = ["METRICS", "PRECISIONS", "nearest_codeword"]
