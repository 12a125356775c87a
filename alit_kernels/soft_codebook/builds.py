"""Ahead-of-time builds: forward and backward with a target."""

from __future__ import annotations

import torch

from .._builds import TYPES, Expected, Recorder
from .triton_ import soft_codebook, soft_codebook_backward

KERNELS = ("forward_kernel", "grad_logits_kernel", "grad_codebook_kernel")


def record(recorder: Recorder) -> None:
    target = torch.empty(4096, dtype=torch.int64, device="meta")
    for dtype in (torch.float32, torch.bfloat16):
        logits = torch.empty(4096, 1024, dtype=dtype, device="meta")
        for channels in (16, 64, 128, 256):
            codebook = torch.empty(1024, channels, dtype=dtype, device="meta")
            name = f"c={channels} {TYPES[dtype]}"
            expected = dict.fromkeys(KERNELS, Expected(tensor_core=True, wgmma=True))
            if dtype == torch.float32:
                expected |= dict.fromkeys(
                    ("forward_kernel", "grad_codebook_kernel"), Expected(tensor_core=True)
                )
            with recorder(name, expected):
                code, nll, p_target, normalizer = soft_codebook(logits, codebook, target)
                soft_codebook_backward(
                    *(code, nll, p_target, logits, codebook, target, code, normalizer, True, True)
                )
