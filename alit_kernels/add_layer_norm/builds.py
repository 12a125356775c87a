"""Ahead-of-time builds: the named sizes, with sums in float32 as under autocast, or all in one dtype."""

from __future__ import annotations

import itertools

import torch

from .._builds import TYPES, Recorder
from .triton_ import add_layer_norm, add_layer_norm_backward

#: (x, branch and norm): float32; autocast; a model in half precision.
DTYPES = (
    (torch.float32, torch.float32),
    (torch.float32, torch.bfloat16),
    (torch.bfloat16, torch.bfloat16),
)


def record(recorder: Recorder) -> None:
    for channels, (dtype, half) in itertools.product((256, 512, 768, 1024), DTYPES):
        x = torch.empty(4096, channels, dtype=dtype, device="meta")
        branch = torch.empty(4096, channels, dtype=half, device="meta")
        vector = torch.empty(channels, dtype=dtype, device="meta")
        label = f"c={channels} {TYPES[dtype]} {TYPES[half]}"
        types = dtype, half
        with recorder(label):
            total, _, stats = add_layer_norm(x, branch, vector, vector, vector, 1e-5, half)
            *_, sums = add_layer_norm_backward(x, branch, total, vector, stats, None, *types)
        with recorder(f"{label} before"):
            add_layer_norm_backward(x, branch, total, vector, stats, sums, *types)
        with recorder(f"{label} alone"):
            add_layer_norm(x, None, None, vector, vector, 1e-5, half)
            add_layer_norm_backward(None, branch, x, vector, stats, None, dtype, dtype)
