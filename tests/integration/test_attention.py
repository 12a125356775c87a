"""Models that call torch's attention, with and without ``fused_sdpa``: outputs, gradients, a step; times in turns."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import timm
import torch
from timm.layers import Attention, apply_rot_embed_cat
from timm.models.eva import EvaAttention
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from x_transformers import Decoder, Encoder

import alit_kernels as ak
from tests.helpers.integration import compare, step, time_in_turns
from tests.helpers.watched import watched


class Case(NamedTuple):
    """A model, its input and other arguments, and the number of calls that a forward sends to our kernel."""

    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    taken: int
    options: dict[str, Any] = {}  # noqa: RUF012


def of_timm(name: str, **options: Any) -> Callable[[], nn.Module]:
    """Function that makes a timm model of two blocks with random weights."""
    return lambda: timm.create_model(name, pretrained=False, depth=2, num_classes=10, **options)


def small_vit(**options: Any) -> Callable[[], nn.Module]:
    sizes = {"img_size": 64, "patch_size": 8, "embed_dim": 64, "depth": 2, "num_heads": 4}
    return lambda: VisionTransformer(**sizes, num_classes=10, **options)


def of_x_transformers(kind: Callable[..., nn.Module], **options: Any) -> Callable[[], nn.Module]:
    return lambda: kind(dim=64, depth=2, heads=4, attn_flash=True, **options)


PADDED = {"mask": torch.arange(65) < torch.tensor([[65], [20]])}
CASES = {
    "DINOv2 with registers": Case(
        of_timm("vit_small_patch14_reg4_dinov2", img_size=112), (2, 3, 112, 112), 2
    ),
    "DINOv3": Case(of_timm("vit_small_patch16_dinov3", img_size=128), (2, 3, 128, 128), 2),
    "EVA-02": Case(of_timm("eva02_tiny_patch14_224", img_size=112), (2, 3, 112, 112), 2),
    "RoPE-ViT, axial": Case(
        of_timm("vit_small_patch16_rope_224", img_size=128), (2, 3, 128, 128), 2
    ),
    "RoPE-ViT, mixed": Case(
        of_timm("vit_small_patch16_rope_mixed_224", img_size=128), (2, 3, 128, 128), 2
    ),
    "ViT, qk-norm": Case(small_vit(qk_norm=True), (2, 3, 64, 64), 2),
    "ViT, RMS qk-norm": Case(
        small_vit(qk_norm=True, norm_layer=nn.RMSNorm, reg_tokens=4), (2, 3, 64, 64), 2
    ),
    "ViT, attention pooling": Case(
        small_vit(global_pool="map", class_token=False), (2, 3, 64, 64), 3
    ),
    "x-transformers": Case(of_x_transformers(Encoder), (2, 65, 64), 2),
    "x-transformers, padded": Case(of_x_transformers(Encoder), (2, 65, 64), 2, PADDED),
    "x-transformers, causal": Case(of_x_transformers(Decoder), (2, 65, 64), 2),
    "x-transformers, causal with rotary positions": Case(
        of_x_transformers(Decoder, rotary_pos_emb=True, attn_qk_norm=True), (2, 65, 64), 2
    ),
    "x-transformers, causal with shared keys": Case(
        of_x_transformers(Decoder, attn_kv_heads=2), (2, 65, 64), 2
    ),
    "x-transformers, causal and padded": Case(of_x_transformers(Decoder), (2, 65, 64), 0, PADDED),
}


@pytest.mark.parametrize("name", CASES)
def test_within_the_context(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    case = CASES[name]
    torch.manual_seed(0)
    theirs = case.make().train()
    ours = copy.deepcopy(theirs)
    calls = watched(monkeypatch, ak.sdpa, "attention")

    def within(x: Tensor) -> tuple[list[Any], float]:
        with ak.fused_sdpa():
            return step(ours, x, **case.options)

    keys = list(ours.state_dict())
    for i in range(2):
        x = torch.randn(case.shape)
        (found, _), (expected, _) = within(x), step(theirs, x, **case.options)
        assert len(calls) == (i + 1) * case.taken
        compare(found, expected, "outputs and gradients")
        states = (list(m.state_dict().values()) for m in (ours, theirs))
        compare(*states, "state after a step")
    assert list(ours.state_dict()) == keys
    with torch.no_grad():
        expected = theirs.eval()(x, **case.options)
        with ak.fused_sdpa():
            found = ours.eval()(x, **case.options)
    compare([found], [expected], "evaluation")
    ours.train(), theirs.train()
    time_in_turns(name, lambda: within(x)[1], lambda: step(theirs, x, **case.options)[1], capsys)


NAMES = {"qkv.weight": "in_proj_weight", "qkv.bias": "in_proj_bias"}


def loaded(theirs: nn.Module, **options: Any) -> ak.nn.SelfAttention:
    """Our self-attention with the state of a layer of timm."""
    ours = ak.nn.SelfAttention(64, 4, **options)
    state = {
        NAMES.get(key, key.replace("proj.", "out_proj.")): x
        for key, x in theirs.state_dict().items()
    }
    ours.load_state_dict(state)
    return ours


@pytest.mark.parametrize("norm", (None, nn.LayerNorm, nn.RMSNorm))
def test_self_attention_in_place_of_timms(norm: type[nn.Module] | None) -> None:
    torch.manual_seed(0)
    theirs = Attention(64, 4, qkv_bias=True, qk_norm=norm is not None, norm_layer=norm)
    ours, x = loaded(theirs, qk_norm=norm), torch.randn(2, 65, 64)
    compare(step(ours, x)[0][:2], step(theirs, x)[0][:2], "timm")
    causal = step(ours, x, key_stop=ak.stops_causal(65))[0][:2]
    compare(causal, step(theirs, x, is_causal=True)[0][:2], "timm, causal")


def test_self_attention_in_place_of_evas() -> None:
    """Our self-attention equals Eva's: rotary positions except for a class token, biases of queries and values only."""
    torch.manual_seed(0)
    theirs = EvaAttention(64, 4, scale_norm=False)
    for bias in (theirs.q_bias, theirs.v_bias):
        nn.init.normal_(bias)
    ours, x, angles = loaded(theirs, qkv_bias="qv"), torch.randn(2, 65, 64), torch.randn(64, 16)
    table = torch.cat((angles.sin(), angles.cos()), -1)

    def rope(*tensors: Tensor) -> tuple[Tensor, ...]:
        turned = (apply_rot_embed_cat(x[:, 1:], table[:, None]) for x in tensors)
        return tuple(torch.cat((x[:, :1], y), 1) for x, y in zip(tensors, turned, strict=True))

    compare(step(ours, x, rope=rope)[0][:2], step(theirs, x, rope=table)[0][:2], "EVA")
