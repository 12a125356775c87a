"""Cache of calls by their signature: checks and choices before a computation are made once for each signature.

Checks of arguments, the choice of an implementation and of its launches follow from types, shapes, strides and numbers.
The outcome of a call is remembered, by an op and by the public function before it; the next call with this signature is
a single call of the core (``csrc/launcher/calls.cpp``). A public function uses the cache in three places::

    def tail_mask(tokens, lengths, fill, *, implementation="auto"):
        arguments = tokens, lengths, fill, implementation
        if not is_dynamo_compiling() and (found := _known.call(*arguments)) is not None:
            return found
        ...  # checks
        return _known.first(arguments, (tokens, lengths, fill))

    _known = Public(_tail_mask)  # behind the op's register_autograd

The known call makes no checks but those of values on the CPU. It is differentiable where the op is.
"""

from __future__ import annotations

import operator
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ._checks import autocast_dtype
from ._core import extension, sees_tensors

ENVIRONMENT_VARIABLE = "ALIT_KERNELS_IMPLEMENTATION"
#: Most calls that an op, or a public function, remembers; beyond that it forgets all.
MOST_KNOWN = 1024
#: Predicates, each True where a mode, transform, tracer or profiler is active, which has to see torch's operators.
LOOKS = (
    torch._C._len_torch_dispatch_stack,
    torch._C._len_torch_function_stack,
    torch._C._are_functorch_transforms_active,
    torch._C._get_tracing_state,
    torch.autograd._profiler_enabled,
    lambda: torch.autograd.forward_ad._current_level >= 0,
)
#: The raw environment: os.environ decodes names and values in every call.
_ENVIRONMENT: Mapping[Any, Any] = os.environ._data  # type: ignore[attr-defined]
_VARIABLE = os.environ.encodekey(ENVIRONMENT_VARIABLE)


def requested(implementation: str) -> str:
    """Name of the requested implementation, instead of "auto" the environment's; raises ``TypeError`` if no string."""
    if not isinstance(implementation, str):
        raise TypeError(f"implementation: expected a string, got {type(implementation).__name__}")
    if implementation != "auto":
        return implementation
    found = _ENVIRONMENT.get(_VARIABLE)
    return "auto" if found is None else os.environ.decodevalue(found)


# As torch.compiler.assume_constant_result does, without its import of the compiler: half the time of `import alit`.
requested._dynamo_marked_constant = True  # type: ignore[attr-defined]


class _NothingKnown:
    """Table without any known call, for where the core cannot look into tensors."""

    def __call__(self, *_: Any) -> None:
        return None

    key = known = __call__


def table(run: Callable[..., Any], differentiate: Callable[..., Any] | None) -> Any:
    """Table of calls: (*arguments, implementation) -> results; None if the call is unknown or something watches it.

    Args:
        run, differentiate: (*the op's arguments, what was remembered) -> results; the second where a gradient is asked
            for, None if there never is a gradient. It may get (results,) as the last argument, of a plan that has run.
    """
    if not sees_tensors():
        return _NothingKnown()
    return extension().Calls(
        run=run,
        differentiate=differentiate,
        looks=LOOKS,
        grad_mode=torch.is_grad_enabled,
        autocast=torch._C._is_any_autocast_enabled,
        autocast_dtype=autocast_dtype,
        environment=_ENVIRONMENT,
        variable=_VARIABLE,
        most=MOST_KNOWN,
    )


class Public:
    """Cache of the calls of a public function, each of which becomes one call of an op.

    Args:
        op: the op, which has its derivative already.
        differentiable: whether gradients pass; else the op gets its arguments detached.

    Attributes:
        call: (*arguments, implementation) -> the function's result where the call is known; None where the function
            has to run in full.
    """

    def __init__(self, op: Any, *, differentiable: bool = True) -> None:
        self._op, self._differentiable = op, differentiable
        self.call = (
            table(op.run_known, op.differentiate_known)
            if differentiable
            else table(lambda *arguments: op.run_known(*map(_detached, arguments)), None)
        )

    def first(
        self,
        arguments: Sequence[Any],
        values: Sequence[Any],
        finish: Callable[[Any], Any] | None = None,
    ) -> Any:
        """Call the op, remember the call, and return the public function's result, as ``call`` does.

        Nothing is remembered where the op gets other tensors than the function (casts, copies), or in another order.

        Args:
            arguments: the public function's, with ``implementation`` as the last.
            values: arguments of the op, without ``implementation``; numbers and options among them follow from the
                signature of the public function's arguments.
            finish: (results of the op) -> result of the public function.
        """
        implementation = arguments[-1]
        given = values if self._differentiable else [_detached(x) for x in values]
        result = self._op(*given, implementation=implementation)
        if not torch.compiler.is_compiling():
            self._remember(arguments, (*values, requested(implementation)), finish)
        return result if finish is None else finish(result)

    def _remember(self, arguments: Sequence[Any], values: tuple[Any, ...], finish: Any) -> None:
        tensors, taken = ([x for x in xs if isinstance(x, Tensor)] for xs in (arguments, values))
        if len(tensors) == len(taken) and all(map(operator.is_, tensors, taken)):
            key, known = self.call.key(*arguments), self._op.known(*values)
            if key is not None and known is not None:
                self.call.add(key, known.plan, known, values, finish)


def _detached(x: Any) -> Any:
    return x.detach() if isinstance(x, Tensor) else x
