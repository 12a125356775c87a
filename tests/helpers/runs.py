"""Small training runs for tests: configuration, readers of the files they write, and signals that stop them."""

from __future__ import annotations

import json
import os
import signal
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import alit
import alit_kernels
from alit.training import TrainingConfig, checkpoints
from alit.training.processes import Processes
from alit.training.stage import Stage

PACKAGES = [Path(package.__file__).parent for package in (alit, alit_kernels)]
ALONE = Processes(torch.device("cpu"))

SMALL: dict[str, Any] = {
    **{"size": "nano", "base": "dct", "image_size": 32, "codebook_size": 16},
    **{"latents_per_iteration": 2, "iterations": 3},
    "encoder": {"width": 64, "layers": 2, "heads": 2},
    "decoder": {"width": 64, "layers": 1, "heads": 2},
}
VAE: dict[str, Any] = {
    **{"kind": "vae", "latent_channels": 4, "channels": 32, "multipliers": [1, 1], "blocks": 1},
    **{"attention_levels": [], "stem": 4},
}


def config(**fields: Any) -> TrainingConfig:
    values: dict[str, Any] = {
        **{"steps": 6, "batch_size": 4, "learning_rate": 1e-3, "model": SMALL, "log_every": 1},
        **{"precision": "float32", "tensorboard": False, "device": "cpu", "workers": 0},
    }
    return TrainingConfig(**{**values, **fields})


def noise_images(count: int = 4, side: int = 24) -> Tensor:
    """Images of uniform noise, (count, 3, side, side)."""
    return torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(1))


def state_of(run: Path) -> dict[str, bytes]:
    """Bytes of every tensor of a run's newest checkpoint, read without the code under test."""
    file = checkpoints.saved(run)[-1] / "tensors-00000.safetensors"
    return {k: v.view(-1).view(torch.uint8).numpy().tobytes() for k, v in load_file(file).items()}


def log_of(run: Path) -> list[dict[str, float]]:
    """Records of a run's log without speeds."""
    lines = map(json.loads, (run / "log.jsonl").read_text().splitlines())
    return [{k: v for k, v in line.items() if k != "images_per_second"} for line in lines]


def weights_of(run: Path) -> dict[str, Tensor]:
    """Weights in the model file that a run has written."""
    return load_file(run / "model.safetensors")


def differing(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """Names of the tensors, or of their bytes, that differ between the two."""
    assert one.keys() == other.keys()
    return [name for name, x in one.items() if not _equal(x, other[name])]


def _equal(one: Any, other: Any) -> bool:
    return torch.equal(one, other) if isinstance(one, Tensor) else one == other


def stopping(
    at: float | None, sent: signal.Signals = signal.SIGTERM
) -> Callable[[dict[str, float]], None]:
    """Callback for ``on_log`` that sends this process a signal after step ``at``."""

    def stop(record: dict[str, float]) -> None:
        if record["step"] == at:
            os.kill(os.getpid(), sent)

    return stop


def gradients(stage: Stage, parts: list[Tensor], *steps: int) -> dict[str, dict[str, Tensor]]:
    """Gradients by optimizer and parameter at the last of ``steps`` (by default step 0); weights do not change."""
    found: dict[str, dict[str, Tensor]] = {}
    for side, optimizer in stage.optimizers.items():

        def keep(rate: float, side: str = side, optimizer: Any = optimizer) -> Tensor:
            with_gradient = [(n, p) for n, p in optimizer.parameters if p.grad is not None]
            found[side] = {name: p.grad.clone() for name, p in with_gradient}
            optimizer.adamw.zero_grad()
            return torch.zeros(())

        optimizer.step = keep  # type: ignore[method-assign]
    for step in steps or (0,):
        stage.step(step, 0.5, 1e-3, parts)
    return found


class Synchronizations(TorchDispatchMode):
    """Dispatch mode that lists the ``places`` in our packages where the host would wait for a GPU.

    Checks of values are left out: they run on CPU tensors only.
    """

    OPS = ("_local_scalar_dense", "nonzero", "masked_select", "_unique2", "is_nonzero", "equal")
    CHECKS = ("_check_values", "check_index", "_check", "check_offsets", "check_lengths")

    def __init__(self) -> None:
        super().__init__()
        self.places: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name().removeprefix("aten::").split(".")[0]
        indices = args[1] if name in ("index", "index_put", "index_put_") else ()
        if name in self.OPS or any(x is not None and x.dtype == torch.bool for x in indices):
            frames = traceback.extract_stack()[:-1]
            ours = [f for f in frames if set(Path(f.filename).parents) & set(PACKAGES)]
            place = (ours or frames)[-1]
            if place.name not in self.CHECKS:
                self.places.append(f"{place.filename}:{place.name}")
        return func(*args, **(kwargs or {}))
