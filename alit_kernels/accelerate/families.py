"""The quantizers that are known: how each family is recognised, and what it computes with our ops.

A family is an interface in a few lines: what the forward returns, which loss carries which weight, which state a step
changes. None of their packages is imported; a class is known by its name and by what its instances have.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .._checks import autocast_dtype
from .._plain import is_plain, watched
from ..codebook_statistics import codebook_statistics
from ..nearest_codeword import nearest_codeword
from ..vector_quantize import VectorQuantized, vector_quantize

#: (module, the forward that its class had, arguments of the call) -> what that forward returns.
Forward = Callable[..., Any]


def _no(module: Any) -> str:
    return ""


def _near_codes(module: Any, codes: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """(count, D): random codes, moved by a fifth of their spread."""
    chosen = torch.randint(len(codes), (count,), generator=generator).to(codes.device)
    noise = torch.randn(count, codes.shape[1], generator=generator).to(codes)
    return codes[chosen] + 0.2 * codes.std() * noise


@dataclass(frozen=True)
class Family:
    """One kind of quantizer.

    Attributes:
        name: in reports and in the documentation.
        classes: qualified names of its classes.
        package: where these are; empty for a class that repositories copy from each other.
        attributes: what an instance has, separated by blanks.
        parts: path of a submodule, empty for the module itself -> its forward in our way.
        refused: why a module of the family computes something else; empty if it does not.
        layout: axes of the input, "c" being channels.
        codes: its codebook, (K, D).
        cosine: whether vectors and codes are normalised before the search.
        rows: (module, codes, count, generator) -> inputs, (count, channels).
        searched: (module, inputs) -> the vectors that are searched, (count, D).
        differs, left: for the documentation: what is other than in their code, and which calls stay theirs.
    """

    name: str
    classes: str
    attributes: str
    parts: Mapping[str, Forward]
    package: str = ""
    refused: Callable[[Any], str] = _no
    layout: Callable[[Any], str] = lambda module: "bchw"
    codes: Callable[[Any], Tensor] = lambda module: module.embedding.weight
    cosine: Callable[[Any], bool] = lambda module: False
    rows: Callable[..., Tensor] = _near_codes
    searched: Callable[[Any, Tensor], Tensor] = lambda module, rows: rows
    differs: str = ""
    left: str = ""

    def obstacle(self, module: Any) -> str:
        """Why a module is not probed; empty if it is."""
        embedding = getattr(module, "embedding", None)
        if isinstance(embedding, nn.Module):
            plain = type(embedding) is nn.Embedding and embedding.max_norm is None
            if (
                not plain
                or embedding.sparse
                or embedding.scale_grad_by_freq
                or embedding.padding_idx is not None
            ):
                return "its embedding is no plain nn.Embedding"
        codes = self.codes(module)
        if not is_plain(*module.parameters(), *module.buffers()):
            return "its parameters or buffers are no plain tensors"
        if codes.is_meta:
            return "it is on the meta device, where nothing can be compared"
        if codes.dtype != torch.float32:
            return f"its codebook is of {str(codes.dtype).removeprefix('torch.')}"
        return self.refused(module)


def family_of(module: nn.Module) -> Family | None:
    """The family of a module, by the name of its class and its attributes."""
    cls = type(module)
    for family in FAMILIES.values():
        if (
            cls.__qualname__ in family.classes.split()
            and f"{cls.__module__}.".startswith(f"{family.package}." if family.package else "")
            and all(hasattr(module, name) for name in family.attributes.split())
        ):
            return family
    return None


def takes(z: Any, codes: Tensor, *, casts: bool = False) -> bool:
    """Whether our ops compute on ``z`` what eager code does: float32, nothing that looks at operators, not empty.

    ``casts``: the family's code casts to float32 and leaves autocast on a GPU.
    """
    if not is_plain(z, codes) or codes.dtype != torch.float32 or not z.numel() or watched():
        return False
    if casts:
        floating = z.dtype in (torch.float32, torch.bfloat16, torch.float16)
        return floating and (z.is_cuda or autocast_dtype(z.device.type) is None)
    return z.dtype == torch.float32 and autocast_dtype(z.device.type) is None


def of_one_tensor(compute: Callable[[Any, Tensor], Any], *, casts: bool = False) -> Forward:
    """The forward of a family whose module is called with a tensor alone; other calls stay as they were."""

    def forward(self: Any, original: Forward, *args: Any, **kwargs: Any) -> Any:
        if len(args) == 1 and not kwargs and takes(args[0], self.embedding.weight, casts=casts):
            return compute(self, args[0])
        return original(self, *args, **kwargs)

    return forward


def _quantized(
    self: Any, z: Tensor, *, metric: str = "euclidean", commitment: float, dim: int = 1
) -> tuple[Tensor, VectorQuantized]:
    """Quantized vectors in the layout of ``z``, contiguous, and the rest."""
    found = vector_quantize(
        z.movedim(dim, -1), self.embedding.weight, metric=metric, commitment=commitment
    )
    return found.quantized.movedim(-1, dim).contiguous(), found


def _two_losses(self: Any, found: VectorQuantized, legacy: bool) -> Tensor:
    """taming's loss. ``beta`` weighs the commitment, or in its legacy form the codebook; ``found`` has weights of 1."""
    if legacy:
        return found.commitment_loss + self.beta * found.codebook_loss
    return self.beta * found.commitment_loss + found.codebook_loss


