"""Attention of other libraries, one small adapter each: takes a :class:`Problem`, returns a call in the peer's layout.

A call returns ``[out]``, or ``[out, dq, dk, dv]`` if the problem is a step, each as packed rows (T, H, D) or padded
(B, N, H, D). Layouts are made outside the call. If lengths differ, peers that cannot take packed rows get padded rows
and a key mask.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from alit_kernels import attention, cumulative_offsets, unpack, varlen_attention

from ..harness.contest import DEVICE, Absent
from . import eager, libraries

Call = Callable[[], list[Tensor]]


class Problem:
    """Packed queries, keys, values and output gradient (T, H, D) of sequences of the given lengths."""

    def __init__(
        self, lengths: tuple[int, ...], heads: int, head_dim: int, dtype: torch.dtype, step: bool
    ) -> None:
        generator = torch.Generator().manual_seed(0)
        self.lengths, self.longest, self.step = lengths, max(lengths), step
        self.equal = len(set(lengths)) == 1
        size = (sum(lengths), heads, head_dim)
        self.q, self.k, self.v, self.grad = (
            torch.randn(size, generator=generator).to(DEVICE, dtype) for _ in range(4)
        )
        self.offsets = cumulative_offsets(torch.tensor(lengths, device=DEVICE))

    @cached_property
    def inside(self) -> Tensor:
        """(B, N) bool: True where a padded sequence holds a row."""
        lengths = torch.tensor(self.lengths, device=DEVICE)
        return torch.arange(self.longest, device=DEVICE) < lengths[:, None]

    def padded(self) -> list[Tensor]:
        """q, k, v, grad as (B, N, H, D), zero beyond each length."""
        return [
            unpack(x, self.offsets, max_length=self.longest)
            for x in (self.q, self.k, self.v, self.grad)
        ]

    def packed(self) -> list[Tensor]:
        return [self.q, self.k, self.v, self.grad]

    def call(
        self, function: Callable[..., Any], inputs: list[Tensor], order: Callable = lambda x: x
    ) -> Call:
        """Call that returns ``function(q, k, v)`` and, for a step, gradients; ``order`` brings them to (..., H, D)."""
        *leaves, grad = (x.detach().contiguous() for x in inputs)
        for leaf in leaves:
            leaf.requires_grad_(self.step)

        def call() -> list[Tensor]:
            with torch.set_grad_enabled(self.step):
                out = function(*leaves)
            gradients = torch.autograd.grad(out, leaves, grad) if self.step else ()
            return [order(x) for x in (out.detach(), *gradients)]

        return call


def ours(problem: Problem) -> Call:
    if problem.equal:
        return problem.call(attention, problem.padded())
    function = partial(varlen_attention, offsets=problem.offsets, max_length=problem.longest)
    return problem.call(function, problem.packed())


def heads_first(problem: Problem, function: Callable[..., Tensor]) -> Call:
    """Call of ``function``, which takes (B, H, N, D) and a mask that broadcasts to (B, H, N, N), or None."""
    mask = None if problem.equal else problem.inside[:, None, None]
    inputs = [x.transpose(1, 2) for x in problem.padded()]
    return problem.call(partial(function, mask=mask), inputs, lambda x: x.transpose(1, 2))


def sdpa(backend: SDPBackend, problem: Problem) -> Call:
    """Call of ``scaled_dot_product_attention`` with one backend; raises :class:`Absent` if that cannot run it."""

    def function(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        with sdpa_kernel(backend):
            return scaled_dot_product_attention(q, k, v, attn_mask=mask)

    call = heads_first(problem, function)
    try:
        call()
    except RuntimeError as error:
        reason = str(error).partition(".")[0]
        raise Absent(f"{backend.name} does not serve this case on {DEVICE}: {reason}") from error
    return call


def sdpa_by_sequence(problem: Problem) -> Call:
    """Call of ``scaled_dot_product_attention`` once for each sequence of the packed rows: no padding, many calls."""
    if DEVICE != "cpu":
        raise Absent(
            "a call for each sequence leaves a GPU idle; its packed kernels are there instead"
        )
    if problem.equal:
        raise Absent("the sequences are of one length: a single call serves all")

    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        pieces = zip(*(x.split(problem.lengths) for x in (q, k, v)), strict=True)
        return torch.cat(
            [
                scaled_dot_product_attention(*(x.transpose(0, 1)[None] for x in each))[0].transpose(
                    0, 1
                )
                for each in pieces
            ]
        )

    return problem.call(function, problem.packed())


def _varlen(problem: Problem, function: Callable[..., Tensor]) -> Call:
    """Call of ``function``, which takes packed rows, then offsets and longest lengths of queries and of keys."""
    sizes = (problem.offsets, problem.offsets, problem.longest, problem.longest)
    return problem.call(lambda *qkv: function(*qkv, *sizes), problem.packed())


def torch_varlen(problem: Problem) -> Call:
    if DEVICE != "cuda":
        raise Absent("torch.nn.attention.varlen needs a GPU")
    module = libraries.need("torch.nn.attention.varlen", "torch>=2.10")
    return _varlen(problem, module.varlen_attn)


def flex(problem: Problem) -> Call:
    """Call of compiled FlexAttention on packed rows; its block mask depends on lengths and is made outside the call."""
    if DEVICE != "cuda" and problem.step:
        raise Absent("FlexAttention has no backward on the CPU")
    module = libraries.need("torch.nn.attention.flex_attention", "torch>=2.5")
    function = libraries.compiled(module.flex_attention)
    if problem.equal:
        inputs = [x.transpose(1, 2) for x in problem.padded()]
        return problem.call(function, inputs, lambda x: x.transpose(1, 2))
    rows = torch.arange(len(problem.q), device=DEVICE, dtype=torch.int32)
    sequence = torch.searchsorted(problem.offsets, rows, right=True)
    mask = module.create_block_mask(
        lambda b, h, i, j: sequence[i] == sequence[j], None, None, len(rows), len(rows), DEVICE
    )
    inputs = [x.transpose(0, 1)[None] for x in problem.packed()]
    return problem.call(partial(function, block_mask=mask), inputs, lambda x: x[0].transpose(0, 1))


def xformers(problem: Problem) -> Call:
    ops = libraries.need("xformers.ops", "xformers")
    if DEVICE != "cuda":
        raise Absent("xformers' memory-efficient attention needs a GPU")
    if problem.equal:
        return problem.call(ops.memory_efficient_attention, problem.padded())
    bias = ops.fmha.BlockDiagonalMask.from_seqlens(list(problem.lengths))
    inputs = [x[None] for x in problem.packed()]
    function = partial(ops.memory_efficient_attention, attn_bias=bias)
    return problem.call(function, inputs, lambda x: x[0])


def flash_attention(problem: Problem) -> Call:
    module = libraries.need("flash_attn", "flash-attn")
    if problem.equal:
        return problem.call(module.flash_attn_func, problem.padded())
    return _varlen(problem, module.flash_attn_varlen_func)


CONTENDERS: dict[str, Callable[[Problem], Call]] = {
    "ours": ours,
    "eager": lambda problem: heads_first(problem, eager.attention),
    "torch.compile": lambda problem: heads_first(problem, libraries.compiled(eager.attention)),
    "SDPA math": partial(sdpa, SDPBackend.MATH),
    "SDPA flash": partial(sdpa, SDPBackend.FLASH_ATTENTION),
    "SDPA efficient": partial(sdpa, SDPBackend.EFFICIENT_ATTENTION),
    "SDPA cuDNN": partial(sdpa, SDPBackend.CUDNN_ATTENTION),
    "SDPA by sequence": sdpa_by_sequence,
    "torch varlen_attn": torch_varlen,
    "FlexAttention": flex,
    "xFormers": xformers,
    "flash-attn": flash_attention,
}
