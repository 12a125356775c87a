"""Operators of torch.library, and the way around torch's dispatcher for calls that nothing watches.

Short sequences make short kernels, so the host has to be quick too, and the dispatcher's way through Python takes
longer than many of the kernels. A call that nothing traces, transforms or profiles goes to the operator's function.

Time saved, on one thread, medians in turns: tail_mask of one token takes 23.7 us through the dispatcher and
10.4 us around it, with its backward 161.3 us and 97.0 us (``python -m benchmarks.studies.dispatcher``; machine and
date are in ``benchmarks/results/dispatcher.json``).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ._calls import LOOKS, table


class Operator:
    """An operator ``alit_kernels::NAME``, which the method ``_run`` of a subclass computes on all devices.

    Args:
        schema: ``name(arguments) -> returns``; the last argument is a string.
        fake: shapes and dtypes of the outputs; takes the operator's arguments.
    """

    def __init__(self, schema: str, fake: Callable[..., Any]) -> None:
        self.name, _, rest = schema.partition("(")
        #: Container of several results: torch wants a list for "Tensor[]", its autograd functions a tuple.
        results = list if rest.endswith("-> Tensor[]") else _as_they_are
        self._op = torch.library.custom_op(
            f"alit_kernels::{self.name}",
            lambda *arguments: results(self._run(None, *arguments)),
            mutates_args=(),
            schema="(" + rest,
        )
        self._op.register_fake(lambda *arguments: results(fake(*arguments)))
        self._op.register_vmap(self._refuse_vmap)
        self.register_autograd(self._refuse_gradient, lambda ctx, inputs, output: None)

    def _run(self, key: bytes | None, *arguments: Any) -> Any:
        """Compute the results, and remember the call by its ``key`` unless that is None."""
        raise NotImplementedError

    def run_known(self, *arguments: Any) -> Any:
        """Compute the results of a known call; the last argument is what was remembered of it."""
        raise NotImplementedError

    def known(self, *arguments: Any) -> Any:
        """Entry remembered for a call with these arguments, ``implementation`` the last; None if there is none."""
        return self.calls.known(self.calls.key(*arguments))

    def register_autograd(
        self, backward: Callable[..., Any], setup_context: Callable[..., None]
    ) -> None:
        """Make the operator differentiable.

        Args:
            backward: (ctx, *gradients of the outputs) -> gradients of the arguments but ``implementation``; calls
                operators. An incoming gradient is None, not zeros, for an output that was not used; never are all None.
                ``ctx.needs_input_grad`` says which arguments need a gradient; the others get None.
            setup_context: (ctx, inputs, output): keeps what ``backward`` needs.
        """

        def complete(*rest: None) -> Callable[..., tuple[Any, ...]]:
            """Backward of a function that takes further arguments behind the op's; ``rest``: their gradients, None."""

            def complete_backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
                if grads[0] is None and all(grad is None for grad in grads):
                    return (None,) * len(ctx.needs_input_grad)
                return (*backward(ctx, *grads), *rest)

            return complete_backward

        def setup(ctx: Any, inputs: Sequence[Any], output: Any) -> None:
            ctx.set_materialize_grads(False)
            setup_context(ctx, inputs, output)

        def forward(ctx: Any, *inputs: Any) -> Any:
            arguments, known = inputs[:-1], inputs[-1]
            if type(known) is tuple:  # the core has the results already
                outputs = known[0]
            elif known is None:
                outputs = self._run(self.calls.key(*arguments), *arguments)
            else:
                outputs = self.run_known(*inputs)
            ctx.set_materialize_grads(False)
            setup_context(ctx, arguments, outputs)
            return outputs

        of_op = complete(None)
        self._op.register_autograd(of_op, setup_context=setup)
        function = self._new_function(forward=forward, backward=complete(None, None))
        self.differentiate = function.apply
        # A known call has no tensors with wrappers of torch.func, which Function.apply looks for.
        self.differentiate_known = super(torch.autograd.Function, function).apply  # type: ignore[misc]
        self.calls = table(self.run_known, self.differentiate_known)
        # The form of function that torch.func takes.
        self._transformable = self._new_function(
            forward=self._below_transforms,
            setup_context=setup,
            backward=lambda ctx, *grads: of_op(_Unwrapped(ctx), *grads),
            vmap=self._refuse_vmap,
        )

    def _new_function(self, **methods: Callable[..., Any]) -> type[torch.autograd.Function]:
        name, bases = f"alit_kernels.{self.name}", (torch.autograd.Function,)
        return type(name, bases, {name: staticmethod(each) for name, each in methods.items()})

    def call(self, *arguments: Any) -> Any:
        """Results of the operator, by the shortest way that this call allows."""
        if torch.compiler.is_compiling():
            return self._op(*arguments)
        if _nothing_looks() and (key := self.calls.key(*arguments)) is not None:
            if torch.is_grad_enabled() and _any_requires_grad(arguments):
                return self.differentiate(*arguments, None)
            return self._run(key, *arguments)
        if torch.autograd.forward_ad._current_level >= 0:
            self._refuse_tangents(arguments)
        if torch.autograd._profiler_enabled() or transformed(arguments):
            return self._observed_call(arguments)
        if torch.is_grad_enabled() and _any_requires_grad(arguments):
            return self.differentiate(*arguments, None)
        return self._run(None, *arguments)

    def _observed_call(self, arguments: tuple[Any, ...]) -> Any:
        if any(isinstance(x, Tensor) and _is_batched(x) for x in arguments):
            self._refuse_vmap()
        transform = torch._C._functorch.peek_interpreter_stack()
        if transform is not None and transform.key() == torch._C._functorch.TransformType.Grad:
            return self._transformable.apply(*arguments)
        return self._op(*arguments)

    def _below_transforms(self, *arguments: Any) -> Any:
        """Results of the call with torch.func's wrappers taken off; modes and tensor subclasses may still be there."""
        if not transformed(arguments):
            return self._run(None, *arguments)
        results = self._op(*arguments)
        return tuple(results) if isinstance(results, list) else results

    def _refuse_gradient(self, *_: Any) -> Any:
        raise NotImplementedError(f"alit_kernels.{self.name} has no derivative")

    def _refuse_vmap(self, *_: Any, **__: Any) -> Any:
        raise NotImplementedError(
            f"alit_kernels.{self.name} does not support torch.vmap; add a batch dimension instead"
        )

    def _refuse_tangents(self, arguments: tuple[Any, ...]) -> None:
        unpack = torch.autograd.forward_ad.unpack_dual
        if any(isinstance(x, Tensor) and unpack(x).tangent is not None for x in arguments):
            raise NotImplementedError(
                f"alit_kernels.{self.name} does not support forward-mode differentiation"
            )


