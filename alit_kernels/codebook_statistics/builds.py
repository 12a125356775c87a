"""Ahead-of-time builds: sums of vectors by code, and the order of rows for the sums of vector_quantize."""

from __future__ import annotations

import torch

from .._builds import TYPES, Recorder
from .triton_ import codebook_statistics, ordered


def record(recorder: Recorder) -> None:
    index = torch.empty(4096, dtype=torch.int64, device="meta")
    mask = torch.empty(4096, dtype=torch.bool, device="meta")
    for dim in (12, 64, 256):
        for dtype in (torch.float32, torch.bfloat16):
            z = torch.empty(4096, dim, dtype=dtype, device="meta")
            codes = torch.empty(1024, dim, dtype=dtype, device="meta")
            name = f"d={dim} {TYPES[dtype]}"
            with recorder(f"sum {name}"):
                codebook_statistics(index, z, 1024, None)
            with recorder(f"difference {name}"):
                ordered(index, None, z, 1024, codebook=codes)
            with recorder(f"normalized difference {name} masked"):
                ordered(index, mask, z, 1024, codebook=codes, normalized=True)
