"""Arguments and calls of every op and every public function, small, and large ones for tests on a device."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

import alit_kernels as ak
from alit_kernels.nn import SelfAttention, VectorQuantizer

LENGTHS = torch.tensor([3, 0, 5])
#: Offsets into nine rows, the last of which belongs to no sequence.
OFFSETS = torch.tensor([0, 3, 3, 8], dtype=torch.int32)

#: Public names that are not functions of tensors.
OTHER_NAMES = {"accelerate", "fused_sdpa", "stops_blocks", "stops_causal", "stops_prefix"}

#: Lengths large enough that many programs of a kernel may add to the same address.
MANY = (65, 0, 130, 17)


def values(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, generator=generator)


def leaf(*shape: int) -> Tensor:
    return values(*shape).requires_grad_()


def samples() -> dict[str, dict[str, Any]]:
    """Arguments of every op without ``implementation``; further kinds of call have a suffix in brackets."""
    mask, index = torch.tensor([True, False, True, True, True, True]), torch.arange(6) % 5
    select, rows = torch.tensor([True, False, True]), {"packed": leaf(9, 4), "offsets": OFFSETS}
    bounds = {"max_length": 5, "max_key_length": 5, "scale": 0.3}
    unmasked = {"key_mask": None, "key_stop": None}
    packed = {"offsets": OFFSETS, "key_offsets": None, **unmasked, **bounds}
    dense = {"offsets": None, "key_offsets": None, **unmasked, **bounds}
    qkv = {"q": leaf(9, 2, 8), "k": leaf(9, 2, 8), "v": leaf(9, 2, 8)}
    dense_qkv = {"q": leaf(2, 5, 2, 8), "k": leaf(2, 5, 2, 8), "v": leaf(2, 5, 2, 8)}
    saved = {name: x.detach() for name, x in qkv.items()}
    dense_saved = {name: x.detach() for name, x in dense_qkv.items()}
    lse, dense_lse = torch.randn(2, 9), torch.randn(2, 2, 5)
    search = {"metric": "cosine", "precision": "ieee"}
    vectors = {name: leaf(8) for name in ("weight", "bias")}
    rounding = {"eps": 1e-5, "dtype": torch.float16}
    return {
        "add_layer_norm": {
            **{"x": leaf(3, 8), "branch": leaf(3, 8), "branch_bias": leaf(8)},
            **vectors,
            **rounding,
        },
        "add_layer_norm (alone)": {
            **{"x": leaf(3, 8), "branch": None, "branch_bias": None},
            **vectors,
            **rounding,
        },
        "add_layer_norm_backward": {
            **{"grad_total": torch.randn(3, 8), "grad_normalized": torch.randn(3, 8)},
            **{"total": torch.randn(3, 8), "weight": torch.randn(8), "stats": torch.rand(2, 3) + 1},
            **{"before": torch.randn(3, 8)},
            **{"x_dtype": torch.float32, "branch_dtype": torch.float16},
        },
        "append": {**rows, "rows": leaf(2, 4), "select": select, "capacity": 13},
        "append_backward": {
            "grad": torch.randn(13, 4),
            "offsets": OFFSETS,
            "new_offsets": OFFSETS + torch.tensor([0, 2, 2, 4], dtype=torch.int32),
            "select": select,
            "rows": 9,
            "added": 2,
            "shared": True,
            "packed_wanted": True,
            "rows_wanted": True,
        },
        "attention": {**qkv, **packed},
        "attention (fused)": {"q": leaf(9, 3, 2, 8), "k": None, "v": None, **packed},
        "attention (dense)": {**dense_qkv, **dense, "key_mask": torch.ones(2, 5) > 0},
        "attention_backward": {
            **saved,
            **packed,
            "grad_out": torch.randn(9, 2, 8),
            "grad_lse": lse,
            "out": saved["q"],
            "lse": lse,
            "keys_wanted": True,
        },
        "attention_backward (fused)": {
            **packed,
            **{"q": values(9, 3, 2, 8), "k": None, "v": None, "grad_out": torch.randn(9, 2, 8)},
            **{"grad_lse": None, "out": saved["q"], "lse": lse, "keys_wanted": True},
        },
        "attention_backward (dense)": {
            **dense_saved,
            **dense,
            "grad_out": torch.randn(2, 5, 2, 8),
            "grad_lse": dense_lse,
            "out": dense_saved["q"],
            "lse": dense_lse,
            "keys_wanted": False,
        },
        "attention_map": {
            "q": saved["q"],
            "k": saved["k"],
            "lse": lse,
            "offsets": OFFSETS,
            "query_start": 1,
            "query_stop": 4,
            "key_start": 0,
            "key_stop": 2,
            "max_length": 5,
            "scale": 0.3,
        },
        "codebook_entropy": {
            **{"z": leaf(6, 4), "codebook": leaf(5, 4), "mask": mask},
            **{"metric": "cosine", "temperature": 0.5, "epsilon": 1e-5},
        },
        "codebook_entropy_backward": {
            **{"grad_sample": torch.tensor(1.0), "grad_batch": torch.tensor(-1.0)},
            **{"z": torch.randn(6, 4), "codebook": torch.randn(5, 4), "mask": mask},
            **{"mean": torch.full((5,), 0.2), "entropy": torch.rand(6)},
            **{"normalizer": torch.rand(2, 6) + 1, "count": torch.tensor(5.0)},
            **{"metric": "cosine", "temperature": 0.5, "epsilon": 1e-5},
            **{"z_wanted": True, "codebook_wanted": True},
        },
        "codebook_statistics": {
            "index": index,
            "z": torch.randn(6, 4),
            "num_codes": 5,
            "mask": mask,
        },
        "compact": {**rows, "keep": torch.arange(9) % 2 == 0, "capacity": 7},
        "compact_backward": {
            "grad": torch.randn(4, 3),
            "target_row": torch.tensor([2, -1, 0, 3, -1], dtype=torch.int32),
        },
        "cumulative_offsets": {"lengths": LENGTHS},
        "nearest_codeword": {"z": torch.randn(6, 4), "codebook": torch.randn(5, 4), **search},
        "pack": {"padded": leaf(3, 6, 4), "lengths": LENGTHS, "capacity": 9},
        "soft_codebook": {"logits": leaf(6, 5), "codebook": leaf(5, 4), "target": index},
        "soft_codebook_backward": {
            "grad_code": torch.randn(6, 4),
            "grad_nll": torch.randn(6),
            "grad_p_target": torch.randn(6),
            "logits": torch.randn(6, 5),
            "codebook": torch.randn(5, 4),
            "target": index,
            "code": torch.randn(6, 4),
            "normalizer": torch.rand(2, 6) + 1,
            "logits_wanted": True,
            "codebook_wanted": True,
        },
        "tail_mask": {"tokens": leaf(3, 6, 4), "lengths": LENGTHS, "fill": leaf(4)},
        "tail_mask_backward": {
            "grad": torch.randn(3, 6, 4),
            "lengths": LENGTHS,
            "tokens_wanted": True,
            "fill_wanted": True,
        },
        "unpack": {**rows, "max_length": 6, "fill": 0.5},
        "unpack_backward": {"grad": leaf(3, 6, 4), "offsets": OFFSETS, "rows": 9},
        "vector_quantize": {
            "z": leaf(6, 4),
            "codebook": leaf(5, 4),
            "mask": mask,
            "commitment": 0.25,
            "codebook_weight": 0.5,
            **search,
        },
        "vector_quantize_backward": {
            "grad_quantized": torch.randn(6, 4),
            "grad_loss": torch.tensor(1.0),
            "grad_commitment": torch.tensor(1.0),
            "grad_codebook": torch.tensor(1.0),
            "z": torch.randn(6, 4),
            "codebook": torch.randn(5, 4),
            "index": index,
            "mask": mask,
            "metric": "cosine",
            "commitment": 0.25,
            "codebook_weight": 0.5,
            "z_wanted": True,
            "codebook_wanted": True,
        },
    }


NAMES = sorted(samples())


def op_of(sample: str) -> str:
    return sample.partition(" ")[0]


def operator(sample: str) -> Any:
    return getattr(torch.ops.alit_kernels, op_of(sample)).default


def sample(name: str) -> tuple[Any, ...]:
    """Arguments of a sample in the order of the op's schema, without ``implementation``."""
    found = samples()[name]
    *arguments, _ = operator(name)._schema.arguments
    assert {argument.name for argument in arguments} == found.keys()
    return tuple(found[argument.name] for argument in arguments)


