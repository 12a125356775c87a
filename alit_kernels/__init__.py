"""Kernels for adaptive-length image tokenization: attention over ragged sequences, vector quantization, packing.

Every function takes ``implementation="auto"`` (or "reference", "cpp", "torch", "triton", "cuda"; the environment
variable ``ALIT_KERNELS_IMPLEMENTATION`` replaces "auto"). ``python -m alit_kernels`` prints what runs where.
"""

from .accelerate import Report, accelerate
from .add_layer_norm import AddedNormalized, add_layer_norm
from .attention import (
    attention,
    attention_map,
    stops_blocks,
    stops_causal,
    stops_prefix,
    varlen_attention,
)
from .codebook_entropy import CodebookEntropy, codebook_entropy
from .codebook_statistics import codebook_statistics
from .nearest_codeword import nearest_codeword
from .ragged import append, compact, cumulative_offsets, pack, tail_mask, unpack
from .sdpa import fused_sdpa, scaled_dot_product_attention
from .soft_codebook import SoftCode, soft_codebook
from .vector_quantize import VectorQuantized, vector_quantize

__version__ = "0.1.0"

__all__ = [
    "AddedNormalized",
    "CodebookEntropy",
    "Report",
    "SoftCode",
    "VectorQuantized",
    "accelerate",
    "add_layer_norm",
    "append",
    "attention",
    "attention_map",
    "codebook_entropy",
    "codebook_statistics",
    "compact",
    "cumulative_offsets",
    "fused_sdpa",
    "nearest_codeword",
    "pack",
    "scaled_dot_product_attention",
    "soft_codebook",
    "stops_blocks",
    "stops_causal",
    "stops_prefix",
    "tail_mask",
    "unpack",
    "varlen_attention",
    "vector_quantize",
]
