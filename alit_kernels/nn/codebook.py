"""Parts of a vector quantizer: codebooks as modules, and what is computed for them from vectors and indices."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .._checks import INTEGER, check_same, check_tensor, is_sharded
from .._vectors import EPSILON, unit
from ..codebook_statistics import codebook_statistics
from ..nearest_codeword import nearest_codeword
from ..vector_quantize import VectorQuantized
from .distributed import Reduction, world


class Codebook(nn.Module):
    """``torch.nn.Embedding`` whose weight (K, D) is a buffer: optimizers and data-parallel wrappers leave it alone."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight: Tensor
        self.register_buffer("weight", weight)

    def forward(self, index: Tensor) -> Tensor:
        return nn.functional.embedding(index, self.weight)


class ReplacedRows(nn.Embedding):
    """A learned codebook whose rows are replaced in place, in the forward: what FSDP2 gathers for it would be lost."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "weight" and isinstance(value, Tensor) and is_sharded(value):
            raise TypeError(
                "fully_shard: a learned codebook with dead_code_threshold cannot be sharded, its rows are replaced in"
                " place; expected dead_code_threshold 0, ema_decay, or the weight among ignored_params"
            )
        super().__setattr__(name, value)


class AsItWas(torch.autograd.Function):
    """Autograd function: an earlier value of a learned codebook, which passes its gradient on to the codebook."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, earlier: Tensor) -> Tensor:
        return earlier.view_as(earlier)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class CodebookUsage(NamedTuple):
    """Result of :meth:`VectorQuantizer.usage`, as tensors: nothing waits for the device.

    Attributes:
        count: (K,) float32, vectors of each code.
        fraction: scalar, codes that received a vector, of all.
        perplexity: scalar, ``exp`` of the entropy of the counts in nats: the number of codes in equally frequent use.
    """

    count: Tensor  # type: ignore[assignment]
    fraction: Tensor
    perplexity: Tensor


def codebook_usage(index: Tensor, mask: Tensor | None, num_codes: int) -> CodebookUsage:
    """:class:`CodebookUsage` of ``index`` (N,), where ``mask`` (N,) is True."""
    ones = torch.ones(1, 1, device=index.device).expand(index.shape[0], 1)
    count, _ = codebook_statistics(index, ones, num_codes, mask=mask)
    share = count / count.sum().clamp(min=1)
    return CodebookUsage(count, (count > 0).float().mean(), torch.special.entr(share).sum().exp())


#: Ways of the gradient through a quantizer.
GRADIENTS = ("straight_through", "rotation")


def taking_part(
    index: Tensor | VectorQuantized, mask: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Index and mask (...), the mask being that of a result and the given one together, or None."""
    rows, known = (index.index, index.mask) if isinstance(index, VectorQuantized) else (index, None)
    check_tensor("index", rows, dtype=INTEGER)
    if mask is None:
        return rows, known
    check_tensor("mask", mask, dtype=torch.bool, shape=rows.shape)
    check_same("device", index=rows, mask=mask)
    return rows, mask if known is None else mask & known


def rotated(quantized: Tensor, z: Tensor, mask: Tensor | None, metric: str) -> Tensor:
    """``quantized`` (..., D), whose gradient to ``z`` is that of l R u: the rotation trick (Fifty et al., 2024).

    u is the (normalized) vector, R the rotation that takes its direction e = u / |u| to t = q / |q|, l = |q| / |u|, all
    held constant: with r = (e + t) / |e + t|, R u = u - 2 r (r . u) + 2 t (e . u), and du = l R^T dquantized. A vector
    without a direction, |u| below 1e-12, gets dquantized itself; a masked one 0.
    """
    u = z if mask is None else torch.where(mask[..., None], z, 0.0)
    u = unit(u) if metric == "cosine" else u.to(torch.promote_types(z.dtype, torch.float32))
    q, fixed = quantized.detach().to(u.dtype), u.detach()
    e, t, norm = unit(fixed), unit(q), fixed.norm(dim=-1, keepdim=True)
    r, scale = unit(e + t), q.norm(dim=-1, keepdim=True) / norm.clamp(min=EPSILON)
    turned = u - 2 * r * (r * u).sum(-1, keepdim=True) + 2 * t * (e * u).sum(-1, keepdim=True)
    through = torch.where(norm > EPSILON, scale * turned, u)
    return (q + (through - through.detach())).to(quantized.dtype)


def random_vectors(
    vectors: Tensor, mask: Tensor | None, num_codes: int, group: dist.ProcessGroup | None
) -> list[Tensor]:
    """Offers (K,), 1 for codes that this process serves in turn, and for these random vectors (K, D) that take part."""
    rank, processes = world(group)
    (rows, dim), device = vectors.shape, vectors.device
    if rows == 0:
        return [torch.zeros(num_codes, device=device), torch.zeros(num_codes, dim, device=device)]
    chance = torch.rand(num_codes, device=device)
    if mask is None:
        chosen = (chance * rows).long().clamp(max=rows - 1)
        some = torch.ones((), device=device, dtype=torch.bool)
    else:
        # Rows that take part first; their number stays on the device.
        used = mask.sum()
        place = torch.minimum((chance * used).long(), (used - 1).clamp(min=0))
        chosen, some = (~mask).to(torch.int8).argsort(stable=True)[place], used > 0
    mine = some & (torch.arange(num_codes, device=device) % processes == rank)
    return [mine.float(), torch.where(mine[:, None], vectors[chosen], 0.0)]


def k_means(
    vectors: Tensor,
    num_codes: int,
    *,
    metric: str,
    iterations: int,
    generator: torch.Generator | None,
    group: dist.ProcessGroup | None,
) -> tuple[Tensor, Tensor]:
    """Centers (K, D) of (N, D) float32 by Lloyd's algorithm, and how many vectors each got in the last step.

    Starts from random vectors; a code that no vector chooses keeps its place. Processes cluster their vectors together.
    """
    order = torch.randperm(vectors.shape[0], generator=generator, device=vectors.device)
    repeats = -(-num_codes // vectors.shape[0])
    centers = vectors[order.repeat(repeats)[:num_codes]]
    if world(group)[1] > 1:
        dist.broadcast(centers, group=group, group_src=0)
    count = torch.zeros(num_codes, device=centers.device)
    for _ in range(iterations):
        index = nearest_codeword(vectors, centers)
        parts = codebook_statistics(index, vectors, num_codes)
        count, total = Reduction(parts, group).results()
        means = total / count.clamp(min=1)[:, None]
        means = unit(means) if metric == "cosine" else means
        centers = torch.where(count[:, None] > 0, means, centers)
    return centers, count