def _taming(self: Any, z: Tensor) -> Any:
    quantized, found = _quantized(self, z, commitment=1.0)
    index = found.index if self.sane_index_shape else found.index.flatten()
    return quantized, _two_losses(self, found, self.legacy), (None, None, index)


def _refused_by_taming(module: Any) -> str:
    return "" if module.remap is None else "remap"


def _taming_one_hot(self: Any, z: Tensor) -> Any:
    quantized, found = _quantized(self, z, commitment=1.0)
    index = found.index.view(-1, 1)
    one_hot = z.new_zeros(index.shape[0], self.n_e).scatter_(1, index, 1)
    share = torch.bincount(index[:, 0], minlength=self.n_e).to(z.dtype) / index.shape[0]
    perplexity = (-(share * (share + 1e-10).log()).sum()).exp()
    return quantized, _two_losses(self, found, True), (perplexity, one_hot, index)


def _titok(self: Any, z: Tensor) -> Any:
    metric = "cosine" if self.use_l2_norm else "euclidean"
    quantized, found = _quantized(self, z.float(), metric=metric, commitment=self.commitment_cost)
    return quantized, {
        "quantizer_loss": found.loss,
        "commitment_loss": found.commitment_loss,
        "codebook_loss": found.codebook_loss,
        "min_encoding_indices": found.index,
    }


def _llamagen(self: Any, z: Tensor) -> Any:
    metric = "cosine" if self.l2_norm else "euclidean"
    codes = self.embedding.weight if self.training else self.embedding.weight.detach()
    found = vector_quantize(z.movedim(1, -1), codes, metric=metric, commitment=self.beta)
    index, quantized = found.index.flatten(), found.quantized.movedim(-1, 1)
    losses: tuple[Tensor | None, ...] = (None, None, None)
    used: Any = 0
    if self.training:
        if self.show_usage:  # a ring of the last codes
            new = index[-self.codebook_used.numel() :].to(self.codebook_used.dtype)
            self.codebook_used.copy_(torch.cat([self.codebook_used[new.numel() :], new]))
            used = len(self.codebook_used.unique()) / self.n_e
        losses = (found.codebook_loss, found.commitment_loss, found.loss * 0)
    return quantized, (*losses, used), (None, None, index)


def _of_transformers(self: Any, hidden: Tensor) -> Any:
    cosine = _is_cosine_of_transformers(self)
    metric = "cosine" if cosine else "euclidean"
    quantized, found = _quantized(self, hidden, metric=metric, commitment=1.0)
    return quantized, _two_losses(self, found, True), found.index.flatten()


def _is_cosine_of_transformers(self: Any) -> bool:
    return type(self).__qualname__.startswith("GlmImage")


def _emu3(self: Any, hidden: Tensor) -> Any:
    rows = hidden.movedim(2, -1)
    index = nearest_codeword(rows.flatten(0, -2).detach(), self.embedding.weight.detach())
    return index.view(rows.shape[:-1])


#: What the codebook of vector-quantize-pytorch is given where nothing special is asked for.
_NEUTRAL: dict[str, Any] = {
    "sample_codebook_temp": None,
    "codebook_transform_fn": None,
    "ema_update_weight": None,
    "accum_ema_update": False,
    "ema_update": None,
    "topk": None,
    "update_usage": True,
}


def _lucidrains(self: Any, original: Forward, *args: Any, **kwargs: Any) -> Any:
    """Theirs, around our codebook; but a call that gives ``indices`` reads distances, which only theirs has."""
    if len(args) > 1 or kwargs.get("indices") is not None:
        kwargs["accum_ema_update"] = kwargs.get("accum_ema_update") or 0  # false, and not neutral
    return original(self, *args, **kwargs)


def _lucidrains_codebook(self: Any, original: Forward, x: Any, **options: Any) -> Any:
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
        if mask is not None:  # of each head
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


