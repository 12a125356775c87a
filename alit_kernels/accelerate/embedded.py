"""Quantizers with a codebook in an ``nn.Embedding``: taming, LlamaGen, TiTok, diffusers, transformers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..codebook_entropy import codebook_entropy
from ..nearest_codeword import nearest_codeword
from ..vector_quantize import VectorQuantized, vector_quantize
from .family import Family, Forward, between_codes, takes


def of_one_tensor(
    compute: Callable[[Any, Tensor], Any],
    *,
    casts: bool = False,
    when: Callable[[Any], bool] = lambda module: True,
) -> Forward:
    """Forward that gives calls with one tensor alone to ``compute``, and other calls to the original forward."""

    def forward(self: Any, original: Forward, *args: Any, **kwargs: Any) -> Any:
        alone = len(args) == 1 and not kwargs and when(self)
        if alone and takes(args[0], self.embedding.weight, casts=casts):
            return compute(self, args[0])
        return original(self, *args, **kwargs)

    return forward


def _quantized(self: Any, z: Tensor, **options: Any) -> tuple[Tensor, VectorQuantized]:
    """Quantized vectors in the layout of ``z`` (B, D, ...), contiguous, and the whole result of the op."""
    found = vector_quantize(z.movedim(1, -1), self.embedding.weight, **options)
    return found.quantized.movedim(-1, 1).contiguous(), found


def _weights(self: Any, legacy: bool) -> dict[str, float]:
    """Loss weights of taming: ``beta`` on the commitment, or in its legacy form on the codebook's loss."""
    weights = (1.0, self.beta) if legacy else (self.beta, 1.0)
    return dict(zip(("commitment", "codebook_weight"), weights, strict=True))


def _taming(self: Any, z: Tensor) -> Any:
    quantized, found = _quantized(self, z, **_weights(self, self.legacy))
    index = found.index if self.sane_index_shape else found.index.flatten()
    return quantized, found.loss, (None, None, index)


def _refused_by_taming(module: Any) -> str:
    return "" if module.remap is None else "remap"


def _taming_one_hot(self: Any, z: Tensor) -> Any:
    quantized, found = _quantized(self, z, **_weights(self, legacy=True))
    index = found.index.view(-1, 1)
    one_hot = z.new_zeros(index.shape[0], self.n_e).scatter_(1, index, 1)
    share = torch.bincount(index[:, 0], minlength=self.n_e).to(z.dtype) / index.shape[0]
    perplexity = (-(share * (share + 1e-10).log()).sum()).exp()
    return quantized, found.loss, (perplexity, one_hot, index)


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
        if self.show_usage:  # a window of the last codes
            with torch.no_grad():  # the original code registers a parameter as this buffer
                new = index[-self.codebook_used.numel() :].to(self.codebook_used.dtype)
                self.codebook_used.copy_(torch.cat([self.codebook_used[new.numel() :], new]))
            used = len(self.codebook_used.unique()) / self.n_e
        losses = (found.codebook_loss, found.commitment_loss, _entropy_loss(self, z, codes, metric))
    return quantized, (*losses, used), (None, None, index)


def _gigatok(self: Any, z: Tensor) -> Any:
    """Result as LlamaGen's, but with a list of losses, and the number 0 where there is no entropy loss."""
    quantized, losses, index = _llamagen(self, z)
    losses = list(losses)
    if self.training and not self.entropy_loss_ratio:
        losses[2] = 0
    return quantized, losses, index


def _refused_by_gigatok(module: Any) -> str:
    options = {"rot": "the rotation trick", "stochastic": "codes are sampled", "simvq": "SimVQ"}
    return next((why for option, why in options.items() if getattr(module, option)), "")


#: Temperature of LlamaGen's entropy loss, as it is written in its code.
_TEMPERATURE = 0.01


