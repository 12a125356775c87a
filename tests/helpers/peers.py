"""Reimplementations of quantizers with the interfaces of other packages.

A class has the name, and if the package matters the module, by which :mod:`alit_kernels.accelerate` recognizes it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss, normalize

from .lucidrains import Lucidrains
from .renamed import known_as, squared_distances, through


class Embedded(nn.Module):
    """Base of quantizers with a codebook in an ``nn.Embedding``."""

    def __init__(self, num_codes: int, dim: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(num_codes, dim)

    def find(self, z: Tensor, cosine: bool = False) -> tuple[Tensor, Tensor, Tensor]:
        """Vectors with channels last, their nearest codes in the same shape, and indices (N,)."""
        z, codes = z.movedim(1, -1).contiguous(), self.embedding.weight
        if cosine:
            z, codes = normalize(z, dim=-1), normalize(codes, dim=-1)
        index = squared_distances(z.flatten(0, -2), codes).argmin(1)
        return z, codes[index].view(z.shape), index


@known_as("VectorQuantizer")
class TiTokQuantizer(Embedded):
    def __init__(self, num_codes: int, dim: int, cosine: bool, clustering: bool = False) -> None:
        super().__init__(num_codes, dim)
        self.commitment_cost, self.use_l2_norm, self.clustering_vq = 0.25, cosine, clustering

    def forward(self, z: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        z, quantized, index = self.find(z.float(), self.use_l2_norm)
        commitment = self.commitment_cost * mse_loss(z, quantized.detach())
        codebook = mse_loss(quantized, z.detach())
        results = {"quantizer_loss": commitment + codebook, "commitment_loss": commitment}
        results |= {"codebook_loss": codebook, "min_encoding_indices": index.view(z.shape[:-1])}
        return through(z, quantized).movedim(-1, 1).contiguous(), results


@known_as("VectorQuantizer")
class LlamaGenQuantizer(Embedded):
    def __init__(
        self,
        num_codes: int,
        dim: int,
        cosine: bool,
        entropy: float = 0.0,
        usage: bool = False,
        temperature: float = 0.01,
    ) -> None:
        super().__init__(num_codes, dim)
        self.temperature = temperature
        self.n_e, self.e_dim, self.beta, self.l2_norm = num_codes, dim, 0.25, cosine
        self.entropy_loss_ratio, self.show_usage = entropy, usage
        if usage:
            self.register_buffer("codebook_used", torch.zeros(100))

    def forward(self, z: Tensor) -> tuple[Any, ...]:
        z, quantized, index = self.find(z, self.l2_norm)
        losses, used = (None, None, None), 0
        if self.training:
            if self.show_usage:
                count = len(index)
                self.codebook_used[:-count] = self.codebook_used[count:].clone()
                self.codebook_used[-count:] = index
                used = len(self.codebook_used.unique()) / self.n_e
            entropy = self.entropy_loss(z.flatten(0, -2)) * self.entropy_loss_ratio
            commitment = self.beta * mse_loss(z, quantized.detach())
            losses = (mse_loss(quantized, z.detach()), commitment, entropy)
        return through(z, quantized).movedim(-1, 1), (*losses, used), (None, None, index)

    def entropy_loss(self, z: Tensor) -> Tensor:
        codes = self.embedding.weight
        distances = squared_distances(z, normalize(codes, dim=-1) if self.l2_norm else codes)
        share = (distances / -self.temperature).softmax(1)
        log_share = (distances / -self.temperature + 1e-5).log_softmax(1)
        mean = share.mean(0)
        return -(share * log_share).sum(1).mean() + (mean * (mean + 1e-5).log()).sum()


@known_as("VectorQuantizer")
class GigaTokQuantizer(LlamaGenQuantizer):
    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.rot = self.stochastic = self.simvq = False

    def forward(self, z: Tensor, random_replace: bool = False) -> tuple[Any, ...]:
        assert not random_replace
        quantized, (*losses, entropy, used), index = super().forward(z)
        entropy = entropy if self.entropy_loss_ratio or entropy is None else 0
        return quantized, [*losses, entropy, used], index


class VectorQuantizer2(Embedded):
    """Quantizer of taming-transformers and, under another name, of diffusers."""

    def __init__(
        self, num_codes: int, dim: int, legacy: bool, shaped: bool = False, remap: Any = None
    ) -> None:
        super().__init__(num_codes, dim)
        self.n_e, self.e_dim, self.vq_embed_dim, self.beta = num_codes, dim, dim, 0.25
        self.legacy, self.sane_index_shape, self.remap = legacy, shaped, remap

    def forward(
        self, z: Tensor, temp: Any = None, rescale_logits: bool = False, return_logits: bool = False
    ) -> tuple[Any, ...]:
        assert temp is None or temp == 1.0
        z, quantized, index = self.find(z)
        weights = (1.0, self.beta) if self.legacy else (self.beta, 1.0)
        commitment, codebook = mse_loss(z, quantized.detach()), mse_loss(quantized, z.detach())
        loss = weights[0] * commitment + weights[1] * codebook
        index = index.view(z.shape[:-1]) if self.sane_index_shape else index
        return through(z, quantized).movedim(-1, 1).contiguous(), loss, (None, None, index)


@known_as("VectorQuantizer", "diffusers.models.autoencoders.vae")
class DiffusersQuantizer(VectorQuantizer2):
    pass


@known_as("VectorQuantizer")
class TamingOneHot(Embedded):
    def __init__(self, num_codes: int, dim: int) -> None:
        super().__init__(num_codes, dim)
        self.n_e, self.e_dim, self.beta = num_codes, dim, 0.25

    def forward(self, z: Tensor) -> tuple[Any, ...]:
        z, _, index = self.find(z)
        one_hot = nn.functional.one_hot(index, self.n_e).to(z.dtype)
        quantized = (one_hot @ self.embedding.weight).view(z.shape)
        loss = mse_loss(z, quantized.detach()) + self.beta * mse_loss(quantized, z.detach())
        share = one_hot.mean(0)
        perplexity = (-(share * (share + 1e-10).log()).sum()).exp()
        quantized = through(z, quantized).movedim(-1, 1).contiguous()
        return quantized, loss, (perplexity, one_hot, index[:, None])


class OfTransformers(Embedded):
    cosine = False

    def __init__(self, num_codes: int, dim: int) -> None:
        super().__init__(num_codes, dim)
        self.num_embeddings, self.embedding_dim, self.beta = num_codes, dim, 0.25

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        z, quantized, index = self.find(hidden, self.cosine)
        loss = mse_loss(z, quantized.detach()) + self.beta * mse_loss(quantized, z.detach())
        return through(z, quantized).movedim(-1, 1).contiguous(), loss, index


@known_as("ChameleonVQVAEVectorQuantizer", "transformers.models.chameleon.modeling_chameleon")
class Chameleon(OfTransformers):
    pass


@known_as("JanusVQVAEVectorQuantizer", "transformers.models.janus.modeling_janus")
class Janus(OfTransformers):
    pass


@known_as("GlmImageVQVAEVectorQuantizer", "transformers.models.glm_image.modeling_glm_image")
class GlmImage(OfTransformers):
    cosine = True


@known_as("Emu3VQVAEVectorQuantizer", "transformers.models.emu3.modeling_emu3")
class Emu3(Embedded):
    def forward(self, hidden: Tensor) -> Tensor:
        rows = hidden.movedim(2, -1)
        distances = squared_distances(rows.flatten(0, -2), self.embedding.weight)
        return distances.argmin(1).view(rows.shape[:-1])


def quantizers(num_codes: int = 40, dim: int = 6) -> dict[str, nn.Module]:
    """Name -> module that ``accelerate`` swaps, at least one of every family."""
    size = (num_codes, dim)
    return {
        "TiTok": TiTokQuantizer(*size, cosine=False),
        "TiTok, cosine": TiTokQuantizer(*size, cosine=True),
        "LlamaGen": LlamaGenQuantizer(*size, cosine=False),
        "LlamaGen, cosine, usage": LlamaGenQuantizer(*size, cosine=True, usage=True),
        "GigaTok": GigaTokQuantizer(*size, cosine=True, usage=True),
        "GigaTok, entropy": GigaTokQuantizer(*size, cosine=True, entropy=0.1),
        "LlamaGen, entropy": LlamaGenQuantizer(*size, cosine=False, entropy=0.1),
        "LlamaGen, cosine, entropy": LlamaGenQuantizer(*size, cosine=True, entropy=0.1),
        "taming": VectorQuantizer2(*size, legacy=False),
        "taming, legacy": VectorQuantizer2(*size, legacy=True, shaped=True),
        "taming, one-hot": TamingOneHot(*size),
        "diffusers": DiffusersQuantizer(*size, legacy=False),
        "diffusers, legacy": DiffusersQuantizer(*size, legacy=True, shaped=True),
        "Chameleon": Chameleon(*size),
        "Janus": Janus(*size),
        "GLM-Image": GlmImage(*size),
        "Emu3": Emu3(*size),
        "lucidrains": Lucidrains(*size),
        "lucidrains, cosine": Lucidrains(*size, cosine=True),
        "lucidrains, learned": Lucidrains(*size, learned=True, image=True),
        "lucidrains, projected heads": Lucidrains(*size, width=10, heads=2),
        "lucidrains, dead codes": Lucidrains(*size, dead=2),
        "lucidrains, rotation": Lucidrains(*size, rotation=True),
    }


def left_alone(num_codes: int = 40, dim: int = 6) -> dict[str, tuple[nn.Module, str]]:
    """Name -> module that ``accelerate`` does not swap, and the reason in its report."""
    size = (num_codes, dim)
    sampled, k_means = Lucidrains(*size), Lucidrains(*size)
    others = {
        "a codebook for each head": ("_codebook.num_codebooks", 2),
        "affine_param": ("_codebook.affine_param", True),
        "vq_bridge": ("_codebook.vq_bridge", nn.Identity()),
        "an optimizer of its own": ("in_place_codebook_optimizer", object()),
        "the cross-entropy commitment": ("commitment_use_cross_entropy_loss", True),
        "its statistics are summed over processes": ("_codebook.use_ddp", True),
    }
    temperatures = {
        "cosine": (*size, True, 0.02),
        "far apart": (40, 32, True, 0.02),
        "many": (1024, 64, True, 0.02),
        "euclidean": (*size, False, 0.02),
        "large": (*size, False, 0.07, 3.0),
    }
    gigatok = lambda name: with_attribute(GigaTokQuantizer(*size, cosine=True), name, True)  # noqa: E731
    sampled._codebook.gumbel_sample = lambda: None
    sampled._codebook.gumbel_sample.keywords = {"stochastic": True}  # type: ignore[attr-defined]
    k_means._codebook.initted.fill_(False)
    return {
        "clustering": (TiTokQuantizer(*size, cosine=True, clustering=True), "clustering_vq"),
        **{
            f"another temperature, {name}": (
                other_temperature(*each),
                f"{'gradient of embedding.weight' if name == 'many' else 'output[1][2] of call 0'} differs in training",
            )
            for name, each in temperatures.items()
        },
        "the rotation trick": (gigatok("rot"), "the rotation trick"),
        "stochastic codes": (gigatok("stochastic"), "codes are sampled"),
        "SimVQ": (gigatok("simvq"), "SimVQ"),
        "remap": (VectorQuantizer2(*size, legacy=True, remap="used.npy"), "remap"),
        "diffusers, remap": (DiffusersQuantizer(*size, legacy=True, remap="used.npy"), "remap"),
        **{why: (with_attribute(Lucidrains(*size), *each), why) for why, each in others.items()},
        "sampled": (sampled, "codes are sampled"),
        "k-means": (k_means, "its codebook is initialized by k-means in the first call"),
        "diversity": (Lucidrains(*size, diversity=True), "codebook_diversity_loss_weight"),
        "bfloat16": (
            VectorQuantizer2(*size, legacy=True).bfloat16(),
            "its codebook is of bfloat16",
        ),
        "meta": (
            VectorQuantizer2(*size, legacy=True).to("meta"),
            "it is on the meta device, where nothing can be compared",
        ),
        "one code": (
            VectorQuantizer2(*size, legacy=True).apply(all_equal),
            "the probe failed: ValueError: hardly a vector has one nearest code",
        ),
        "kdim": (nn.MultiheadAttention(8, 2, kdim=4), "kdim or vdim"),
        "vdim": (nn.MultiheadAttention(8, 2, vdim=4), "kdim or vdim"),
        "add_bias_kv": (nn.MultiheadAttention(8, 2, add_bias_kv=True), "add_bias_kv"),
        "add_zero_attn": (nn.MultiheadAttention(8, 2, add_zero_attn=True), "add_zero_attn"),
        "attention on meta": (
            nn.MultiheadAttention(8, 2, device="meta"),
            "it is on the meta device, where nothing can be compared",
        ),
        "a subclass": (Attention(8, 2), "Attention is a subclass, which may compute otherwise"),
        "unknown VQ": (
            VQ(*size),
            "no quantizer of a known family; alit_kernels.vector_quantize may do its work",
        ),
        "unknown": (
            UnknownQuantizer(*size),
            "no quantizer of a known family; alit_kernels.vector_quantize may do its work",
        ),
    }


def other_temperature(
    num_codes: int, dim: int, cosine: bool, temperature: float, scale: float = 1.0
) -> nn.Module:
    module = LlamaGenQuantizer(num_codes, dim, cosine, entropy=0.1, temperature=temperature)
    generator = torch.Generator().manual_seed(0)
    module.embedding.weight.data.normal_(generator=generator).mul_(scale)
    return module


def with_attribute(module: nn.Module, path: str, value: Any) -> nn.Module:
    part, _, name = path.rpartition(".")
    setattr(module.get_submodule(part), name, value)
    return module


def all_equal(module: nn.Module) -> None:
    if isinstance(module, nn.Embedding):
        nn.init.ones_(module.weight)


class Attention(nn.MultiheadAttention):
    pass


class UnknownQuantizer(Embedded):
    def forward(self, z: Tensor) -> Tensor:
        return self.find(z)[1]


class VQ(UnknownQuantizer):
    """Named as many people name their own."""
