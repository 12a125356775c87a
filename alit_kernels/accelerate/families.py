"""Known families of quantizers. None of their packages is imported."""

from __future__ import annotations

from torch import nn

from .embedded import EMBEDDED
from .family import Family
from .lucidrains import VECTOR_QUANTIZE_PYTORCH

#: Families by name; the first one that knows a module counts.
FAMILIES: dict[str, Family] = {each.name: each for each in (*EMBEDDED, VECTOR_QUANTIZE_PYTORCH)}


def family_of(module: nn.Module) -> Family | None:
    """Family of ``module``; None if no family knows it."""
    return next((family for family in FAMILIES.values() if family.knows(module)), None)
