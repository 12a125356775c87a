"""Devices by name, for the command line."""

from __future__ import annotations

import torch


def choose(name: str) -> torch.device:
    """The device of "auto" (a CUDA device where there is one, else the CPU), "cpu", "cuda", "cuda:1", ...

    Raises:
        ValueError: no device's name, or a device that is not there.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        if device.type == "meta":
            raise RuntimeError("it computes nothing")
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0][:200]
        raise ValueError(
            f"device: expected auto, cpu or cuda:N that is there, got {name!r} ({reason})"
        ) from error
    return device
