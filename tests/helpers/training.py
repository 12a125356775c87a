"""Small runs of training, what they left, and where they made the host wait."""

from __future__ import annotations

import traceback
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode

import alit
import alit_kernels
from alit.training import TrainingConfig, checkpoints

PACKAGES = [Path(package.__file__).parent for package in (alit, alit_kernels)]
SMALL: dict[str, Any] = {
    "size": "nano",
    "base": "dct",
    "encoder": {"width": 64, "layers": 2, "heads": 2},
    "decoder": {"width": 64, "layers": 1, "heads": 2},
    "image_size": 32,
    "latents_per_iteration": 2,
    "iterations": 3,
    "codebook_size": 16,
}


def config(**fields: Any) -> TrainingConfig:
    values: dict[str, Any] = {
        "steps": 6,
        "batch_size": 4,
        "learning_rate": 1e-3,
        "precision": "float32",
        "tensorboard": False,
        "device": "cpu",
        "workers": 0,
        "log_every": 1,
        "model": SMALL,
    }
    return TrainingConfig(**{**values, **fields})


def state_of(run: Path) -> dict[str, bytes]:
    """Everything the newest checkpoint holds, read without the code under test."""
    file = checkpoints.saved(run)[-1] / "tensors-00000.safetensors"
    return {k: v.view(-1).view(torch.uint8).numpy().tobytes() for k, v in load_file(file).items()}


class Synchronisations(TorchDispatchMode):
    """Counts what would make the host wait for a GPU, by where in the package it happens."""

    OPS = ("_local_scalar_dense", "nonzero", "masked_select", "_unique2", "is_nonzero", "equal")

    def __init__(self) -> None:
        super().__init__()
        self.places: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name().removeprefix("aten::").split(".")[0]
        indices = args[1] if name in ("index", "index_put", "index_put_") else ()
        if name in self.OPS or any(x is not None and x.dtype == torch.bool for x in indices):
            frames = traceback.extract_stack()[:-1]
            ours = [f for f in frames if set(Path(f.filename).parents) & set(PACKAGES)]
            frame = (ours or frames)[-1]
            self.places.append(f"{frame.filename}:{frame.name}")
        return func(*args, **(kwargs or {}))