def _entropy_loss(self: Any, z: Tensor, codes: Tensor, metric: str) -> Tensor:
    if not self.entropy_loss_ratio:
        return (z.sum() + codes.sum()) * 0
    sample, batch = codebook_entropy(
        z.movedim(1, -1), codes, temperature=_TEMPERATURE, metric=metric, epsilon=1e-5
    )
    return self.entropy_loss_ratio * (sample - batch)


def _between_codes(module: Any, codes: Tensor, *options: Any) -> Tensor:
    """Vectors (count, D) for the probe, whose results another temperature would change."""
    codes = nn.functional.normalize(codes, dim=-1) if module.l2_norm else codes
    return between_codes(module, codes, *options, scale=_TEMPERATURE)


def _families_with_entropy(
    name: str, compute: Callable[[Any, Tensor], Any], **options: Any
) -> tuple[Family, Family]:
    """Two families: without entropy loss (calls are the module's own once it is turned on), and with it, probed."""
    off = lambda module: not module.entropy_loss_ratio  # noqa: E731
    common = {"classes": "VectorQuantizer", "cosine": lambda module: module.l2_norm, **options}
    return (
        Family(name=name, when=off, parts={"": of_one_tensor(compute, when=off)}, **common),
        Family(
            name=f"{name}, entropy loss",
            parts={"": of_one_tensor(compute)},
            rows=_between_codes,
            **common,
        ),
    )


def _of_transformers(self: Any, hidden: Tensor) -> Any:
    metric = "cosine" if _is_cosine_of_transformers(self) else "euclidean"
    quantized, found = _quantized(self, hidden, metric=metric, **_weights(self, legacy=True))
    return quantized, found.loss, found.index.flatten()


def _is_cosine_of_transformers(self: Any) -> bool:
    return type(self).__qualname__.startswith("GlmImage")


def _emu3(self: Any, hidden: Tensor) -> Any:
    rows = hidden.movedim(2, -1)
    index = nearest_codeword(rows.flatten(0, -2).detach(), self.embedding.weight.detach())
    return index.view(rows.shape[:-1])


EMBEDDED = (
    Family(
        name="TiTok",
        classes="VectorQuantizer",
        attributes="embedding commitment_cost use_l2_norm",
        parts={"": of_one_tensor(_titok, casts=True)},
        cosine=lambda module: module.use_l2_norm,
        refused=lambda module: "clustering_vq" if getattr(module, "clustering_vq", False) else "",
    ),
    *_families_with_entropy(
        "GigaTok",
        _gigatok,
        attributes="embedding n_e beta l2_norm entropy_loss_ratio show_usage rot stochastic simvq",
        refused=_refused_by_gigatok,
    ),
    *_families_with_entropy(
        "LlamaGen",
        _llamagen,
        attributes="embedding n_e beta l2_norm entropy_loss_ratio show_usage",
    ),
    Family(
        name="taming",
        classes="VectorQuantizer2",
        attributes="embedding n_e e_dim beta legacy remap sane_index_shape",
        parts={"": of_one_tensor(_taming)},
        refused=_refused_by_taming,
    ),
    Family(
        name="diffusers",
        package="diffusers",
        classes="VectorQuantizer",
        attributes="embedding n_e vq_embed_dim beta legacy remap sane_index_shape",
        parts={"": of_one_tensor(_taming)},
        refused=_refused_by_taming,
    ),
    Family(
        name="taming, one-hot",
        classes="VectorQuantizer",
        attributes="embedding n_e e_dim beta",
        parts={"": of_one_tensor(_taming_one_hot)},
    ),
    Family(
        name="transformers",
        package="transformers",
        classes="ChameleonVQVAEVectorQuantizer JanusVQVAEVectorQuantizer GlmImageVQVAEVectorQuantizer",
        attributes="embedding num_embeddings embedding_dim beta",
        parts={"": of_one_tensor(_of_transformers)},
        cosine=_is_cosine_of_transformers,
    ),
    Family(
        name="transformers, Emu3",
        package="transformers",
        classes="Emu3VQVAEVectorQuantizer",
        attributes="embedding",
        parts={"": of_one_tensor(_emu3)},
        layout=lambda module: "btchw",
    ),
)
