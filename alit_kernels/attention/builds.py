"""Ahead-of-time builds: every launch configuration, packed and dense, with a key mask and without, with stops; the
map.

Dense batches, key masks and stops are rare cases, which ``--common`` leaves out. Heads wider than 128 are compiled for
packed rows, for dense ones, and for dense ones with a key mask and stops, which need the most registers.
"""

from __future__ import annotations

import itertools

import torch

from .._builds import TYPES, Expected, Recorder
from .._chips import LIMITS
from .configurations import KERNELS, WIDE_SHARED, map_tile, splits, tile
from .problem import Problem
from .triton_ import attention, attention_backward, attention_map

#: Pointers to rows.
ROWS = ("p_q", "p_k", "p_v", "p_out", "p_do", "p_dq", "p_dk", "p_dv")

#: Variants to build: (dense, masked, with stops).
_WAYS = (
    *((False, False, True), (True, True, True)),
    *((*way, False) for way in itertools.product((True, False), (True, False))),
)
_WIDE_WAYS = ((True, True, True), (True, False, False), (False, False, False))


def record(recorder: Recorder) -> None:
    for head_dim, dtype in itertools.product((16, 32, 64, 128, 256, 512), TYPES):
        shared = LIMITS[recorder.architecture].shared_block
        if head_dim <= 256 or shared >= WIDE_SHARED:  # other GPUs take the reference
            record_entry(recorder, head_dim, dtype)


def record_entry(recorder: Recorder, head_dim: int, dtype: torch.dtype) -> None:
    """Record the launches of all kernels for one head dimension and one dtype."""
    half = dtype.itemsize == 2
    name = f"d={head_dim} {TYPES[dtype]}"
    wide = ROWS if half and head_dim >= 64 else ()
    sizes = {kernel: tile(kernel, head_dim, dtype, 90).rows for kernel in KERNELS}
    sizes["map"] = map_tile(head_dim, dtype)[0]
    every = {}
    for kernel, size in sizes.items():
        tensor_core = half or (kernel != "map" and splits(head_dim, dtype, recorder.architecture))
        every[f"{kernel}_kernel"] = Expected(tensor_core, tensor_core and size >= 64, wide)
    rows = torch.empty(4, 256, 8, head_dim, dtype=dtype, device="meta")
    offsets = torch.empty(5, dtype=torch.int32, device="meta")
    mask = torch.empty(4, 256, dtype=torch.bool, device="meta")
    stops = torch.empty(4, 256, dtype=torch.int32, device="meta")
    for dense, masked, stopped in _WAYS if head_dim <= 128 else _WIDE_WAYS:
        q = rows if dense else rows.flatten(0, 1)
        ends = None if dense else offsets
        key_mask, key_stop = (
            None if not given else x if dense else x.flatten()
            for given, x in ((masked, mask), (stopped, stops))
        )
        problem = Problem(q, q, q, ends, None, 256, 256, key_mask, key_stop, 0.125)
        label = f"{name}{' dense' * dense}{' masked' * masked}{' stops' * stopped}"
        with recorder(label, every, rare=dense or masked or stopped):
            out, lse = attention(problem)
            attention_backward(problem, out, None, out, lse, True)
    with recorder(f"{name} lse", every, rare=True):
        attention_backward(problem, out, lse, out, lse, True)
    with recorder(name, every):
        attention_map(q, q, lse, offsets, 0, 256, 0, 256, 256, 0.125)
