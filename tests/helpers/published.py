"""Checkpoints in the published layout."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from alit import AdaptiveTokenizer
from tests.helpers.models import model


def published(path: Path, base: str, bottleneck: str) -> AdaptiveTokenizer:
    """Write a checkpoint in the published layout; returns the model whose weights are its ``ema``.

    Weights of ``model`` differ from ``ema``, ``args`` is a Namespace, and losses have weights too.
    """
    original = model(base, bottleneck=bottleneck, image_size=(16, 16))
    ema = {**original.state_dict(), "gan_losses.0.discriminator.main.0.weight": torch.zeros(3)}
    torch.save(
        {
            "model": {name: value + 1 for name, value in ema.items()},
            "ema": ema,
            "optimizer": {"state": {0: {"step": torch.tensor(3.0)}}, "param_groups": [{"lr": 0.1}]},
            "epoch": 7,
            "args": argparse.Namespace(model="alit_tiny", lr=1e-4),
        },
        path,
    )
    return original