SELF_ATTENTION, QUANTIZER = SelfAttention(16, 2), VectorQuantizer(5, 4).eval()
PUBLIC: dict[str, tuple[Callable[..., Any], tuple[Tensor, ...]]] = {
    "add_layer_norm": (
        lambda *tensors: sum(ak.add_layer_norm(*tensors)),
        (leaf(3, 8), leaf(3, 8), leaf(8), leaf(8), leaf(8)),
    ),
    "attention": (lambda q, k, v: ak.attention(q, k, v), tuple(leaf(2, 4, 2, 8) for _ in range(3))),
    "varlen_attention": (
        lambda q, k, v: ak.varlen_attention(q, k, v, OFFSETS, max_length=5),
        tuple(leaf(9, 2, 8) for _ in range(3)),
    ),
    "nearest_codeword": (
        lambda z, c: ak.nearest_codeword(z, c) + 0 * z.sum(),
        (leaf(6, 4), leaf(5, 4)),
    ),
    "codebook_statistics": (
        lambda z: ak.codebook_statistics(torch.arange(6) % 5, z, 5)[1] + 0 * z.sum(),
        (leaf(6, 4),),
    ),
    "codebook_entropy": (
        lambda z, c: sum(ak.codebook_entropy(z, c, temperature=0.5)),
        (leaf(6, 4), leaf(5, 4)),
    ),
    "vector_quantize": (
        lambda z, c: sum(x.to(z.dtype).sum() for x in ak.vector_quantize(z, c)[:5]),
        (leaf(6, 4), leaf(5, 4)),
    ),
    "soft_codebook": (
        lambda x, c: sum(y.sum() for y in ak.soft_codebook(x, c, torch.arange(6) % 5)),
        (leaf(6, 5), leaf(5, 4)),
    ),
    "attention_map": (
        lambda q: (
            ak.attention_map(
                q, q, torch.zeros(2, 9), OFFSETS, queries=range(1, 3), keys=range(2), max_length=5
            ).detach()
            + 0 * q.sum()
        ),
        (leaf(9, 2, 8),),
    ),
    "pack": (lambda x: ak.pack(x, LENGTHS, capacity=9)[0], (leaf(3, 6, 4),)),
    "unpack": (lambda x: ak.unpack(x, OFFSETS, max_length=6), (leaf(9, 4),)),
    "compact": (
        lambda x: ak.compact(x, OFFSETS, torch.arange(9) % 2 == 0, capacity=7)[0],
        (leaf(9, 4),),
    ),
    "append": (lambda x, r: ak.append(x, OFFSETS, r, capacity=15)[0], (leaf(9, 4), leaf(2, 4))),
    "tail_mask": (lambda x, f: ak.tail_mask(x, LENGTHS, f), (leaf(3, 6, 4), leaf(4))),
    "SelfAttention": (lambda x: SELF_ATTENTION(x, offsets=OFFSETS, max_length=5), (leaf(9, 16),)),
    "VectorQuantizer": (lambda z: QUANTIZER(z).loss, (leaf(6, 4),)),
}


