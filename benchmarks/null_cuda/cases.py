"""Cases measured with the null CUDA: ops and modules as links of a chain, beside what users of torch would write.

A link takes a tensor and gives one of the same shape and dtype, so forward and backward can be measured as the marginal
cost in a chain of calls: a single call would add the start of the autograd engine to both sides. Shapes are those of a
step of ``base``: 12 images, 12 heads of 64, up to 513 tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import varlen as torch_varlen

import alit_kernels as ak
from alit import TransformerConfig
from alit.layers import Transformer
from alit_kernels.nn import (
    GELULinear,
    GroupedVQ,
    Linear,
    ResidualVQ,
    SelfAttention,
    UsageWindow,
    VectorQuantizer,
)

from ..peers import eager

Link = Callable[[Tensor], Tensor]
BATCH, LENGTH, LONGEST, HEADS, HEAD_DIM, CODES = 12, 353, 513, 12, 64, 4096
ROWS, WIDTH = BATCH * LONGEST, HEADS * HEAD_DIM


@dataclass(frozen=True)
class Case:
    """One case: our link, the peer's name, and its link if there is one.

    ``learns``: measure forward and backward too.
    """

    name: str
    shape: tuple[int, ...]
    ours: Link
    peer: str = ""
    theirs: Link | None = None
    dtype: torch.dtype = torch.bfloat16
    learns: bool = True
    theirs_shape: tuple[int, ...] | None = None

    def leaf(self, theirs: bool = False) -> Tensor:
        shape = self.theirs_shape if theirs and self.theirs_shape else self.shape
        return torch.empty(shape, dtype=self.dtype, device="cuda")


def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="cuda")


def zeros(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
    return torch.zeros(shape, dtype=dtype, device="cuda")


def cases() -> Iterator[Case]:
    yield from _attention()
    yield from _blocks()
    yield from _ragged()
    yield from _codebooks()


def _attention() -> Iterator[Case]:
    # torch's choice of a kernel would ask cuDNN about a device that does not exist.
    torch_varlen._should_use_cudnn = lambda *_: False
    offsets, stop = zeros(BATCH + 1, dtype=torch.int32), (LONGEST, LONGEST)
    packed, dense = empty(ROWS, HEADS, HEAD_DIM), empty(BATCH, LENGTH, HEADS, HEAD_DIM)
    yield Case(
        "attention", tuple(dense.shape), lambda x: ak.attention(x, x, x),
        "SDPA, flash", lambda x: F.scaled_dot_product_attention(x, x, x),
        theirs_shape=(BATCH, HEADS, LENGTH, HEAD_DIM),
    )  # fmt: skip
    yield Case(
        "varlen_attention", tuple(packed.shape),
        lambda x: ak.varlen_attention(x, x, x, offsets, max_length=LONGEST),
        "torch varlen_attn",
        lambda x: torch_varlen.varlen_attn(x, x, x, offsets, offsets, *stop),
    )  # fmt: skip
    mask = torch.ones(BATCH, LENGTH, dtype=torch.bool, device="cuda")
    yield Case(
        "attention, key_mask", tuple(dense.shape),
        lambda x: ak.attention(x, x, x, key_mask=mask),
    )  # fmt: skip
    lse, where = empty(HEADS, ROWS, dtype=torch.float32), {"queries": range(256), "keys": range(32)}
    yield Case(
        "attention_map", tuple(packed.shape),
        lambda x: ak.attention_map(x, packed, lse, offsets, max_length=LONGEST, **where), learns=False,
    )  # fmt: skip
    layer = SelfAttention(WIDTH, HEADS).to(device="cuda", dtype=torch.bfloat16)
    lengths = torch.full((BATCH,), LENGTH, device="cuda")

    def eager(x: Tensor) -> Tensor:
        qkv = F.linear(x, layer.in_proj_weight, layer.in_proj_bias)
        q, k, v = (t.unflatten(-1, (HEADS, -1)).transpose(1, 2) for t in qkv.chunk(3, -1))
        out = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(-2)
        return F.linear(out, layer.out_proj.weight, layer.out_proj.bias)

    shape = (BATCH, LENGTH, WIDTH)
    yield Case("nn.SelfAttention", shape, layer, "linear, SDPA, linear", eager)
    yield Case(
        "nn.SelfAttention, lengths", shape, lambda x: layer(x, lengths=lengths), "without", layer
    )
    yield Case(
        "nn.SelfAttention, packed", (ROWS, WIDTH), lambda x: layer(x, offsets=offsets, max_length=LONGEST),
    )  # fmt: skip
    options = {"batch_first": True, "device": "cuda", "dtype": torch.bfloat16}
    heads = ak.nn.MultiheadAttention(WIDTH, HEADS, **options)
    torch_heads = torch.nn.MultiheadAttention(WIDTH, HEADS, **options)
    yield Case(
        "nn.MultiheadAttention", shape, lambda x: heads(x, x, x, need_weights=False)[0],
        "torch's", lambda x: torch_heads(x, x, x, need_weights=False)[0],
    )  # fmt: skip
    plain = Linear(WIDTH, WIDTH).to(device="cuda", dtype=torch.bfloat16)
    yield Case(
        "nn.Linear", shape, plain,
        "linear", lambda x: F.linear(x, plain.weight, plain.bias),
    )  # fmt: skip
    linear = GELULinear(WIDTH, WIDTH).to(device="cuda", dtype=torch.bfloat16)
    yield Case(
        "nn.GELULinear", shape, linear,
        "gelu, linear", lambda x: F.linear(F.gelu(x), linear.weight, linear.bias),
    )  # fmt: skip


def _blocks() -> Iterator[Case]:
    shape, options = (BATCH, LENGTH, WIDTH), {"device": "cuda", "dtype": torch.bfloat16}
    rows, (branch_bias, weight, bias) = empty(*shape), (empty(WIDTH) for _ in range(3))
    yield Case(
        "add_layer_norm", shape,
        lambda x: ak.add_layer_norm(x, rows, branch_bias, weight, bias).normalized,
        "two additions, layer_norm",
        lambda x: F.layer_norm(x + (rows + branch_bias), (WIDTH,), weight, bias),
    )  # fmt: skip
    block = Transformer(TransformerConfig(WIDTH, 1, HEADS)).to(**options)
    theirs = torch.nn.TransformerEncoderLayer(
        WIDTH, HEADS, 4 * WIDTH, 0.0, "gelu", batch_first=True, norm_first=True
    )
    yield Case(
        "transformer block", shape, block, "nn.TransformerEncoderLayer", theirs.to(**options)
    )


def _ragged() -> Iterator[Case]:
    lengths, offsets = zeros(BATCH), zeros(BATCH + 1, dtype=torch.int32)
    where, places = zeros(ROWS), torch.arange(256, device="cuda")
    keep, select = (
        torch.ones(ROWS, dtype=torch.bool, device="cuda"),
        torch.ones(BATCH, dtype=torch.bool, device="cuda"),
    )
    rows, fill = empty(32, WIDTH), empty(WIDTH)
    padded, packed = (BATCH, LONGEST, WIDTH), (ROWS, WIDTH)
    yield Case(
        "cumulative_offsets", (BATCH,), ak.cumulative_offsets, dtype=torch.int64, learns=False
    )
    yield Case(
        "pack, unpack", padded,
        lambda x: ak.unpack(*ak.pack(x, lengths, capacity=ROWS), max_length=LONGEST),
        "index_select twice",
        lambda x: x.flatten(0, 1).index_select(0, where).index_select(0, where).view(padded),
    )  # fmt: skip
    yield Case(
        "compact", packed, lambda x: ak.compact(x, offsets, keep, capacity=ROWS)[0],
        "index_select", lambda x: x.index_select(0, where),
    )  # fmt: skip
    yield Case(
        "append", packed, lambda x: ak.append(x, offsets, rows, select=select, capacity=ROWS)[0],
        "cat, index_select", lambda x: torch.cat([x, rows]).index_select(0, where),
    )  # fmt: skip
    yield Case(
        "tail_mask", (BATCH, 256, WIDTH), lambda x: ak.tail_mask(x, lengths, fill),
        "where", lambda x: torch.where((places < lengths[:, None])[..., None], x, fill),
    )  # fmt: skip


def _codebooks() -> Iterator[Case]:
    z, codes = (BATCH, 256, 12), empty(CODES, 12, dtype=torch.float32)

    def nearest(x: Tensor, codes: Tensor) -> Tensor:
        return (x.square().sum(1, keepdim=True) + codes.square().sum(1) - 2 * (x @ codes.T)).argmin(
            1
        )

    def one_hot(x: Tensor) -> Tensor:
        unit, units = F.normalize(x, dim=-1), F.normalize(codes, dim=-1)
        index = nearest(unit.flatten(0, -2), units)
        quantized = (F.one_hot(index, CODES).float() @ units).view(x.shape)
        loss = F.mse_loss(quantized, unit.detach()) + 0.25 * F.mse_loss(quantized.detach(), unit)
        return unit + (quantized - unit).detach() + 0 * loss

    def ours(x: Tensor) -> Tensor:
        found = ak.vector_quantize(x, codes, metric="cosine")
        return found.quantized + 0 * found.loss

    yield Case("vector_quantize", z, ours, "one-hot", one_hot, torch.float32)
    average = VectorQuantizer(CODES, 12, metric="cosine", ema_decay=0.99).cuda().train()
    yield Case(
        "nn.VectorQuantizer, moving average", z, lambda x: average(x).quantized, dtype=torch.float32
    )
    residual, grouped = ResidualVQ(4, CODES, 12).cuda(), GroupedVQ(2, CODES, 12).cuda()
    yield Case("nn.ResidualVQ", z, lambda x: residual(x).quantized, dtype=torch.float32)
    yield Case("nn.GroupedVQ", z, lambda x: grouped(x).quantized, dtype=torch.float32)
    flat, index = (BATCH * 256, 12), zeros(BATCH * 256)
    window = UsageWindow(CODES).cuda()
    yield Case(
        "nn.UsageWindow", flat, lambda x: (window.update(index), window.recent)[1],
        dtype=torch.float32, learns=False,
    )  # fmt: skip
    yield Case(
        "nearest_codeword", flat, lambda x: ak.nearest_codeword(x, codes),
        "distance matrix", lambda x: nearest(x, codes), torch.float32, learns=False,
    )  # fmt: skip

    def added(x: Tensor) -> Tensor:
        count = zeros(CODES, dtype=torch.float32).index_add_(0, index, torch.ones_like(x[:, 0]))
        return count, torch.zeros_like(codes).index_add_(0, index, x)

    yield Case(
        "codebook_statistics", flat, lambda x: ak.codebook_statistics(index, x, CODES),
        "index_add", added, torch.float32, learns=False,
    )  # fmt: skip

    def entropies(x: Tensor) -> Tensor:
        sample, batch = ak.codebook_entropy(x, codes, temperature=0.01)
        return x + (sample - batch)

    def written_out(x: Tensor) -> Tensor:
        options = {"temperature": 0.01, "metric": "euclidean", "epsilon": 0.0}
        sample, batch = eager.codebook_entropy(x, codes, **options)
        return x + (sample - batch)

    yield Case("codebook_entropy", flat, entropies, "distance matrix", written_out, torch.float32)
    book, target = empty(256, 256), zeros(BATCH * 256)

    def softmax(x: Tensor) -> Tensor:
        p, nll = x.softmax(-1), F.cross_entropy(x, target, reduction="none")
        p.gather(-1, target[:, None])
        return p @ book + 0 * nll[:, None].to(x.dtype)

    def soft(x: Tensor) -> Tensor:
        found = ak.soft_codebook(x, book, target)
        return found.code + 0 * found.nll[:, None].to(x.dtype)

    yield Case("soft_codebook", (BATCH * 256, 256), soft, "softmax, cross entropy", softmax)
