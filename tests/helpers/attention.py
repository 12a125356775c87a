"""Reference attention, one sequence and head at a time, and checks of implementations against it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from alit_kernels import varlen_attention
from alit_kernels.attention.problem import Problem
from alit_kernels.testing import assert_within_budget
from tests.helpers.targets import Target, targets

everywhere = pytest.mark.parametrize("target", targets("cpp", "torch", "triton"))


def attend(x: Problem, target: Target) -> tuple[Tensor, Tensor]:
    return varlen_attention(**x._asdict(), return_lse=True, implementation=target.implementation)


def per_sequence(x: Problem, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Reference output (T, H, D) and log-sum-exp (H, T), one sequence and head at a time, softmax written out."""
    q, k, v, offsets, *_, key_mask, key_stop, _ = x
    _, key_offsets = x.ends
    out = torch.zeros(q.shape, dtype=dtype, device=q.device)
    lse = torch.zeros(q.shape[1], q.shape[0], dtype=dtype, device=q.device)
    for b in range(len(offsets) - 1):
        rows, keys = slice(*offsets[b : b + 2].tolist()), slice(*key_offsets[b : b + 2].tolist())
        for h in range(q.shape[1]):
            kept = slice(None) if key_mask is None else key_mask[keys]
            qh, kh, vh = (
                q[rows, h].to(dtype),
                k[keys, h].to(dtype)[kept],
                v[keys, h].to(dtype)[kept],
            )
            scores = qh @ kh.t() * q.shape[2] ** -0.5
            seen = torch.ones_like(scores, dtype=torch.bool)
            if key_stop is not None:
                places = torch.arange(keys.stop - keys.start, device=q.device)[kept]
                seen = places < key_stop[rows, None]
            some = seen.any(1)
            scores = scores.masked_fill(~seen, -torch.inf)[some]
            lse[h, rows] = -torch.inf
            lse[h, rows][some] = scores.logsumexp(-1)
            out[rows, h][some] = scores.softmax(-1) @ vh
    return out, lse


Run = Callable[[Problem], tuple[Tensor, Tensor]]


def gradients(x: Problem, dtype: torch.dtype, run: Run) -> list[Tensor]:
    """Gradients by q, k and v of a weighted sum of outputs and finite log-sum-exps."""
    leaves = [t.detach().clone().to(dtype).requires_grad_() for t in x[:3]]
    out, lse = run(x._replace(q=leaves[0], k=leaves[1], v=leaves[2]))
    generator = torch.Generator().manual_seed(1)
    weights = torch.randn(out.shape, generator=generator, dtype=torch.float64).to(out)
    finite = torch.where(lse.isfinite(), lse, 0.0)
    total = (out * weights).sum() + (finite * weights.sum(-1).t()).sum()
    # If there are no rows the reference uses no input, so add a term that makes every gradient exist.
    (total + sum(0.0 * leaf[:0].sum() for leaf in leaves)).backward()
    return [torch.zeros_like(t) if t.grad is None else t.grad for t in leaves]


def check_forward(x: Problem, target: Target) -> None:
    dtype = x.q.dtype
    out, lse = attend(x, target)
    exact, exact_lse = per_sequence(x, torch.float64)
    eager, eager_lse = per_sequence(x, torch.float32)
    if target.implementation == "torch":  # its exponentials of half-precision scores have 20 bits
        eager_lse = per_sequence(x, dtype)[1]
    assert out.dtype == dtype and lse.dtype == torch.float32
    assert_within_budget(out, eager.to(dtype), exact, what="out")
    assert_within_budget(lse, eager_lse, exact_lse, what="lse")


def check_gradients(x: Problem, target: Target) -> None:
    dtype = x.q.dtype
    ours = gradients(x, dtype, lambda y: attend(y, target))
    exact = gradients(x, torch.float64, lambda y: per_sequence(y, torch.float64))
    eager = gradients(x, dtype, lambda y: per_sequence(y, dtype))
    if not all(gradient.isfinite().all() for gradient in eager):  # float16 scores overflow in eager
        eager = gradients(x, torch.float32, lambda y: per_sequence(y, torch.float32))
    for name, a, e, x64 in zip("qkv", ours, eager, exact, strict=True):
        assert_within_budget(a, e, x64, k=3, what=f"gradient of {name}")
    assert not ours[0][x.offsets[-1] :].any()
    if x.key_mask is not None:
        assert not ours[1][~x.key_mask].any() and not ours[2][~x.key_mask].any()


def dense(target: Target, *shape: int) -> list[Tensor]:
    return [torch.randn(*shape, device=target.device, requires_grad=True) for _ in range(3)]
