"""Stage 1, latent distillation: one optimiser step on the published loss, base tokenizer frozen."""

from __future__ import annotations

import functools
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..base import BaseTokens
from ..base.convolution import ConvEncoder
from ..losses import stage1_loss
from ..tokenizer import AdaptiveTokenizer
from .config import TrainingConfig
from .cuda_graph import GradientGraph
from .optimisation import MovingAverage, Optimiser
from .processes import Processes, distributed, synchronised


class Stage1Module(nn.Module):
    """Model and loss as one module, as data-parallel wrappers want it."""

    def __init__(self, model: AdaptiveTokenizer, config: TrainingConfig) -> None:
        super().__init__()
        self.model = model
        # Recomputed in the backward, all iterations' activations of the decoder at once would be too many.
        together = False if config.activation_checkpointing else None
        self.options: dict[str, Any] = {"through_time": config.through_time, "together": together}

    def forward(
        self, images: Tensor, base: BaseTokens, at: Sequence[int]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss, and its terms by name."""
        loss = stage1_loss(self.model, images, at=at, base=base, **self.options)
        terms = {"loss": loss.total.detach()}
        for index, iteration in loss.iterations.items():
            for name, value in iteration._asdict().items():
                if value is not None:
                    terms[f"{name}_{index}"] = value.detach()
        return loss.total, terms


class Stage1:
    """What the training loop needs of a stage: modules and optimisers with their state, and a step."""

    def __init__(self, model: AdaptiveTokenizer, config: TrainingConfig, own: Processes) -> None:
        self.model, self.config = model, config
        self.autocast = precision(config.precision, own.device)
        model.train()
        model.base_tokenizer.eval().requires_grad_(False)
        if config.parallel == "fsdp":
            check_shardable(model)
        if config.cuda_graph:
            check_capturable(model, config, own)
        blocks = [*model.encoder.transformer, *model.decoder.transformer]
        if config.compile:
            compile_parts(model)
        self.module = distributed(Stage1Module(model, config), blocks, own, config.parallel)
        trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        self.average = MovingAverage(trained, config.ema)
        self.optimisers = {"model": Optimiser(trained, config)}
        self.modules: dict[str, nn.Module] = {"model": model}
        self.graph: GradientGraph | None = None
        self.graph_at: list[int] = []

    def step(
        self, step: int, done: float, learning_rate: float, parts: Sequence[Tensor]
    ) -> dict[str, Tensor]:
        """One optimiser step on a batch in parts; returns the terms, on the device."""
        at = iterations_of(self.config, self.model.config.iterations, step, done)
        compute: Callable[[Tensor], dict[str, Tensor]]
        compute = functools.partial(self._gradients, at=at, parts=len(parts))
        if self.config.cuda_graph:
            compute = self._captured(compute, at, parts[0])
        sums: dict[str, Tensor] = {}
        for number, images in enumerate(parts, 1):
            with synchronised(self.module, last=number == len(parts)):
                terms = compute(images)
            add_terms(sums, terms, len(parts))
        sums["gradient_norm"] = self.optimisers["model"].step(learning_rate)
        self.average.update(step + 1)
        return sums

    def _gradients(self, images: Tensor, *, at: list[int], parts: int) -> dict[str, Tensor]:
        """Forward and backward of one of a batch's parts."""
        with self.autocast():
            loss, terms = self.module(images, frozen_tokens(self.model, images), at)
        (loss / parts).backward()
        return terms

    def _captured(
        self, compute: Callable[[Tensor], dict[str, Tensor]], at: list[int], images: Tensor
    ) -> GradientGraph:
        """``compute`` as a CUDA graph, made anew where the iterations change; gradients are 0."""
        if self.graph is None or self.graph_at != at:
            self.graph = None  # its memory goes before the next one takes its own
            self.graph, self.graph_at = GradientGraph(self.model, compute, images), at
        self.graph.zero_gradients()
        return self.graph

    def reconstructions(self, images: Tensor) -> list[Tensor]:
        """The images at four lengths, from the shortest to the longest."""
        return at_four_lengths(self.model, images)

    def evaluating(self) -> AbstractContextManager[Any]:
        """Evaluation mode and this run's precision, for a look at the model within a run."""
        return evaluating(self.model, self.autocast)


def add_terms(sums: dict[str, Tensor], terms: dict[str, Tensor], parts: int) -> None:
    """Add the terms of one of a batch's parts to those of the batch, means over the parts."""
    for name, value in terms.items():
        sums[name] = sums.get(name, 0) + value / parts


@contextmanager
def evaluating(
    model: AdaptiveTokenizer, autocast: Callable[[], AbstractContextManager[Any]]
) -> Iterator[None]:
    """Evaluation mode and autocast, for a look at the model within a run."""
    model.eval()
    try:
        with autocast():
            yield
    finally:
        model.train()
        model.base_tokenizer.eval()


def at_four_lengths(model: AdaptiveTokenizer, images: Tensor) -> list[Tensor]:
    """Reconstructions at four lengths, from the shortest to the longest."""
    last = model.config.iterations - 1
    wanted = sorted({round(i * last / 3) for i in range(4)})
    predictions = (x.prediction for x in model.rollout(images, predict_at=wanted))
    codes = [x.code_BNC.float() for x in predictions if x is not None]
    return [model.base_tokenizer.pixels(code_BNC, model.config.grid) for code_BNC in codes]


def compile_parts(model: AdaptiveTokenizer) -> None:
    """``torch.compile`` of every block but the decoder's last, whose slice of positions torch 2.11 cannot compile, and
    of a frozen base tokenizer's convolutional encoder.
    """
    for block in (*model.encoder.transformer, *model.decoder.transformer[:-1]):
        block.compile(fullgraph=True, dynamic=True)
    for part in model.base_tokenizer.modules():
        if isinstance(part, ConvEncoder) and not any(p.requires_grad for p in part.parameters()):
            part.compile(fullgraph=True)


def frozen_tokens(model: AdaptiveTokenizer, images: Tensor) -> BaseTokens:
    """Of a frozen base tokenizer, posterior sampled; copies, since inference tensors cannot enter a graph."""
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
    """The autocast context of a precision; "auto" is bfloat16 where the device multiplies matrices in it faster."""
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
    # In AVX-512 it has twice the rate of float32 on AMD's processors (SSE4a is theirs alone), half on Intel's.
    return bool(has("amx_bf16") or (has("avx512_bf16") and has("sse4a")))


def recomputed_parts(model: AdaptiveTokenizer, parallel: str) -> list[nn.Module]:
    """Encoder and decoder; block by block under FSDP2, which gathers the weights of a block for its backward."""
    if parallel == "fsdp":
        return [*model.encoder.transformer, *model.decoder.transformer]
    return [model.encoder, model.decoder]


@contextmanager
def recomputed(*modules: nn.Module) -> Iterator[None]:
    """Within, the activations of these modules are computed again in the backward, call by call."""
    for module in modules:
        plain = module.forward
        # They draw no random numbers, and a CUDA graph must not read the generator.
        module.forward = functools.partial(
            checkpoint, plain, use_reentrant=False, preserve_rng_state=False
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


def check_capturable(model: AdaptiveTokenizer, config: TrainingConfig, own: Processes) -> None:
    """That a step of this run can be one CUDA graph."""
    if own.device.type != "cuda":
        raise ValueError(f"cuda_graph: expected a CUDA device, got {own.device}")
    if own.count > 1 or config.parallel == "fsdp":
        raise ValueError(f"cuda_graph: expected one process, got {own.count} ({config.parallel})")
    if model.config.halting == "drop":
        raise ValueError(
            'cuda_graph: halting "drop" asks the device for lengths; expected "mask" or "off"'
        )
