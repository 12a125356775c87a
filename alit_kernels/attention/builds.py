"""What is compiled ahead of time: every launch configuration, packed and dense, with a key mask and without; the map.

Dense batches and key masks are rare cases, which ``--common`` leaves out.
"""

from __future__ import annotations

import itertools

import torch

from .._builds import TYPES, Expected, Recorder
from .problem import Problem
from .triton_ import attention, attention_backward, attention_map

KERNELS = ("forward_kernel", "backward_queries_kernel", "backward_keys_kernel", "map_kernel")
#: Pointers to rows.
ROWS = ("p_q", "p_k", "p_v", "p_out", "p_do", "p_dq", "p_dk", "p_dv")


def record(recorder: Recorder) -> None:
    for head_dim, dtype in itertools.product((16, 32, 64, 128), TYPES):
        record_entry(recorder, head_dim, dtype)


def record_entry(recorder: Recorder, head_dim: int, dtype: torch.dtype) -> None:
    """What one head dimension and one dtype need."""
    half = dtype.itemsize == 2
    name = f"d={head_dim} {TYPES[dtype]}"
    expected = Expected(half, half, ROWS if half and head_dim >= 64 else ())
    every = dict.fromkeys(KERNELS, expected)
    rows = torch.empty(4, 256, 8, head_dim, dtype=dtype, device="meta")
    offsets = torch.empty(5, dtype=torch.int32, device="meta")
    mask = torch.empty(4, 256, dtype=torch.bool, device="meta")
    for dense, masked in itertools.product((True, False), (True, False)):
        q = rows if dense else rows.flatten(0, 1)
        key_mask = None if not masked else mask if dense else mask.flatten()
        ends = None if dense else offsets
        problem = Problem(q, q, q, ends, None, 256, 256, key_mask, 0.125)
        label = f"{name}{' dense' * dense}{' masked' * masked}"
        with recorder(label, every, rare=dense or masked):
            out, lse = attention(problem)
            attention_backward(problem, out, None, out, lse, True)
    with recorder(f"{name} lse", every, rare=True):
        attention_backward(problem, out, lse, out, lse, True)
    with recorder(name, every):
        attention_map(q, q, lse, offsets, 0, 256, 0, 256, 256, 0.125)
