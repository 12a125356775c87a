"""Layer norm together with what comes before it in a transformer block."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .._checks import autocast_dtype
from ..add_layer_norm import add_layer_norm


class LayerNorm(nn.LayerNorm):
    """``torch.nn.LayerNorm`` over the last dimension; ``norm(x, branch)`` adds first, and gives sum and norm.

    On a GPU both are one kernel, and under autocast the norm has the dtype that a linear layer behind it takes.
    """

    def forward(self, x: Tensor, branch: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:  # type: ignore[override]
        """The norm of x (..., C); with a branch of its shape ``(x + branch, norm of it)``."""
        if not x.is_cuda or torch.compiler.is_compiling():
            total = x if branch is None else x + branch
            normalized = super().forward(total)
        else:
            dtype = autocast_dtype("cuda")
            total, normalized = add_layer_norm(
                x, branch, self.weight, self.bias, eps=self.eps, dtype=dtype
            )
        return normalized if branch is None else (total, normalized)
