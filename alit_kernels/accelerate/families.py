"""The quantizers that are known. None of their packages is imported."""

from __future__ import annotations

from torch import nn

from .embedded import EMBEDDED
from .family import Family
from .lucidrains import VECTOR_QUANTIZE_PYTORCH

#: By name; of those that know a module the first counts.
FAMILIES: dict[str, Family] = {each.name: each for each in (*EMBEDDED, VECTOR_QUANTIZE_PYTORCH)}


def family_of(module: nn.Module) -> Family | None:
    """The family of a module, if it has one."""
    return next((family for family in FAMILIES.values() if family.knows(module)), None)
