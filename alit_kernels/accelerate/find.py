"""Search for the modules of a model that can be swapped."""

from __future__ import annotations

import re
from collections.abc import Iterator

from torch import Tensor, nn

from .._plain import is_plain
from ..nn.multihead_attention import MultiheadAttention, unfit
from .classes import InOurWay, swap
from .families import family_of
from .probe import prove, prove_attention
from .report import Change, Left, Report, Swapped


def accelerate(model: nn.Module, *, strict: bool = False) -> Report:
    """Swap the attention modules and quantizers of a model for ours where that changes no result.

    Modules of the class ``torch.nn.MultiheadAttention`` become :class:`alit_kernels.nn.MultiheadAttention`, and
    quantizers of the families that ``docs/your-tokenizer.md`` lists a subclass of their own class. It is the class that
    changes: parameters, buffers, keys, hooks, optimizers, ``isinstance`` and pickles stay. Each is probed before: its
    outputs, which of them require a gradient, gradients of input and parameters, and its state after two steps of
    training equal those of a copy that is as it was. What differs is not touched. Calls that ours do not compute (see
    the classes and that page) go to the code that was there.

    Call it before ``torch.compile``, ``fully_shard`` and the like, which look at classes.

    Args:
        model: any module; it is changed in place.
        strict: raise where a module that looks like one of these was left as it was.

    Returns:
        :class:`Report`; print it, or ``undo()`` it.

    Raises:
        TypeError: ``model`` is no module.
        ValueError: with ``strict``, what was left and why. Nothing is swapped then.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    swapped: list[Swapped] = []
    left: list[Left] = []
    known: list[str] = []
    for name, module in model.named_modules():
        if any(_is_within(name, other) for other in known):
            continue
        found = _attention(name, module) or _quantizer(name, module)
        if found is not None or isinstance(module, InOurWay):
            known.append(name)
        if isinstance(found, Swapped):
            swapped.append(found)
        elif found is not None:
            left.append(found)
    left += _unknown(model, known)
    names = {each.name for each in swapped}
    notes = [
        f"{name or '(model)'}: the fast path of nn.TransformerEncoderLayer (evaluation without gradients) never calls"
        " its attention module"
        for name, module in model.named_modules()
        if isinstance(module, nn.TransformerEncoderLayer)
        and f"{name}.self_attn".lstrip(".") in names
    ]
    report = Report(tuple(swapped), tuple(left), tuple(notes))
    if strict and left:
        report.undo()
        raise ValueError(f"model: expected modules that can all be swapped, got\n{report}")
    return report


def _attention(name: str, module: nn.Module) -> Swapped | Left | None:
    cls = type(module)
    if not isinstance(module, nn.MultiheadAttention) or cls is MultiheadAttention:
        return None
    kind = "attention"
    if cls is not nn.MultiheadAttention:
        return Left(name, kind, f"{cls.__qualname__} is a subclass, which may compute otherwise")
    why = unfit(module) or _changed(module)
    if not why and not is_plain(*module.parameters()):
        why = "its weights are no plain tensors"
    if not why and module.out_proj.weight.is_meta:
        why = "it is on the meta device, where nothing can be compared"
    why = why or prove_attention(module)
    if why:
        return Left(name, kind, why)
    module.__class__ = MultiheadAttention
    return Swapped(name, kind, (Change(module, cls, MultiheadAttention),))


def _quantizer(name: str, module: nn.Module) -> Swapped | Left | None:
    if isinstance(module, InOurWay):
        return None
    family = family_of(module)
    if family is None:
        return None
    why = _changed(module) or _hooked(module) or family.obstacle(module)
    if not why:
        why = prove(module, family)
    if why:
        return Left(name, family.name, why)
    return Swapped(name, family.name, swap(module, family))


def _is_within(name: str, other: str) -> bool:
    """True if module ``name`` is a part of module ``other``."""
    return not other or name.startswith(f"{other}.")


def _unknown(model: nn.Module, known: list[str]) -> Iterator[Left]:
    """Modules named like quantizers, with a codebook of their own, that neither contain nor are part of a known one."""
    for name, module in model.named_modules():
        called = type(module).__name__
        if not re.search("quantizer|quantize$|codebook|vq(?!gan|vae)", called, re.IGNORECASE):
            continue
        if any(_is_within(name, k) or _is_within(k, name) or k == name for k in known):
            continue
        tensors = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
        own = [*module.children(), *tensors]
        if any(isinstance(x, nn.Embedding) or (isinstance(x, Tensor) and x.ndim > 1) for x in own):
            yield Left(
                name,
                called,
                "no quantizer of a known family; alit_kernels.vector_quantize may do its work",
            )


def _changed(module: nn.Module) -> str:
    """Reason why a module is not what its class says; empty if it is."""
    if "forward" in vars(module):
        return "its forward was replaced"
    plain = type(module).__reduce_ex__ is object.__reduce_ex__
    plain = plain and type(module).__reduce__ is object.__reduce__
    return "" if plain else "its class pickles in a way of its own"


def _hooked(module: nn.Module) -> str:
    """Message if a part has hooks, which our forward would not call; empty if none has."""
    for part in module.modules():
        hooks = (part._forward_hooks, part._forward_pre_hooks)
        if part is not module and any((*hooks, part._backward_hooks, part._backward_pre_hooks)):
            return "a part of it has hooks"
    return ""
