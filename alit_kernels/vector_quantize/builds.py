"""Ahead-of-time builds: both metrics, one of them with a mask. The search and the sums have builds of their own."""

from __future__ import annotations

import torch

from .._builds import TYPES, Recorder
from .triton_ import vector_quantize, vector_quantize_backward


def record(recorder: Recorder) -> None:
    mask = torch.empty(4096, dtype=torch.bool, device="meta")
    for dim in (12, 64, 256):
        for dtype in (torch.float32, torch.bfloat16):
            z = torch.empty(4096, dim, dtype=dtype, device="meta")
            codebook = torch.empty(1024, dim, dtype=dtype, device="meta")
            for metric, some in (("cosine", mask), ("euclidean", None)):
                masked = " cosine masked" if some is not None else ""
                with recorder(f"d={dim} {TYPES[dtype]}{masked}"):
                    quantized, index, loss, *_ = vector_quantize(
                        z, codebook, some, metric, 0.25, 1.0, "ieee"
                    )
                    saved = z, codebook, index, some, metric, 0.25, 1.0
                    vector_quantize_backward(quantized, loss, None, None, *saved, True, True)
                with recorder(f"d={dim} {TYPES[dtype]}{masked}, moving average"):
                    vector_quantize_backward(quantized, None, loss, None, *saved, True, False)
