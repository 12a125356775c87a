"""Masked sampling: a length is drawn, then masked tokens are filled in, the most confident first."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .autoregressive import Wanted
from .drawing import Sharpness, draw
from .model import Generator

#: Scale of the Gumbel noise on confidences; it falls linearly to 0 over the steps.
NOISE = 1.0


def masked(
    generator: Generator,
    wanted: Sequence[Wanted],
    sharpness: Sharpness,
    steps: int,
    in_flight: int,
    on_progress: Callable[[int], None],
) -> list[Tensor]:
    """Sampled tokens of each sequence, (length,) int64 on the CPU; arguments as for ``autoregressive``.

    MaskGIT's decoding (Chang et al., CVPR 2022, arXiv 2202.04200), with a length of its own for each sample: after step
    s of S, floor(n cos(pi s / 2 S)) of its n tokens are masked.
    """
    found: list[Tensor] = []
    for first in range(0, len(wanted), in_flight):
        found += _filled(generator, wanted[first : first + in_flight], sharpness, steps)
        on_progress(len(found))
    return found


def _filled(
    generator: Generator, wanted: Sequence[Wanted], sharpness: Sharpness, steps: int
) -> list[Tensor]:
    """Tokens of samples that are computed together; a sample without masked tokens leaves the batch."""
    device, mask = generator.embedding.weight.device, generator.config.codebook_size
    label_B = torch.tensor([label for label, _ in wanted], device=device)
    weights = generator.lengths.double().cpu()
    lengths = [int(weights[x].multinomial(1, generator=chance)) for x, chance in wanted]
    length_B, longest = torch.tensor(lengths, device=device), max(lengths)
    # For each step and token: a random number that draws it, and one for the noise on its confidence.
    uniform_BSN = torch.zeros(len(wanted), 2 * steps, longest, device=device)
    for row, length, (_, chance) in zip(uniform_BSN, lengths, wanted, strict=True):
        row[:, :length] = torch.rand(2 * steps, length, generator=chance).to(device)
    token_BN = torch.full((len(wanted), longest), mask, device=device)
    position_N = torch.arange(longest, device=device)
    number_B = torch.arange(len(wanted), device=device)
    found: list[Tensor] = [torch.empty(0)] * len(wanted)
    for step in range(steps):
        masked_BN = (token_BN == mask) & (position_N < length_B[:, None])
        uniform, noise = uniform_BSN[number_B][:, [step, steps + step]].mT[masked_BN].unbind(-1)
        token, probability = guesses(generator, label_B, token_BN, length_B, uniform, sharpness)
        heat = NOISE * (1 - (step + 1) / steps)
        confidence = probability.log() - heat * (-noise.double().log()).log()
        confidence_BN = confidence.new_full(token_BN.shape, torch.inf)
        confidence_BN[masked_BN] = confidence
        share = math.cos(math.pi / 2 * (step + 1) / steps) if step + 1 < steps else 0.0
        # At least one token of each is filled in.
        left_B = (length_B * share).long().minimum(masked_BN.sum(1) - 1)
        sure_BN = confidence_BN.argsort(1).argsort(1) >= left_B[:, None]
        token_BN = token_BN.masked_scatter(masked_BN, token).where(sure_BN, token_BN)
        for row in (left_B == 0).nonzero()[:, 0].tolist():
            found[int(number_B[row])] = token_BN[row, : length_B[row]].cpu()
        kept = left_B > 0
        if not bool(kept.any()):
            break
        number_B, label_B = number_B[kept], label_B[kept]
        length_B, token_BN = length_B[kept], token_BN[kept]
    return found


def guesses(
    generator: Generator,
    label_B: Tensor,
    token_BN: Tensor,
    length_B: Tensor,
    uniform_M: Tensor,
    sharpness: Sharpness,
) -> tuple[Tensor, Tensor]:
    """Draw a token for each of M masked ones, sequence by sequence: tokens (M,) int64, probabilities (M,) float64."""
    mask = generator.config.codebook_size
    rows = generator.packed(label_B, token_BN, length_B)
    x_MC, position_M = generator.whole(rows)[rows.masked_T], rows.position_T[rows.masked_T] - 1
    token_M, probability_M = torch.empty_like(position_M), torch.empty_like(uniform_M).double()
    for found, logits in generator.scored(x_MC, position_M):
        logits[:, mask] = -torch.inf
        token_M[found], probability_M[found] = draw(logits, uniform_M[found], sharpness)
    return token_M, probability_M
