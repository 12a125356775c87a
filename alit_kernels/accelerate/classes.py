"""Classes of swapped quantizers: subclasses of their own, with another forward, that pickle and copy."""

from __future__ import annotations

import functools
import types
from typing import Any

from torch import nn

from .families import FAMILIES
from .family import Family


class InOurWay:
    """Base of the classes that swapped quantizers have. What pickles and copies them finds the class again."""

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        _, _, *state = super().__reduce_ex__(max(protocol, 2))  # type: ignore[misc]
        base, family, part = type(self)._swapped  # type: ignore[attr-defined]
        return (_new, (base, family, part), *state)


def _new(base: type, family: str, part: str) -> Any:
    cls = swapped_class(base, family, part)
    return cls.__new__(cls)


@functools.cache
def swapped_class(base: type[nn.Module], family: str, part: str) -> type[nn.Module]:
    """The subclass of ``base`` whose forward is that of a family's part, by the same name."""
    function, original = FAMILIES[family].parts[part], base.forward

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return function(self, original, *args, **kwargs)

    members = {
        "forward": functools.wraps(original)(forward),
        "_swapped": (base, family, part),
        "__module__": base.__module__,
        "__qualname__": base.__qualname__,
        "__doc__": base.__doc__,
    }
    return types.new_class(base.__name__, (InOurWay, base), {}, lambda body: body.update(members))


def swap(module: nn.Module, family: Family) -> tuple[tuple[nn.Module, type[nn.Module]], ...]:
    """Change the class of each part; the parts with the classes that they had."""
    before = []
    for part in family.parts:
        target = module.get_submodule(part)
        if not isinstance(target, InOurWay):  # one that several modules share
            before.append((target, type(target)))
            target.__class__ = swapped_class(type(target), family.name, part)
    return tuple(before)


def restore(module: nn.Module, family: Family) -> None:
    """Give each part that is swapped the class that it had."""
    for part in family.parts:
        target: Any = module.get_submodule(part)
        if isinstance(target, InOurWay):
            target.__class__ = type(target)._swapped[0]
