"""The published model as it is commonly written, with the weights of one of ours: the baseline of training steps.

Every position runs through every layer, attention builds its scores, every layer keeps its input for the backward, the
quantizers build distance matrices and one-hots, the decoder's logits go through three softmaxes, and losses are read by
the host in every iteration. Written from the description of the published system.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, mse_loss, scaled_dot_product_attention

from alit import AdaptiveTokenizer
from alit.base.interface import BaseTokens, Prediction, to_rows
from alit.layers import MLP, Transformer
from alit.losses import stage1_loss
from alit.losses.stage1 import WEIGHTS
from alit.training.config import TrainingConfig
from alit.training.cuda_graph import GradientGraph
from alit.training.optimization import Optimizer
from alit_kernels import VectorQuantized
from alit_kernels.nn import GELULinear, Linear, SelfAttention, VectorQuantizer

from . import eager


def plain(layer: nn.Linear) -> nn.Linear:
    """torch's ``nn.Linear`` that shares the parameters of one of our layers."""
    own = nn.Linear(layer.in_features, layer.out_features, device="meta")
    own.weight, own.bias = layer.weight, layer.bias
    return own


class EagerAttention(nn.Module):
    """Multi-head attention that keeps scores and probabilities for its backward; ``fused``: torch's fused attention."""

    def __init__(self, other: SelfAttention, fused: bool) -> None:
        super().__init__()
        self.heads, self.fused = other.heads, fused
        self.in_proj_weight, self.in_proj_bias = other.in_proj_weight, other.in_proj_bias
        self.out_proj = plain(other.out_proj)

    def forward(
        self,
        x: Tensor,
        *,
        offsets: None = None,
        max_length: int | None = None,
        queries: None = None,
    ) -> Tensor:
        assert offsets is None and queries is None, "the published code always attends to all"
        qkv = linear(x, self.in_proj_weight, self.in_proj_bias)
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in qkv.chunk(3, -1))
        out = (scaled_dot_product_attention if self.fused else eager.attention)(q, k, v)
        return self.out_proj(out.transpose(1, 2).flatten(-2))


class EagerMLP(nn.Module):
    """MLP of linear, GELU, linear, each of which keeps its input for the backward."""

    def __init__(self, other: MLP) -> None:
        super().__init__()
        self.c_fc, self.gelu, self.c_proj = plain(other.c_fc), nn.GELU(), plain(other.c_proj)

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(self.gelu(self.c_fc(x)))


class EagerQuantizer(nn.Module):
    """Vector quantizer with a distance matrix, a one-hot product, and losses by autograd."""

    def __init__(self, other: VectorQuantizer) -> None:
        super().__init__()
        self.embedding, self.metric = other.embedding, other.metric
        self.commitment = other.commitment

    def forward(self, z: Tensor, mask: None = None) -> VectorQuantized:
        return eager.vector_quantize(z, self.embedding.weight, self.metric, self.commitment)


def eager_copy(model: AdaptiveTokenizer, fused_attention: bool = False) -> AdaptiveTokenizer:
    """Copy of a model with a VQGAN base whose modules are replaced by the eager ones above."""
    model = copy.deepcopy(model)
    replaced: dict[type, Any] = {
        SelfAttention: partial(EagerAttention, fused=fused_attention),
        MLP: EagerMLP,
        VectorQuantizer: EagerQuantizer,
        Linear: plain,
    }
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if type(child) in replaced:
                setattr(parent, name, replaced[type(child)](child))
    assert not any(isinstance(x, (Linear, GELULinear)) for x in model.modules())
    base: Any = model.base_tokenizer
    decoder: Any = model.decoder

    def whole(x: Tensor, offsets: None, *, max_length: int, wanted: slice) -> Tensor:
        assert offsets is None, "the published decoder takes dense batches"
        return Transformer.forward(decoder, x)[:, wanted]

    def tokens(z_BCHW: Tensor) -> BaseTokens:
        rows = to_rows(z_BCHW)
        target = eager.nearest_codeword(rows.flatten(0, 1), base.codebook).view(rows.shape[:2])
        return BaseTokens(z_BCHW, base.codebook[target], target)

    def predict(decoded_BNV: Tensor, target_BN: Tensor) -> Prediction:
        rows = decoded_BNV.flatten(0, 1), base.codebook, target_BN.flatten()
        soft = (x.unflatten(0, target_BN.shape) for x in eager.soft_codebook(*rows))
        return Prediction(decoded_BNV, *soft)

    base.tokens, base.predict, decoder.forward = tokens, predict, whole
    return model