def tensors(result: Any) -> list[Tensor]:
    if isinstance(result, Tensor):
        return [result]
    return [x for part in result if part is not None for x in tensors(part)]


def with_gradients(function: Callable[..., Any], *leaves: Tensor) -> Callable[[], list[Tensor]]:
    """Function that returns the results of ``function`` and the gradients of a weighted sum of them."""
    weights: dict[int, Tensor] = {}

    def run() -> list[Tensor]:
        results = tensors(function(*leaves))
        total = torch.zeros((), device=leaves[0].device)
        for i, x in enumerate(results):
            if x.requires_grad:
                if i not in weights:
                    weights[i] = values(*x.shape, seed=1).to(x.device)
                total = total + (x.float() * weights[i]).sum()
        return [*(x.detach() for x in results), *torch.autograd.grad(total, leaves)]

    return run


def runs(device: str) -> dict[str, Callable[[], Iterable[Tensor]]]:
    """Name -> call of a public function, forward and backward, with the sequence lengths ``MANY``."""

    def leaf(*shape: int, seed: int = 0) -> Tensor:
        return values(*shape, seed=seed).to(device).requires_grad_()

    lengths = torch.tensor(MANY, device=device)
    offsets, rows, longest = ak.cumulative_offsets(lengths), sum(MANY), max(MANY)
    q, k, v = (leaf(rows, 2, 64, seed=i) for i in range(3))
    dense = [leaf(2, longest, 2, 64, seed=i) for i in range(3)]
    z, codebook, x = leaf(2048, 12), leaf(16, 12), leaf(rows, 32)
    index = torch.arange(2048, device=device) % 16
    target, keep = torch.arange(512, device=device) % 64, torch.arange(rows, device=device) % 3 > 0
    lse = torch.zeros(2, rows, device=device)
    return {
        "add_layer_norm": with_gradients(
            lambda *tensors: sum(ak.add_layer_norm(*tensors)),
            *(x, leaf(rows, 32, seed=1), *(leaf(32, seed=seed) for seed in range(3))),
        ),
        "attention": with_gradients(lambda *qkv: ak.attention(*qkv), *dense),
        "varlen_attention": with_gradients(
            lambda *qkv: ak.varlen_attention(*qkv, offsets, max_length=longest), q, k, v
        ),
        "scaled_dot_product_attention": with_gradients(
            lambda *qkv: ak.scaled_dot_product_attention(*qkv), *dense
        ),
        "attention_map": lambda: tensors(
            ak.attention_map(
                *(q.detach(), k.detach(), lse, offsets),
                queries=range(16),
                keys=range(8),
                max_length=longest,
            )
        ),
        "nearest_codeword": lambda: [ak.nearest_codeword(z.detach(), codebook.detach())],
        "codebook_statistics": lambda: tensors(ak.codebook_statistics(index, z.detach(), 16)),
        "codebook_entropy": with_gradients(
            lambda z, c: ak.codebook_entropy(z, c, temperature=0.5), z, codebook
        ),
        "vector_quantize": with_gradients(lambda z, c: ak.vector_quantize(z, c), z, codebook),
        "soft_codebook": with_gradients(
            lambda x, c: ak.soft_codebook(x, c, target), leaf(512, 64), leaf(64, 32)
        ),
        "pack": with_gradients(
            lambda x: ak.pack(x, lengths, capacity=rows)[0], leaf(len(MANY), longest, 32)
        ),
        "unpack": with_gradients(lambda x: ak.unpack(x, offsets, max_length=longest), x),
        "compact": with_gradients(lambda x: ak.compact(x, offsets, keep, capacity=rows)[0], x),
        "append": with_gradients(
            lambda x, r: ak.append(x, offsets, r, capacity=rows + 4 * 8)[0], x, leaf(8, 32)
        ),
        "tail_mask": with_gradients(
            lambda x, f: ak.tail_mask(x, lengths, f), leaf(len(MANY), longest, 32), leaf(32)
        ),
        "cumulative_offsets": lambda: [ak.cumulative_offsets(lengths)],
    }
