"""Model paths: stage-1 training step, encoding with a length per picture, decoding. VQGAN base, float32."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from alit import AdaptiveTokenizer, FixedLength, TransformerConfig, VQGANConfig
from alit.config import AdaptiveTokenizerConfig

from .baseline import eager_copy, gradient_norm, step
from .contest import DEVICE, Contest, Work

#: Tokens of eight pictures: 96 on average.
LENGTHS = (32, 32, 64, 64, 96, 96, 128, 256)


def model(quick: bool) -> AdaptiveTokenizer:
    """``tiny`` on the published VQGAN, random weights; for ``--quick`` two narrow layers and 64 x 64 pixels."""
    torch.manual_seed(0)
    if not quick:
        return AdaptiveTokenizer.from_size("tiny", base="vqgan").to(DEVICE)
    base = VQGANConfig(latent_channels=32, num_codes=64, channels=32, blocks=1)
    width = TransformerConfig(64, 2, 2)
    config = AdaptiveTokenizerConfig(
        base=base, encoder=width, decoder=width, image_size=(64, 64), codebook_size=256
    )
    return AdaptiveTokenizer(config).to(DEVICE)


def pictures(ours: AdaptiveTokenizer, count: int) -> Tensor:
    return torch.rand(count, 3, *ours.config.image_size, device=DEVICE)


def stage1(quick: bool) -> Contest:
    ours = model(quick).train()
    ours.base_tokenizer.requires_grad_(False)
    eager = eager_copy(ours)
    images = pictures(ours, 2 if DEVICE == "cpu" else 32)
    with FlopCounterMode(display=False) as counter:
        loss = step(eager, images, reads=False)
    norm = gradient_norm(eager)

    def run(contender: AdaptiveTokenizer, reads: bool) -> tuple[Tensor, Tensor]:
        return step(contender, images, reads=reads), gradient_norm(contender)

    calls = {"ours": partial(run, ours, False), "eager baseline": partial(run, eager, True)}
    return Contest(
        {name: lambda call=call: call for name, call in calls.items()},
        lambda result: torch.testing.assert_close(result, (loss, norm), rtol=1e-4, atol=1e-5),
        Work(flops=counter.get_total_flops()),
    )


@pytest.mark.parametrize("name", ("ours", "eager baseline"))
def test_stage1_step(name: str, race: Callable, quick: bool) -> None:
    race("stage-1 step", name, lambda: stage1(quick), rounds=3)


def encoding(quick: bool) -> Contest:
    """One length per picture: each leaves the batch when it has its tokens, or all run through every iteration."""
    ours = model(quick).eval()
    images = pictures(ours, len(LENGTHS))
    expected = [ours.encode(images[i : i + 1], FixedLength(n)) for i, n in enumerate(LENGTHS)]
    step = ours.config.latents_per_iteration

    @torch.no_grad()
    def all_iterations() -> list[Tensor]:
        """The batch as it is through every iteration; each picture's tokens are those of its own one."""
        found: dict[int, Tensor] = {}
        for iteration in ours.rollout(images, predict_at=()):
            for i, length in enumerate(LENGTHS):
                if iteration.index == length // step - 1:
                    quantized = iteration.bottleneck.quantized
                    assert quantized is not None
                    found[i] = quantized.index[i]
        return [found[i] for i in range(len(LENGTHS))]

    def with_lengths() -> list[Tensor]:
        tokens = ours.encode(images, FixedLength(LENGTHS))
        return [tokens[i].indices for i in range(len(LENGTHS))]

    calls = {"ours": with_lengths, "every iteration for all": all_iterations}

    def verify(tokens: list[Tensor]) -> None:
        for found, single in zip(tokens, expected, strict=True):
            # A vector halfway between two codes may fall to either in a batch of another shape.
            assert (found == single.indices).float().mean() > 0.99, "unlike a picture alone"

    return Contest({n: lambda call=call: call for n, call in calls.items()}, verify, Work())


@pytest.mark.parametrize("name", ("ours", "every iteration for all"))
def test_encode_with_lengths(name: str, race: Callable, quick: bool) -> None:
    race("encode 8 pictures, 96 tokens on average", name, lambda: encoding(quick), rounds=3)


def decoding(quick: bool) -> Contest:
    ours = model(quick).eval()
    images = pictures(ours, len(LENGTHS))
    tokens = ours.encode(images, FixedLength(LENGTHS))
    expected = ours.decode(tokens)
    return Contest(
        {"ours": lambda: lambda: ours.decode(tokens)},
        lambda result: torch.testing.assert_close(result, expected),
        Work(),
    )


def test_decode(race: Callable, quick: bool) -> None:
    race("decode 8 pictures, 96 tokens on average", "ours", lambda: decoding(quick), rounds=3)
