"""Training of the length head alone: its steps record how errors fall with the number of tokens, the last one fits it.

A step runs the frozen model on a batch and writes features and errors of all patches into a table, which checkpoints
hold. After the last one the head is fitted to nine tenths of the table, to errors of patches and of images, and its
margins to the rest, which comes first: a function of the table and the seed. The rest is recorded at all lengths, other
images at the end of each iteration and at one length within it, drawn for each step.
"""

from __future__ import annotations

import dataclasses
import math
import random
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import l1_loss

from ..console import reported
from ..curves import measured
from ..length_head import KINDS, LengthHead
from ..prediction import fewest
from ..tokenizer import AdaptiveTokenizer
from .config import TrainingConfig
from .cuda_graph import Terms
from .optimization import MovingAverage, schedule
from .processes import Processes
from .stage import Stage, at_four_lengths

#: Steps of the fit, images of a step, weight decay, and peak learning rate unless the configuration has one.
FIT_STEPS, FIT_BATCH, FIT_DECAY, FIT_RATE = 4000, 64, 0.1, 4e-3
#: Most images that margins are set by; they are a tenth of all.
HELD_OUT = 128
#: Floor of the error of a patch.
LEAST = 1e-6
#: Share of predictions that are to be within the limit, among images for which some length is.
WITHIN = 0.9
#: Limits at which margins are set: quantiles of the errors in the table; first, last, count.
QUANTILES = (0.05, 0.95, 37)
#: Margins that are tried, of logarithms of errors: first, last, count.
MARGINS = (-0.2, 0.5, 141)


def add_length_head(model: AdaptiveTokenizer) -> None:
    """Add an untrained length head to a model that has none."""
    if model.length_head is None:
        model.config = dataclasses.replace(model.config, length_head=True)
        model.length_head = LengthHead(model.config).to(model.latent_tokens)


class Table(nn.Module):
    """Records of each image: features of its N image tokens (rows, N, F), errors of their patches
    (rows, N, kinds, P), and which are known (rows, P). In half precision, since checkpoints hold it.
    """

    features: Tensor
    errors: Tensor
    known: Tensor

    def __init__(self, rows: int, tokens: int, head: LengthHead) -> None:
        super().__init__()
        points = len(head.lengths)
        for name, sizes in (
            ("features", (rows, tokens, len(head.mean))),
            ("errors", (rows, tokens, len(KINDS), points)),
            ("known", (rows, points)),
        ):
            self.register_buffer(name, torch.zeros(sizes, dtype=torch.float16))


