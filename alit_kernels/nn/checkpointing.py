"""Support for modules that change themselves under ``torch.utils.checkpoint``, which runs their forward twice.

The second run has to see what the first one saw. Which first run it repeats is known from the checkpointed region: an
object of torch's that lives as long as the region's graph, and keeps what the first run has recorded.
"""

from __future__ import annotations

import sys
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import checkpoint

_REENTRANT = checkpoint.CheckpointFunction
#: Class of regions that are not reentrant; a private name, without which recomputations are refused.
_REGION: type = getattr(checkpoint, "_CheckpointFrame", type(None))
_ATTRIBUTE = "_alit_kernels_recorded"


class _Recorded:
    """Tensors of one module in one region, in the order of its calls; the number that a recomputation has taken."""

    def __init__(self) -> None:
        self.tensors: list[Tensor] = []
        self.task, self.next = -1, 0


def in_backward() -> bool:
    """True if a backward pass runs, in which a forward is a recomputation."""
    return torch._C._current_graph_task_id() != -1


def region() -> Any:
    """The checkpointed region whose first run this is, or None. Under ``no_grad`` only one that will have gradients."""
    if not torch.is_grad_enabled():
        found = _on_the_stack(_REENTRANT.forward.__code__)
        return found if getattr(found, "next_functions", None) else None
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    if hooks is None:
        return None
    cells = getattr(hooks[0], "__closure__", None) or ()
    return next((c.cell_contents for c in cells if isinstance(c.cell_contents, _REGION)), None)


def refuse_compiled_region() -> None:
    """Raise ``RuntimeError`` while a checkpointed region is compiled, whose recomputation would see the codebook as it
    is after the update.
    """
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if type(frame.f_locals.get("self")).__name__ == "CheckpointHigherOrderVariable":
            raise RuntimeError(
                "VectorQuantizer: compiled within torch.utils.checkpoint, which would compute it again with the"
                " codebook after its update; leave a codebook that is updated in the forward out of the checkpoint, or"
                " of the compiled code"
            )
        frame = frame.f_back


# As torch.compiler.assume_constant_result does: it runs while code is compiled, not in the compiled code.
refuse_compiled_region._dynamo_marked_constant = True  # type: ignore[attr-defined]


def record(region: Any, module: nn.Module, tensor: Tensor) -> None:
    """Keep a tensor of a module's call for the recomputation of the region."""
    recorded = region.__dict__.setdefault(_ATTRIBUTE, {}).setdefault(module, _Recorded())
    recorded.tensors.append(tensor)


def recall(module: nn.Module) -> Tensor:
    """Tensor that the call which is being recomputed has recorded.

    Raises:
        RuntimeError: a forward within a backward that is no such recomputation.
    """
    found = _on_the_stack(_REENTRANT.backward.__code__)
    recorded = None if found is None else found.__dict__.get(_ATTRIBUTE, {}).get(module)
    task = torch._C._current_graph_task_id()
    if recorded is not None and recorded.task != task:
        recorded.task, recorded.next = task, 0
    if recorded is None or recorded.next == len(recorded.tensors):
        raise RuntimeError(
            f"{type(module).__name__}: a forward within a backward pass that repeats none that"
            " torch.utils.checkpoint has seen (a nested or another checkpoint, a compiled module, or a hook); leave a"
            " codebook that is updated in the forward out of it, or call the module in evaluation mode"
        )
    recorded.next += 1
    return recorded.tensors[recorded.next - 1]


def _not_recomputed(count: Tensor) -> Tensor:
    if in_backward():
        raise RuntimeError(
            "VectorQuantizer: compiled, it cannot tell the recomputation of a checkpoint (torch.utils.checkpoint) from"
            " a first run; leave it out of the checkpoint, or out of what is compiled"
        )
    return count.clone()


#: Operator for compiled code: a copy of ``count``; raises where a backward runs.
not_recomputed = torch.library.custom_op(
    "alit_kernels::not_recomputed",
    _not_recomputed,
    mutates_args=(),
    schema="(Tensor count) -> Tensor",
)
not_recomputed.register_fake(torch.empty_like)


def _on_the_stack(reentrant: Any) -> Any:
    """The innermost region among the callers: of a function of ``CheckpointFunction``, or not reentrant."""
    frame: FrameType | None = sys._getframe(2)
    while frame is not None:
        if frame.f_code is reentrant:
            return frame.f_locals["ctx"]
        if frame.f_globals is checkpoint.__dict__:
            for value in frame.f_locals.values():
                if isinstance(value, _REGION):
                    return value
        frame = frame.f_back
    return None
