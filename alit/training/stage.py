"""Interface of training stages: what learns, its state by name, and a step; and what all stages share."""

from __future__ import annotations

import functools
import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..base import BaseTokens
from ..base.convolution import ConvEncoder
from ..tokenizer import AdaptiveTokenizer
from .config import TrainingConfig
from .cuda_graph import Terms
from .optimization import MovingAverage, Optimizer
from .processes import Processes, distributed, synchronized


class Stage(ABC):
    """Training stage: modules and optimizers by name, the moving average of the weights that learn, and a step.

    Args:
        model: whose parameters learn, if they require a gradient.
        module: model and loss as one module, as data-parallel wrappers want it: it returns the loss, its terms by
            name, and what a subclass wants beside.
        blocks: parts of the model that FSDP2 gathers one at a time.
        side: name of the model's optimizer.

    Attributes:
        doing: name of its steps where progress is shown.
    """

    model: Any
    doing = "training"

    def __init__(
        self,
        model: nn.Module,
        config: TrainingConfig,
        own: Processes,
        module: nn.Module,
        blocks: Sequence[nn.Module] = (),
        side: str = "model",
    ) -> None:
        self.model, self.config, self.side = model, config, side
        self.autocast = precision(config.precision, own.device)
        self.module = distributed(module, blocks, own, config.parallel)
        trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        self.average = MovingAverage(trained, config.ema)
        self.optimizers = {side: Optimizer(trained, config)}
        self.modules: dict[str, nn.Module] = {"model": model}

    def step(
        self, step: int, done: float, learning_rate: float, parts: Sequence[Tensor]
    ) -> dict[str, Tensor]:
        """Run step ``step`` (from 0) on a batch in parts; returns the loss and its terms, on the device."""
        sums = accumulated(self.module, parts, self.computation(step, done, parts))
        sums["gradient_norm"] = self.optimizers[self.side].step(learning_rate)
        self.average.update(step + 1)
        return sums

    def computation(
        self, step: int, done: float, parts: Sequence[Tensor]
    ) -> Callable[[Tensor], Terms]:
        """Function that runs forward and backward of one of the parts and returns the terms."""
        return lambda images: self.gradients(self.module, len(parts), images)[0]

    def gradients(self, module: nn.Module, parts: int, *inputs: Any) -> Any:
        """Run forward and backward of one of ``parts`` parts; returns what the module returned beside the loss."""
        with self.autocast():
            loss, *rest = module(*inputs)
        (loss / parts).backward()
        return rest

    def originals(self, part: Tensor) -> Tensor:
        """Images (B, 3, height, width) of a part of a batch."""
        return part

    @abstractmethod
    def reconstructions(self, images: Tensor) -> list[Tensor]:
        """Reconstructions of the images (B, 3, height, width) by the model, in one or several ways."""

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Context manager: evaluation mode, no gradients, and the run's precision, for a look at the model in a run."""
        modes = [(module, module.training) for module in self.model.modules()]
        self.model.eval()
        try:
            with self.autocast(), torch.no_grad():
                yield
        finally:
            for module, mode in modes:
                module.training = mode


class AdaptiveStage(Stage):
    """Training stage in which encoder and decoder learn. Arguments are those of :class:`Stage`.

    Raises:
        ValueError: a model that cannot be sharded.
    """

    model: AdaptiveTokenizer

    def __init__(
        self, model: AdaptiveTokenizer, config: TrainingConfig, own: Processes, module: nn.Module
    ) -> None:
        if config.parallel == "fsdp":
            check_shardable(model)
        if not config.train_encoder:
            freeze_encoder(model)
        if config.compile:
            compile_parts(model)
        if model.length_head is not None:  # trained in a stage of its own
            model.length_head.requires_grad_(False)
        super().__init__(model, config, own, module, blocks(model))

    def reconstructions(self, images: Tensor) -> list[Tensor]:
        """Reconstructions at four lengths, from the shortest to the longest."""
        return at_four_lengths(self.model, images)


def at_four_lengths(model: AdaptiveTokenizer, images: Tensor) -> list[Tensor]:
    """Reconstructions (B, 3, height, width) at up to four lengths, from the shortest to the longest."""
    last = model.config.iterations - 1
    wanted = sorted({round(i * last / 3) for i in range(4)})
    predictions = (x.prediction for x in model.rollout(images, predict_at=wanted))
    precise = (x._replace(code_BNC=x.code_BNC.float()) for x in predictions if x is not None)
    return [model.pixels(x) for x in precise]


