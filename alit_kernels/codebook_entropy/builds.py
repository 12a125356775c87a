"""Ahead-of-time builds: both metrics, one of them with a mask."""

from __future__ import annotations

import torch

from .._builds import TYPES, Expected, Recorder
from .triton_ import PLAIN, codebook_entropy, codebook_entropy_backward

PRODUCTS = ("rows_kernel", "means_kernel", "grad_z_kernel", "grad_codes_kernel")
GRADIENTS = PRODUCTS[2:]


def record(recorder: Recorder) -> None:
    mask = torch.empty(4096, dtype=torch.bool, device="meta")
    for dim in (8, 32, 256):
        for dtype in (torch.float32, torch.bfloat16):
            z = torch.empty(4096, dim, dtype=dtype, device="meta")
            codebook = torch.empty(16384, dim, dtype=dtype, device="meta")
            for metric, some in (("cosine", mask), ("euclidean", None)):
                options = metric, 0.01, 1e-5
                plain = dim <= PLAIN and (dtype == torch.float32 or metric == "cosine")
                kernels = GRADIENTS if plain else PRODUCTS
                expected = dict.fromkeys(kernels, Expected(tensor_core=True))
                masked = " cosine masked" if some is not None else ""
                with recorder(f"d={dim} {TYPES[dtype]}{masked}", expected):
                    sample, batch, *rest = codebook_entropy(z, codebook, some, *options)
                    mean, entropy, normalizer, count = rest
                    saved = (z, codebook, some, mean, entropy, normalizer, count, *options)
                    codebook_entropy_backward(sample, batch, *saved, True, True)
                if plain:
                    del expected["grad_z_kernel"]
                with recorder(f"d={dim} {TYPES[dtype]}{masked}, codebook alone", expected):
                    codebook_entropy_backward(sample, batch, *saved, False, True)