def _refused_by_lucidrains(module: Any) -> str:
    book = module._codebook
    sampling = getattr(book.gumbel_sample, "keywords", {})
    reasons = {
        "codes are sampled": sampling.get("stochastic") or sampling.get("straight_through"),
        "a codebook for each head": book.num_codebooks > 1,
        "its statistics are summed over processes": book.use_ddp,
        "its codebook is initialised by k-means in the first call": not book.initted,
        "affine_param": book.affine_param,
        "vq_bridge": book.vq_bridge is not None,
        "an optimiser of its own": module.in_place_codebook_optimizer is not None,
        "the cross-entropy commitment": module.commitment_use_cross_entropy_loss,
        "codebook_diversity_loss_weight": module.has_codebook_diversity_loss,
    }
    return next((why for why, found in reasons.items() if found), "")


def _layout_of_lucidrains(module: Any) -> str:
    if module.accept_image_fmap:
        return "bchw"
    return "bcthw" if module.accept_3d_fmap else "bnc" if module.channel_last else "bcn"


def _rows_of_lucidrains(
    module: Any, codes: Tensor, count: int, generator: torch.Generator
) -> Tensor:
    if module.has_projections:
        return torch.randn(count, module.dim, generator=generator).to(codes)
    near = _near_codes(module, codes, count * module.heads, generator)
    return near.view(count, -1)


def _searched_by_lucidrains(module: Any, rows: Tensor) -> Tensor:
    rows = module.project_in(rows).unflatten(-1, (module.heads, -1))
    return module._codebook.transform_input(rows)


_EXACT = "nearly equal distances are decided exactly"
_NARROW = "half precision, autocast"

FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (
        Family(
            name="TiTok",
            classes="VectorQuantizer",
            attributes="embedding commitment_cost use_l2_norm",
            parts={"": of_one_tensor(_titok, casts=True)},
            cosine=lambda module: module.use_l2_norm,
            refused=lambda module: (
                "clustering_vq" if getattr(module, "clustering_vq", False) else ""
            ),
            differs=_EXACT,
            left="`clustering_vq`, moving averages",
        ),
        Family(
            name="LlamaGen",
            classes="VectorQuantizer",
            attributes="embedding n_e beta l2_norm entropy_loss_ratio show_usage",
            parts={"": of_one_tensor(_llamagen)},
            cosine=lambda module: module.l2_norm,
            refused=lambda module: "an entropy loss" if module.entropy_loss_ratio else "",
            differs=_EXACT,
            left=f"`entropy_loss_ratio` other than 0, {_NARROW}",
        ),
        Family(
            name="taming",
            classes="VectorQuantizer2",
            attributes="embedding n_e e_dim beta legacy remap sane_index_shape",
            parts={"": of_one_tensor(_taming)},
            refused=_refused_by_taming,
            differs=_EXACT,
            left=f"`remap`, {_NARROW}",
        ),
        Family(
            name="diffusers",
            package="diffusers",
            classes="VectorQuantizer",
            attributes="embedding n_e vq_embed_dim beta legacy remap sane_index_shape",
            parts={"": of_one_tensor(_taming)},
            refused=_refused_by_taming,
            differs=_EXACT,
            left=f"`remap`, {_NARROW}",
        ),
        Family(
            name="taming, one-hot",
            classes="VectorQuantizer",
            attributes="embedding n_e e_dim beta",
            parts={"": of_one_tensor(_taming_one_hot)},
            differs=f"{_EXACT}; the one-hot matrix that it returns is still made",
            left=_NARROW,
        ),
        Family(
            name="transformers",
            package="transformers",
            classes="ChameleonVQVAEVectorQuantizer JanusVQVAEVectorQuantizer GlmImageVQVAEVectorQuantizer",
            attributes="embedding num_embeddings embedding_dim beta",
            parts={"": of_one_tensor(_of_transformers)},
            cosine=_is_cosine_of_transformers,
            differs=_EXACT,
            left=_NARROW,
        ),
        Family(
            name="transformers, Emu3",
            package="transformers",
            classes="Emu3VQVAEVectorQuantizer",
            attributes="embedding",
            parts={"": of_one_tensor(_emu3)},
            layout=lambda module: "btchw",
            differs=_EXACT,
            left=_NARROW,
        ),
        Family(
            name="vector-quantize-pytorch",
            package="vector_quantize_pytorch",
            classes="VectorQuantize",
            attributes="_codebook in_place_codebook_optimizer commitment_use_cross_entropy_loss"
            " has_codebook_diversity_loss has_projections accept_image_fmap accept_3d_fmap channel_last",
            parts={"": _lucidrains, "_codebook": _lucidrains_codebook},
            refused=_refused_by_lucidrains,
            layout=_layout_of_lucidrains,
            codes=lambda module: module._codebook.embed[0],
            cosine=lambda module: module.use_cosine_sim,
            rows=_rows_of_lucidrains,
            searched=_searched_by_lucidrains,
            differs=f"{_EXACT}; dead codes are replaced by their own lines",
            left="sampled and top-k codes, `indices` given, a codebook for each head, `affine_param`, `vq_bridge`,"
            " optimisers of its own, diversity and cross-entropy losses, sums over processes, k-means still to come",
        ),
    )
}
