"""Models of other packages before and after ``accelerate``: outputs, gradients, state, a step; times in turns."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from diffusers import VQModel
from titok_pytorch import TiTokTokenizer
from torch import Tensor, nn
from transformers.models.chameleon import modeling_chameleon as chameleon
from transformers.models.emu3 import modeling_emu3 as emu3
from transformers.models.glm_image import modeling_glm_image as glm_image
from transformers.models.janus import modeling_janus as janus
from vector_quantize_pytorch import FSQ, LFQ, ResidualVQ, SimVQ, VectorQuantize

import alit_kernels as ak
from tests.helpers.integration import compare, step, time_in_turns
from tests.helpers.titok import TiTok


class Case(NamedTuple):
    """A model, its input, and the numbers of its modules that are swapped and left.

    ``near``: vectors lie near codes; among many random ones some would be equally near to two up to rounding.
    """

    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    swapped: int
    left: int = 0
    near: bool = False


def quantizer(dim: int = 32, codes: int = 512, **options: Any) -> Callable[[], nn.Module]:
    return lambda: VectorQuantize(dim=dim, codebook_size=codes, **options)


def of_transformers(module: Any, name: str) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        config = getattr(module, f"{name}VQVAEConfig")()
        config.num_embeddings, config.embed_dim = 512, 32
        return getattr(module, f"{name}VQVAEVectorQuantizer")(config)

    return make


def emu3_quantizer() -> nn.Module:
    return emu3.Emu3VQVAEVectorQuantizer(emu3.Emu3VQVAEConfig(codebook_size=512, embed_dim=32))


def vq_model() -> nn.Module:
    return VQModel(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(32, 32),
        norm_num_groups=8,
        latent_channels=8,
        num_vq_embeddings=512,
    )


def titok_pytorch() -> nn.Module:
    return TiTokTokenizer(
        dim=64, image_size=64, patch_size=8, enc_depth=2, dec_depth=2, codebook_size=512
    )


CASES = {
    "VectorQuantize": Case(quantizer(), (4, 256, 32), 1),
    "VectorQuantize, 8192 tokens x 4096 codes x 64": Case(
        quantizer(64, 4096), (8, 1024, 64), 1, near=True
    ),
    "straight through": Case(quantizer(rotation_trick=False), (4, 256, 32), 1),
    "cosine": Case(quantizer(use_cosine_sim=True), (4, 256, 32), 1),
    "projections and heads": Case(quantizer(codebook_dim=16, heads=4), (4, 64, 32), 1),
    "image": Case(quantizer(accept_image_fmap=True), (4, 32, 8, 8), 1),
    "channels first": Case(quantizer(channel_last=False), (4, 32, 64), 1),
    "learned": Case(quantizer(learnable_codebook=True, ema_update=False), (4, 64, 32), 1),
    "dead codes": Case(quantizer(threshold_ema_dead_code=2), (4, 64, 32), 1),
    "orthogonal": Case(quantizer(orthogonal_reg_weight=1.0, ema_update=False), (4, 64, 32), 1),
    "sync update": Case(
        quantizer(learnable_codebook=True, ema_update=False, sync_update_v=0.2), (4, 64, 32), 1
    ),
    "sampled": Case(quantizer(stochastic_sample_codes=True), (4, 64, 32), 0, 1),
    "affine": Case(quantizer(affine_param=True), (4, 64, 32), 0, 1),
    "k-means": Case(quantizer(kmeans_init=True), (4, 64, 32), 0, 1),
    "diversity": Case(quantizer(codebook_diversity_loss_weight=0.1), (4, 64, 32), 0, 1),
    "residual": Case(
        lambda: ResidualVQ(dim=32, codebook_size=512, num_quantizers=4), (4, 64, 32), 4
    ),
    "residual, shared": Case(
        lambda: ResidualVQ(dim=32, codebook_size=512, num_quantizers=3, shared_codebook=True),
        (4, 64, 32),
        3,
    ),
    "FSQ": Case(lambda: FSQ([8, 5, 5, 5], dim=32), (4, 64, 32), 0),
    "LFQ": Case(lambda: LFQ(dim=9, codebook_size=512), (4, 64, 9), 0),
    "SimVQ": Case(lambda: SimVQ(dim=32, codebook_size=512), (4, 64, 32), 0),
    "titok-pytorch": Case(titok_pytorch, (2, 3, 64, 64), 1),
    "diffusers VQModel": Case(vq_model, (2, 3, 32, 32), 1),
    "Chameleon": Case(of_transformers(chameleon, "Chameleon"), (2, 32, 8, 8), 1),
    "Janus": Case(of_transformers(janus, "Janus"), (2, 32, 8, 8), 1),
    "GLM-Image": Case(of_transformers(glm_image, "GlmImage"), (2, 32, 8, 8), 1),
    "Emu3": Case(emu3_quantizer, (2, 2, 32, 8, 8), 1),
    "TiTok-S-128": Case(TiTok, (2, 3, 256, 256), 17),
}


def build(case: Case) -> nn.Module:
    """Model of a case with random weights, and codes as far apart as trained ones, so that rounding decides nothing."""
    torch.manual_seed(0)
    model = case.make()
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight)
        if isinstance(getattr(module, "embed_avg", None), Tensor) and module.initted:
            scale = 1 if not module.use_cosine_sim else 1 / module.embed.norm(dim=-1, keepdim=True)
            module.embed.data.normal_().mul_(scale)
            if module.use_cosine_sim:
                module.embed.data = nn.functional.normalize(module.embed.data, dim=-1)
            module.embed_avg.data.copy_(module.embed.data)
    return model


@pytest.mark.parametrize("name", CASES)
def test_before_and_after(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    case = CASES[name]
    theirs = build(case)
    ours = copy.deepcopy(theirs)
    before = {key: x.clone() for key, x in ours.state_dict().items()}
    report = ak.accelerate(ours)
    assert (len(report.swapped), len(report.left)) == (case.swapped, case.left), report
    assert list(ours.state_dict()) == list(before)
    for key, x in ours.state_dict().items():
        torch.testing.assert_close(x, before[key], rtol=0, atol=0, equal_nan=True)
    for training in (True, False):
        theirs.train(training), ours.train(training)
        for _ in range(2):
            x = torch.randn(case.shape)
            if case.near:
                codes = theirs.codebook
                x = codes[torch.randint(len(codes), case.shape[:-1])] + 0.3 * x
            found, expected = step(ours, x)[0], step(theirs, x)[0]
            compare(found, expected, "outputs and gradients")
            states = (list(m.state_dict().values()) for m in (ours, theirs))
            compare(*states, "state after a step")
    theirs.train(), ours.train()
    time_in_turns(name, lambda: step(ours, x)[1], lambda: step(theirs, x)[1], capsys)
