"""Tensors of several processes: the rows that this one holds, and their reading from the files of all."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from .log import NotFinite
from .processes import Processes


def shape_of(name: str, files: list[Any]) -> tuple[int, ...] | None:
    """Shape of a tensor whose rows safetensors files hold in turn; None where they do not fit, or there is none."""
    shapes = [tuple(file.get_slice(name).get_shape()) for file in files]
    if len(shapes) < 2:
        return shapes[0] if shapes else None
    if any(not shape or shape[1:] != shapes[0][1:] for shape in shapes):
        return None
    return sum(shape[0] for shape in shapes), *shapes[0][1:]


def fill(name: str, tensor: Tensor, files: list[Any]) -> None:
    """Read this process's rows of a tensor from the files; raises ``ValueError`` for another shape or dtype."""
    found = shape_of(name, files)
    if found != tuple(tensor.shape):
        raise ValueError(f"{name}: expected the shape {tuple(tensor.shape)}, found {found}")
    rows, first = rows_of(tensor)
    if not tensor.ndim:
        _copy(name, rows, files[0].get_tensor(name))
        return
    at = 0
    for file in files:
        piece = file.get_slice(name)
        end = at + piece.get_shape()[0]
        start, stop = max(first, at), min(first + len(rows), end)
        if start < stop:
            _copy(name, rows[start - first : stop - first], piece[start - at : stop - at])
        at = end


def _copy(name: str, target: Tensor, source: Tensor) -> None:
    if source.dtype != target.dtype or source.shape != target.shape:
        raise ValueError(f"{name}: expected {target.dtype}, found {source.dtype}")
    target.copy_(source)


def is_sharded(tensor: Tensor) -> bool:
    return isinstance(tensor, DTensor) and not tensor.placements[0].is_replicate()


def rows_of(tensor: Tensor) -> tuple[Tensor, int]:
    """This process's rows of a tensor, live, and the number of the first of them in the whole.

    FSDP2 shards the first dimension alone, over a mesh of one dimension.
    """
    if not isinstance(tensor, DTensor):
        return tensor.detach(), 0
    local = tensor.to_local().detach()
    if not is_sharded(tensor):
        return local, 0
    rows, mesh = tensor.shape[0], tensor.device_mesh
    return local, min(mesh.get_local_rank() * -(-rows // mesh.size()), rows)


def check_finite(tensors: Mapping[str, Tensor], step: int, own: Processes) -> None:
    """Check that no process has a value that is NaN or infinite; the host waits for the device once.

    Raises:
        alit.training.NotFinite: the message names such tensors, in every process.
    """
    local = {name: rows_of(x)[0] for name, x in tensors.items() if x.is_floating_point()}
    bad: list[str] = []
    if local:
        device = next(iter(local.values())).device
        # A value that is not finite makes the sum so. Large ones may too, and are looked at again.
        sums = torch.stack([x.sum().isfinite().to(device) for x in local.values()]).tolist()
        doubtful = [name for name, good in zip(local, sums, strict=True) if not good]
        bad = [name for name in doubtful if not local[name].isfinite().all()]
    found = list(dict.fromkeys(name for names in own.gather(bad) for name in names))
    if found:
        more = f" and {len(found) - 5} more" if len(found) > 5 else ""
        raise NotFinite(f"not finite after step {step}: {', '.join(found[:5])}{more}")