def _as_they_are(results: Any) -> Any:
    return results


class _Unwrapped:
    """A backward's context whose saved tensors have lost the wrappers of transforms that have ended."""

    def __init__(self, ctx: Any) -> None:
        self._ctx = ctx

    def __getattr__(self, name: str) -> Any:
        return getattr(self._ctx, name)

    @property
    def saved_tensors(self) -> tuple[Tensor | None, ...]:
        unwrapped = torch._C._functorch.unwrap_if_dead
        return tuple(None if x is None else unwrapped(x) for x in self._ctx.saved_tensors)


_PLAIN = (Tensor, torch.nn.Parameter)
#: (tensor) -> True if it is a legacy batched tensor, as ``is_grads_batched`` and the like make.
_is_batched = torch._C._functorch.is_legacy_batchedtensor


def _any_requires_grad(arguments: tuple[Any, ...]) -> bool:
    return any(isinstance(x, Tensor) and x.requires_grad for x in arguments)


def _nothing_looks() -> bool:
    return not any(looks() for looks in LOOKS)


def transformed(arguments: tuple[Any, ...]) -> bool:
    """True if the call must go through torch's dispatcher: a mode, transform or tracer is active, or a tensor is of
    another type, without data or with a sign still to be applied.
    """
    return bool(
        torch._C._len_torch_dispatch_stack()
        or torch._C._len_torch_function_stack()
        or torch._C._are_functorch_transforms_active()
        or torch.autograd.forward_ad._current_level >= 0
        or torch._C._get_tracing_state()
        or any(
            isinstance(x, Tensor)
            and (
                type(x) not in _PLAIN
                or x.is_meta
                or x.is_neg()
                or x._is_zerotensor()
                or _is_batched(x)
            )
            for x in arguments
        )
    )