def freeze_encoder(model: AdaptiveTokenizer) -> None:
    """Freeze all but decoder, codebooks, base tokenizer and pixel filter."""
    for name, parameter in model.named_parameters():
        if not name.startswith(("decoder", "quantize.", "base_tokenizer.", "pixel_filter.")):
            parameter.requires_grad_(False)


def accumulated(module: nn.Module, parts: Sequence[Any], compute: Callable[[Any], Terms]) -> Terms:
    """Accumulate the gradients of a batch in parts; returns means of the terms. ``compute`` runs ``module``."""
    sums: dict[str, Tensor] = {}
    for number, part in enumerate(parts, 1):
        with synchronized(module, last=number == len(parts)):
            terms = compute(part)
        for name, value in terms.items():
            sums[name] = sums.get(name, 0) + value / len(parts)
    return sums


def blocks(model: AdaptiveTokenizer) -> list[nn.Module]:
    """Transformer blocks of encoder and decoder."""
    return [*model.encoder.transformer, *model.decoder.transformer]


def compile_parts(model: AdaptiveTokenizer) -> None:
    """``torch.compile`` every block but the decoder's last, whose slice of positions torch 2.11 cannot compile, and
    a frozen base tokenizer's convolutional encoder.
    """
    for block in blocks(model)[:-1]:
        block.compile(fullgraph=True, dynamic=True)
    for part in model.base_tokenizer.modules():
        if isinstance(part, ConvEncoder) and not any(p.requires_grad for p in part.parameters()):
            part.compile(fullgraph=True)


def frozen_tokens(model: AdaptiveTokenizer, images: Tensor) -> BaseTokens:
    """Tokens of a frozen base tokenizer, posterior sampled; copies, since inference tensors cannot enter a graph."""
    with torch.inference_mode():
        tokens = model.base_tokenizer.encode(images, sample=True)
    return BaseTokens(*(None if x is None else x.clone() for x in tokens))  # type: ignore[arg-type]


def iterations_of(config: TrainingConfig, iterations: int, step: int, done: float) -> list[int]:
    """Iterations whose loss counts in a step; a function of seed, step and progress, the same in every process."""
    within = iterations
    if config.first_only is not None:
        growth = min(1.0, max(0.0, done - config.first_only) / (0.75 - config.first_only))
        within = round(growth * (iterations - 1)) + 1
    if config.iterations_per_step is None:
        return [step % within] if config.stage == "2" else list(range(within))
    chance = random.Random(f"{config.seed} iterations {step}")
    return sorted(chance.sample(range(within), min(config.iterations_per_step, within)))


def precision(name: str, device: torch.device) -> Callable[[], AbstractContextManager[Any]]:
    """Factory of autocast contexts; precision "auto" is bfloat16 where the device multiplies matrices faster in it."""
    enabled = name == "bfloat16" or (name == "auto" and _fast_bfloat16(device))
    return functools.partial(
        torch.autocast, device.type, dtype=torch.bfloat16, enabled=enabled, cache_enabled=True
    )


def _fast_bfloat16(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type != "cpu" or not hasattr(torch.cpu, "get_capabilities"):
        return False
    has = torch.cpu.get_capabilities().get
    # In AVX-512 bfloat16 has twice the rate of float32 on AMD's processors (SSE4a is theirs alone), half on Intel's.
    return bool(has("amx_bf16") or (has("avx512_bf16") and has("sse4a")))


@contextmanager
def recomputed(model: AdaptiveTokenizer, parallel: str) -> Iterator[None]:
    """Context manager: the activations of encoder and decoder are recomputed in the backward, call by call; block by
    block under FSDP2, which gathers the weights of a block for its backward.
    """
    modules = blocks(model) if parallel == "fsdp" else [model.encoder, model.decoder]
    for module in modules:
        # Encoder and decoder draw no random numbers, and a CUDA graph must not read the generator.
        module.forward = functools.partial(
            checkpoint, module.forward, use_reentrant=False, preserve_rng_state=False
        )
    try:
        yield
    finally:
        for module in modules:
            del module.forward


def check_shardable(model: AdaptiveTokenizer) -> None:
    config = model.config
    if config.bottleneck == "quantized" and config.ema_decay is None and config.dead_code_threshold:
        raise ValueError(
            "parallel: fsdp shards a learned codebook, whose rows dead_code_threshold replaces in place; expected"
            " dead_code_threshold 0, or a codebook with ema_decay"
        )
