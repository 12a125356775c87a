"""Ahead-of-time builds: each precision, and the exact search by "cosine" and, a rare case, with a mask."""

from __future__ import annotations

import torch

from .._builds import TYPES, Expected, Recorder
from .triton_ import search


def record(recorder: Recorder) -> None:
    mask = torch.empty(4096, dtype=torch.bool, device="meta")
    expected = {"propose_kernel": Expected(tensor_core=True, wgmma=True)}
    for dtype in (torch.float32, torch.bfloat16):
        for dim in (8, 12, 64, 256, 512):
            z = torch.empty(4096, dim, dtype=dtype, device="meta")
            codebook = torch.empty(1024, dim, dtype=dtype, device="meta")
            name = f"d={dim} {TYPES[dtype]}"
            with recorder(name, expected):
                search(z, codebook, "euclidean", "ieee")
            with recorder(f"{name} masked", expected, rare=True):
                search(z, codebook, "euclidean", "ieee", mask)
            with recorder(f"{name} cosine", expected):
                search(z, codebook, "cosine", "ieee")
            with recorder(f"{name} tf32", expected):
                search(z, codebook, "euclidean", "tf32")
