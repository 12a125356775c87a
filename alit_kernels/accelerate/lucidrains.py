"""Family of vector-quantize-pytorch: its codebook is replaced; all else is its quantizers' own code."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..codebook_statistics import codebook_statistics
from ..nearest_codeword import nearest_codeword
from .family import Family, Forward, near_codes, takes

#: Options of a call of vector-quantize-pytorch's codebook that ask for nothing special.
_NEUTRAL: dict[str, Any] = {
    "sample_codebook_temp": None,
    "codebook_transform_fn": None,
    "ema_update_weight": None,
    "accum_ema_update": False,
    "ema_update": None,
    "topk": None,
    "update_usage": True,
}


def _quantizer(self: Any, original: Forward, *args: Any, **kwargs: Any) -> Any:
    """Result of their forward around our codebook, or around theirs for ``indices``, which needs its distances.

    A call with ``indices`` hands its codebook a 0, false to theirs, but not False itself: ours then calls the original.
    """
    if len(args) > 1 or kwargs.get("indices") is not None:
        kwargs["accum_ema_update"] = kwargs.get("accum_ema_update") or 0
    return original(self, *args, **kwargs)


def _codebook(self: Any, original: Forward, x: Any, **options: Any) -> Any:
    mask, frozen = options.get("mask"), options.get("freeze_codebook", False)
    special = any(
        options[name] is not neutral for name, neutral in _NEUTRAL.items() if name in options
    )
    accumulated = self.cluster_size.grad is not None or self.embed_avg.grad is not None
    if special or accumulated or not takes(x, self.embed, casts=True):
        return original(self, x, **options)
    x = x.float()
    rows = x.flatten(0, -2)
    codes = self.embed[0] if self.learnable_codebook else self.embed[0].detach()
    metric = "cosine" if self.use_cosine_sim else "euclidean"
    index = nearest_codeword(rows.detach(), codes.detach(), metric=metric)
    quantized = nn.functional.embedding(index, codes).view(x.shape)
    if self.training and not frozen and (self.ema_update or self.has_dead_code_replacement):
        if mask is not None:  # the mask of each head
            mask = mask[:, None].expand(-1, len(rows) // mask.numel(), -1).reshape(1, -1)
        with torch.no_grad():
            taking_part = None if mask is None else mask[0]
            count, total = codebook_statistics(
                index, rows.detach(), self.codebook_size, mask=taking_part
            )
            self.cluster_size.lerp_(count[None], 1 - self.decay)
            self.embed_avg.lerp_(total[None], 1 - self.decay)
            if self.ema_update and not self.manual_ema_update:
                self.update_ema()
            if self.has_dead_code_replacement:
                self.expire_codes_(rows.detach()[None], seq_mask=mask)
    return quantized, index.view(x.shape[:-1]), None


def _refused(module: Any) -> str:
    book = module._codebook
    sampling = getattr(book.gumbel_sample, "keywords", {})
    reasons = {
        "codes are sampled": sampling.get("stochastic") or sampling.get("straight_through"),
        "a codebook for each head": book.num_codebooks > 1,
        "its statistics are summed over processes": book.use_ddp,
        "its codebook is initialized by k-means in the first call": not book.initted,
        "affine_param": book.affine_param,
        "vq_bridge": book.vq_bridge is not None,
        "an optimizer of its own": module.in_place_codebook_optimizer is not None,
        "the cross-entropy commitment": module.commitment_use_cross_entropy_loss,
        "codebook_diversity_loss_weight": module.has_codebook_diversity_loss,
    }
    return next((why for why, found in reasons.items() if found), "")


def _layout(module: Any) -> str:
    if module.accept_image_fmap:
        return "bchw"
    return "bcthw" if module.accept_3d_fmap else "bnc" if module.channel_last else "bcn"


def _rows(module: Any, codes: Tensor, count: int, generator: torch.Generator) -> Tensor:
    if module.has_projections:
        return torch.randn(count, module.dim, generator=generator).to(codes)
    near = near_codes(module, codes, count * module.heads, generator)
    return near.view(count, -1)


def _searched(module: Any, rows: Tensor) -> Tensor:
    rows = module.project_in(rows).unflatten(-1, (module.heads, -1))
    return module._codebook.transform_input(rows)


VECTOR_QUANTIZE_PYTORCH = Family(
    name="vector-quantize-pytorch",
    package="vector_quantize_pytorch",
    classes="VectorQuantize",
    attributes="in_place_codebook_optimizer commitment_use_cross_entropy_loss has_projections"
    " has_codebook_diversity_loss accept_image_fmap accept_3d_fmap channel_last _codebook.initted"
    " _codebook.gumbel_sample _codebook.num_codebooks _codebook.use_ddp _codebook.affine_param"
    " _codebook.vq_bridge _codebook.manual_ema_update _codebook.has_dead_code_replacement",
    parts={"": _quantizer, "_codebook": _codebook},
    refused=_refused,
    layout=_layout,
    codes=lambda module: module._codebook.embed[0],
    cosine=lambda module: module.use_cosine_sim,
    rows=_rows,
    searched=_searched,
)
