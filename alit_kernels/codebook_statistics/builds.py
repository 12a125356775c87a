"""What is compiled ahead of time: sums of vectors by code, and those of differences that vector_quantize takes."""

from __future__ import annotations

import torch

from .._builds import TYPES, Expected, Recorder
from .triton_ import chunk_sums, codebook_statistics, runs


def record(recorder: Recorder) -> None:
    index = torch.empty(4096, dtype=torch.int64, device="meta")
    norm = torch.empty(4096, device="meta")
    for dim in (12, 64, 256):
        codes = torch.empty(1024, dim, device="meta")
        for dtype in (torch.float32, torch.bfloat16):
            wide = Expected(wide=("p_z",) if dim >= 64 else ())
            z = torch.empty(4096, dim, dtype=dtype, device="meta")
            name, run = f"d={dim} {TYPES[dtype]}", runs(index, 1024, None)
            with recorder(f"sum {name}", {"sum_chunks_kernel": wide}):
                codebook_statistics(index, z, 1024, None)
            with recorder(f"difference {name}"):
                chunk_sums(z, run, codes=codes)
            with recorder(f"normalised difference {name}"):
                chunk_sums(z, run, norm=norm, codes=codes)