def held_out(config: TrainingConfig) -> int:
    """Number of images, the first of the run, that margins are set by; no later epoch has them again."""
    return min(config.steps * config.batch_size // 10, HELD_OUT)


class LengthStage(Stage):
    """Training stage in which only the length head learns.

    Raises:
        ValueError: several processes, sharding, an end by the clock, less than 10 images in all.
    """

    model: AdaptiveTokenizer
    doing = "recording errors"

    def __init__(self, model: AdaptiveTokenizer, config: TrainingConfig, own: Processes) -> None:
        if own.count > 1 or config.parallel == "fsdp":
            raise ValueError(
                f"stage: length expects one process, got {own.count} ({config.parallel})"
            )
        if config.seconds is not None:
            raise ValueError("seconds: stage length ends after its steps; expected none")
        rows = config.steps * config.batch_size
        if rows < 10:
            raise ValueError(f"steps: expected at least 10 images for a length head, got {rows}")
        add_length_head(model)
        assert model.length_head is not None
        model.eval().requires_grad_(False)
        self.head = model.length_head.requires_grad_(True)
        for layer in (self.head.hidden, self.head.out):
            layer.reset_parameters()
        super().__init__(model, dataclasses.replace(config, weight_decay=FIT_DECAY), own, self.head)
        self.held_out = held_out(config)
        self.table = Table(rows, model.num_image_tokens - 1, self.head).to(own.device)
        self.modules["table"] = self.table

    def step(self, step: int, done: float, learning_rate: float, parts: Sequence[Tensor]) -> Terms:
        """Record a batch, and fit after the last one; returns means of each kind of error, and how good the fit is."""
        images = torch.cat(list(parts))
        places = self._places(step)
        with self.autocast():
            found = measured(self.model, images, lengths=[self.head.lengths[x] for x in places])
        rows = slice(step * len(images), (step + 1) * len(images))
        self.table.features[rows] = found.features_BNF.half()
        self.table.errors[rows, :, :, places] = found.patches_BKPN.permute(0, 3, 1, 2).half()
        self.table.known[rows, places] = 1
        means = found.errors_BKP.mean((0, 2))
        terms = {"loss": means[0], **dict(zip(KINDS, means, strict=True))}
        return terms | (self._fitted() if step + 1 == self.config.steps else {})

    def reconstructions(self, images: Tensor) -> list[Tensor]:
        return at_four_lengths(self.model, images)

    def _places(self, step: int) -> list[int]:
        """Indices of the lengths at which curves are recorded in a step."""
        lengths, own = self.head.lengths, self.model.config.latents_per_iteration
        every = range(len(lengths))
        if step * self.config.batch_size < self.held_out:
            return list(every)
        chance = random.Random(f"{self.config.seed} lengths {step}")
        places = {x for x in every if lengths[x] % own == 0} | {every[-1]}
        for iteration in range(self.model.config.iterations):
            within = [x for x in every if 0 < lengths[x] - iteration * own < own]
            places |= {chance.choice(within)} if within else set()
        return sorted(places)

    def _fitted(self) -> Terms:
        """Fit the head and its margins; returns terms that say how good the fit is."""
        head, table, kept = self.head, self.table, self.held_out
        held = table.features[:kept].float()
        # An error above that at fewer tokens decides nothing.
        curves = table.errors[:kept].float().mean(1).clamp(min=LEAST).log().cummin(-1).values
        _start(head, table.features[kept:].float(), curves)
        optimizer, peak = self.optimizers[self.side], self.config.learning_rate or FIT_RATE
        chance = torch.Generator().manual_seed(self.config.seed)
        numbers = range(FIT_STEPS)
        for number in reported(numbers, "fitting the length head", FIT_STEPS, "steps"):
            rows = kept + torch.randint(len(table.known) - kept, (FIT_BATCH,), generator=chance)
            fit = _fit_loss(head, table, rows.to(held.device))
            fit.backward()
            optimizer.step(peak * schedule(number / FIT_STEPS, 0.05))
        trained = [(name, p) for name, p in self.model.named_parameters() if p.requires_grad]
        # The last weights: the learning rate has come down to 0.
        self.average = MovingAverage(trained, self.config.ema)
        with torch.no_grad():
            predicted = head(held)
            held_out = l1_loss(predicted, curves)
            shares = []
            for kind in range(len(KINDS)):
                margin, share = _margin(predicted[:, kind], curves[:, kind])
                head.margin[kind] = margin
                shares.append(share)
        terms = {f"within_{kind}": share for kind, share in zip(KINDS, shares, strict=True)}
        return {"fit": fit.detach(), "held_out": held_out, **terms}


def _fit_loss(head: LengthHead, table: Table, rows: Tensor) -> Tensor:
    """Loss: mean absolute difference of images' errors, in logarithms, plus that of patches' errors over their mean."""
    known = table.known[rows].float()[:, None]
    true = table.errors[rows].float().clamp(min=LEAST)
    found = head.of_patches(table.features[rows].float()).exp()
    images = (found.mean(1).log() - true.mean(1).log()).abs() * known
    patches = ((found - true).abs().mean(1) * known).sum((0, 2)) / (true.mean(1) * known).sum(
        (0, 2)
    )
    return images.sum() / (known.sum() * len(KINDS)) + patches.mean()


@torch.no_grad()
def _start(head: LengthHead, features: Tensor, curves: Tensor) -> None:
    """Initialize the head with the statistics of the features, and with the mean of the curves for every patch."""
    head.mean.copy_(features.mean((0, 1)))
    head.std.copy_(features.flatten(0, 1).std(0).clamp(min=1e-3))
    head.image_count.fill_(len(features))
    head.out.bias.copy_(curves.mean(0).flatten())
    head.out.weight.mul_(0.1)


def _margin(predicted: Tensor, true: Tensor) -> tuple[Tensor, Tensor]:
    """Margin to add to predicted curves, so that the lengths they give meet the limit as often as they should.

    Counted over all pairs of a held-out image and a limit that one of its lengths meets.

    Args:
        predicted, true: (N, P) logarithms of errors; limits are taken from the latter.

    Returns:
        The smallest margin of ``MARGINS`` with which enough are within their limit, or else most, and their share.
    """
    low, high, count = QUANTILES
    at = torch.linspace(low, high, count, device=true.device)
    limits = torch.quantile(true.flatten()[:: true.numel() // 1_000_000 + 1], at)

    def within(margin: Tensor) -> Tensor:
        hits = met = torch.zeros((), device=true.device)
        for limit in limits.exp().tolist():
            place = fewest(predicted + margin, limit)
            can = true[:, -1] <= math.log(limit)
            hits = hits + ((true.gather(1, place[:, None])[:, 0] <= math.log(limit)) & can).sum()
            met = met + can.sum()
        return hits / met.clamp(min=1)

    margins = torch.linspace(*MARGINS, device=true.device)
    shares = torch.stack([within(margin) for margin in margins])
    chosen = (shares >= shares.max().clamp(max=WITHIN)).int().argmax()
    return margins[chosen], shares[chosen]