def _stacked(terms: Iterable[Iterable[Any]]) -> Tensor:
    return torch.stack([torch.stack([x.detach().float() for x in each]) for each in terms])


class Outcome(NamedTuple):
    """Result of a training step, by which steps are compared.

    Attributes:
        loss: scalar.
        terms: (iterations, 3): cross-entropy, error of the expected code and quantizer loss.
        gradients: (3 * parameters,) norms before clipping, one for each third of a parameter's rows (queries, keys and
            values in an attention's input projection).
    """

    loss: Tensor
    terms: Tensor
    gradients: Tensor


class Step:
    """One stage-1 training step: loss of all iterations, gradients, clipping at 3, AdamW.

    The learning rate is 0: all work is done, but the weights stay the same, so every outcome can be compared with the
    first.

    Args:
        model: in training mode, its base tokenizer frozen.
        images: (B, 3, height, width).
        published: work like the published code: the host waits for the terms of every iteration, and the optimizer is
            torch's AdamW. Otherwise like ``alit train``.

    ``together`` is that of :func:`alit.stage1_loss`.
    """

    together: bool | None = None

    def __init__(self, model: AdaptiveTokenizer, images: Tensor, *, published: bool) -> None:
        self.model, self.images, self.published = model, images, published
        trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        self.parameters = [p for _, p in trained]
        self.config = TrainingConfig()
        self.optimizer = None if published else Optimizer(trained, self.config)
        self.adamw = torch.optim.AdamW(
            self.parameters, lr=0.0, betas=self.config.betas, weight_decay=self.config.weight_decay
        )

    def __call__(self) -> Outcome:
        loss, terms = self.backward(self.images).values()
        # None where a parameter gets no gradient.
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.parameters]
        parts = [part for gradient in gradients for part in gradient.tensor_split(3)]
        norms = torch.stack(torch._foreach_norm(parts))
        self.optimize()
        return Outcome(loss, terms, norms)

    def backward(self, images: Tensor) -> dict[str, Tensor]:
        """Compute the gradients; returns ``loss``, its total, and ``terms``, (iterations, 3), in this order."""
        loss, terms = self.published_loss(images) if self.published else self.loss(images)
        loss.backward()
        return {"loss": loss.detach(), "terms": terms}

    def loss(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Total of the loss and its terms, (iterations, 3)."""
        loss = stage1_loss(self.model, images, together=self.together)
        return loss.total, _stacked(loss.iterations.values())

    def published_loss(self, images: Tensor) -> tuple[Tensor, Tensor]:
        terms: list[tuple[Tensor, ...]] = []
        total = torch.zeros((), device=images.device)
        for iteration in self.model.rollout(images):
            prediction, quantized = iteration.prediction, iteration.bottleneck.quantized
            assert (
                prediction is not None and prediction.nll_BN is not None and quantized is not None
            )
            weight = WEIGHTS[iteration.index] if iteration.index < len(WEIGHTS) else 1.0
            nll = prediction.nll_BN.mean()
            code = mse_loss(prediction.code_BNC, iteration.base.code_BNC)
            total = total + weight * nll + code + quantized.loss
            terms.append((nll, code, quantized.loss))
            self.logged = [term.item() for term in terms[-1]]
        return total, _stacked(terms)

    def optimize(self) -> None:
        """Clip the gradients, take an optimizer step, and drop the gradients."""
        if self.optimizer is not None:
            self.optimizer.step(0.0)
        else:
            nn.utils.clip_grad_norm_(self.parameters, self.config.clip)
            self.adamw.step()
            self.adamw.zero_grad(set_to_none=True)

    @property
    def state_bytes(self) -> int:
        """Bytes kept between steps: the weights, and two moments of each trained one."""
        parameters = (*self.model.parameters(), *self.parameters, *self.parameters)
        return sum(p.nbytes for p in parameters)


class CapturedStep(Step):
    """Step that replays loss and gradients as a CUDA graph captured in its first call, as ``alit train`` can do.

    ``peak_megabytes``: peak memory of the capture, all of which the graph keeps.
    """

    graph: GradientGraph | None = None
    peak_megabytes: float

    def backward(self, images: Tensor) -> dict[str, Tensor]:
        if self.graph is None:
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            self.graph = GradientGraph(self.model, super().backward, images)
            self.peak_megabytes = (torch.cuda.max_memory_allocated() - before) / 1e6
        self.graph.zero_gradients()
        return {name: term.clone() for name, term in self.graph(images).items()}
