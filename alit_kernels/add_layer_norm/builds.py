"""What is compiled ahead of time: the named sizes, with sums in float32 as under autocast, or all in one dtype."""

from __future__ import annotations

import itertools

import torch

from .._builds import TYPES, Recorder
from .triton_ import add_layer_norm, add_layer_norm_backward

#: (x, branch, normalized): float32; autocast; a model in half precision.
DTYPES = (
    (torch.float32, torch.float32, torch.float32),
    (torch.float32, torch.bfloat16, torch.bfloat16),
    (torch.float32, torch.float16, torch.float16),
    (torch.bfloat16, torch.bfloat16, torch.bfloat16),
)


def record(recorder: Recorder) -> None:
    for channels, dtypes, added in itertools.product((256, 512, 768, 1024), DTYPES, (True, False)):
        x, branch, normalized = (
            torch.empty(4096, channels, dtype=dtype, device="meta") for dtype in dtypes
        )
        weight = torch.empty(
            channels, dtype=dtypes[0] if dtypes[0] == dtypes[2] else torch.float32, device="meta"
        )
        name = f"c={channels} {' '.join(TYPES[dtype] for dtype in dtypes)}{' added' * added}"
        with recorder(name):
            total, _, stats = add_layer_norm(
                x, branch if added else None, weight, weight, 1e-5, dtypes[2]
            )
            add_layer_norm_backward(
                x if added else None,
                normalized,
                total if added else x,
                weight,
                stats,
                dtypes[0],
                dtypes[1] if added else None,
                True,
            )
