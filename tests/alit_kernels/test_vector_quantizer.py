"""The VectorQuantizer module: moving averages, restarts, k-means, layouts, processes."""

from __future__ import annotations

import copy
import math
import pickle
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from alit_kernels import VectorQuantized, codebook_statistics, nearest_codeword, vector_quantize
from alit_kernels.nn import VectorQuantizer
from tests.helpers.forks import spawn


def test_module_moving_average_backward() -> None:
    """The codebook is updated in place after the loss, but the backward uses that of the forward."""
    module = VectorQuantizer(8, 4, metric="cosine", ema_decay=0.9)
    z = torch.randn(20, 4, requires_grad=True)
    before = module.embedding.weight.clone()
    first, second = module(z), module(z)
    (first.loss + second.loss).backward()
    assert not torch.equal(before, module.embedding.weight)
    assert z.grad.isfinite().all() and module.embedding.weight.grad is None
    torch.testing.assert_close(
        first.loss, vector_quantize(z, before, metric="cosine").commitment_loss
    )


def test_module_state_and_evaluation() -> None:
    module = VectorQuantizer(8, 4, metric="cosine", ema_decay=0.9).eval()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    result = module(torch.randn(2, 3, 4))
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    torch.testing.assert_close(module.codes(result.index), result.quantized)


@pytest.mark.parametrize("threshold", (0.0, 0.5))
@pytest.mark.parametrize("rows", (0, 5))
def test_first_batch_without_vectors(rows: int, threshold: float) -> None:
    """A first batch that is empty or fully masked moves no code and replaces none."""
    module = VectorQuantizer(8, 4, ema_decay=0.9, dead_code_threshold=threshold)
    before = module.embedding.weight.clone()
    module(torch.randn(rows, 4), torch.zeros(rows, dtype=torch.bool) if rows else None)
    assert torch.equal(module.embedding.weight, before)


@pytest.mark.parametrize("without", (torch.no_grad, torch.inference_mode))
def test_module_learns_nothing_without_gradients(without: Any) -> None:
    """Without gradients neither averages nor restarts happen; ``update_codebook`` updates all the same."""
    module = VectorQuantizer(8, 4, ema_decay=0.9, dead_code_threshold=0.5)
    before = {name: x.clone() for name, x in module.state_dict().items()}
    with without():
        result = module(torch.randn(5, 4))
    assert all(torch.equal(x, before[name]) for name, x in module.state_dict().items())
    with torch.no_grad():
        module.update_codebook(torch.randn(5, 4), result)
    assert module.cluster_size.sum() > 0


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
@pytest.mark.parametrize("channel_dim", (-1, 1))
@pytest.mark.parametrize("metric", ("euclidean", "cosine"))
def test_narrow_input_is_computed_in_the_type_of_the_codebook(
    metric: str, channel_dim: int, dtype: torch.dtype
) -> None:
    module = VectorQuantizer(8, 4, metric=metric, ema_decay=0.9, channel_dim=channel_dim)
    z = torch.randn(2, 4, 3, 4).to(dtype).requires_grad_()
    other, wide = copy.deepcopy(module), z.detach().float().requires_grad_()
    result, expected = module(z), other(wide)
    for ours, theirs in zip(result[:5], expected[:5], strict=True):
        assert torch.equal(ours, theirs)
    for r in (result, expected):
        (r.quantized.square().sum() + r.loss).backward()
    assert z.grad.dtype == dtype and torch.equal(z.grad, wide.grad.to(dtype))
    assert torch.equal(module.embedding.weight, other.embedding.weight)
    narrow = module.to(dtype).eval()
    result = narrow(z)
    assert result.quantized.dtype == dtype
    assert torch.equal(narrow.codes(result.index), result.quantized)


def test_layout_with_channels_second() -> None:
    module = VectorQuantizer(8, 4, channel_dim=1)
    z, mask = torch.randn(2, 4, 3, 5, requires_grad=True), torch.rand(2, 3, 5) > 0.3
    result = module(z, mask)
    rows = vector_quantize(z.movedim(1, -1), module.embedding.weight, mask=mask)
    assert result.quantized.shape == z.shape and result.index.shape == (2, 3, 5)
    assert torch.equal(result.quantized.movedim(1, -1), rows.quantized)
    assert torch.equal(result.index, rows.index) and torch.equal(result.loss, rows.loss)
    codes = module.codes(result.index)
    assert torch.equal(codes * mask[:, None], result.quantized)
    result.quantized.sum().backward()
    assert torch.equal(z.grad, mask[:, None].expand_as(z).float())


@pytest.mark.parametrize(
    ("options", "z", "error", "message"),
    [
        ({"ema_decay": 1.5}, None, ValueError, "ema_decay"),
        ({"metric": "dot"}, None, ValueError, "metric"),
        ({"channel_dim": 2}, None, ValueError, "channel_dim: expected -1 or 1, got 2"),
        ({"process_group": "all"}, None, TypeError, "process_group: expected a group or None, got"),
        ({}, torch.randn(2, 4, 3), ValueError, r"z: expected shape \(\.\.\., 4\), got"),
        ({}, torch.randn(3, 4, dtype=torch.float64), TypeError, "codebook: expected dtype"),
    ],
)
def test_wrong_arguments(
    options: dict[str, Any], z: Tensor, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        VectorQuantizer(8, 4, **options)(z)


def test_usage() -> None:
    module = VectorQuantizer(4, 2)
    index = torch.tensor([[0, 0, 1], [1, 3, 3]])
    usage = module.usage(index)
    assert usage.count.tolist() == [2, 2, 0, 2] and usage.fraction == 0.75
    assert math.isclose(usage.perplexity, 3, rel_tol=1e-6)
    masked = module.usage(index, index == 3)
    assert masked.count.tolist() == [0, 0, 0, 2] and masked.perplexity == 1
    both = module.usage(VectorQuantized(*[index] * 5, mask=index > 0), index < 3)
    assert both.count.tolist() == [0, 2, 0, 0]
    nothing = module.usage(index[:0])
    assert nothing.fraction == 0 and nothing.perplexity == 1


@pytest.mark.parametrize("channel_dim", (-1, 1))
def test_a_result_carries_its_mask(channel_dim: int) -> None:
    """A result carries its mask, which usage and updates respect; masked positions have a valid index."""
    z = torch.randn(2, 3, 5, 4).movedim(-1, channel_dim)
    mask = torch.rand(2, 3, 5) > 0.5
    z.movedim(channel_dim, -1)[~mask] = torch.nan
    given = mask[:, None] if channel_dim == 1 else mask
    module = VectorQuantizer(8, 4, ema_decay=0.9, channel_dim=channel_dim)
    other = copy.deepcopy(module).eval()
    result = module(z, given)
    assert torch.equal(result.mask, mask)
    assert int(result.index.min()) >= 0 and int(result.index.max()) < 8
    for usage in (module.usage(result), module.usage(result.index, given)):
        assert torch.equal(usage.count, result.index[mask].bincount(minlength=8).float())
    other.update_codebook(z, other(z, given))
    for name, value in module.state_dict().items():
        torch.testing.assert_close(other.state_dict()[name], value)
    assert module(torch.randn(2, 3, 5, 4).movedim(-1, channel_dim)).mask is None


@pytest.mark.parametrize("metric", ("euclidean", "cosine"))
def test_initialize_is_k_means(metric: str) -> None:
    """``initialize`` finds well separated clusters from any state, without masked vectors."""
    corners = 10 * torch.eye(4)
    z = corners.repeat(50, 1) + 0.01 * torch.randn(200, 4)
    z = torch.cat([z, torch.full((7, 4), torch.nan)])
    mask = torch.arange(207) < 200
    best = math.inf
    for seed in range(8):
        module = VectorQuantizer(4, 4, metric=metric, ema_decay=0.9)
        generator = torch.Generator().manual_seed(seed)
        module.initialize(z, mask, generator=generator)
        again = VectorQuantizer(4, 4, metric=metric, ema_decay=0.9)
        again.initialize(z, mask, generator=generator.manual_seed(seed))
        assert torch.equal(module.embedding.weight, again.embedding.weight)
        assert module.cluster_size.sum() == 200
        best = min(best, float(module.eval()(z, mask).commitment_loss))
    assert best < 1e-3
    # Another step of Lloyd's algorithm changes nothing.
    unit = torch.nn.functional.normalize if metric == "cosine" else torch.clone
    vectors, weight = unit(z[:200]), module.embedding.weight
    count, total = codebook_statistics(nearest_codeword(vectors, weight), vectors, 4)
    torch.testing.assert_close(unit(total / count[:, None])[count > 0], weight[count > 0])


def test_initialize_with_fewer_vectors_than_codes() -> None:
    module = VectorQuantizer(8, 4)
    z = torch.randn(3, 4)
    module.initialize(z)
    assert module.eval()(z).codebook_loss < 1e-12
    with pytest.raises(ValueError, match="z: expected at least 1 vector"):
        module.initialize(z, torch.zeros(3, dtype=torch.bool))


@pytest.mark.parametrize("ema_decay", (None, 0.9))
@pytest.mark.parametrize("masked", (False, True))
def test_dead_codes_are_replaced(masked: bool, ema_decay: float | None) -> None:
    module = VectorQuantizer(64, 4, ema_decay=ema_decay, dead_code_threshold=0.1)
    with torch.no_grad():
        module.embedding.weight.fill_(100.0)  # collapsed: the first of the equal codes gets all
    z = torch.randn(500, 4)
    mask = torch.rand(500) > 0.5 if masked else None
    if mask is not None:
        z[~mask] = torch.nan
    first = module(z, mask)
    assert not first.index.any()
    weight = module.embedding.weight.detach()
    vectors = z if mask is None else z[mask]
    among = (weight[1:, None] == vectors[None]).all(-1).any(1)
    assert bool(among.all()), "a replaced code must be a vector that took part"
    assert int(module.usage(module(z, mask).index, mask).count.count_nonzero()) > 30
    before = module.embedding.weight.clone()
    module.eval()(z, mask)
    assert torch.equal(module.embedding.weight, before)


def test_state_is_float32_under_autocast() -> None:
    module = VectorQuantizer(8, 4, ema_decay=0.9, dead_code_threshold=0.1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = module(torch.randn(50, 4).bfloat16())
    assert result.quantized.dtype == torch.float32
    assert all(value.dtype == torch.float32 for value in module.state_dict().values())


@pytest.mark.parametrize("ema_decay", (None, 0.9))
def test_training_step_compiles_without_graph_break(ema_decay: float | None) -> None:
    module = VectorQuantizer(8, 4, ema_decay=ema_decay, dead_code_threshold=0.05, metric="cosine")
    compiled_module = copy.deepcopy(module)
    compiled = torch.compile(compiled_module, fullgraph=True, backend="aot_eager")
    for step in range(3):
        z, mask = torch.randn(20 + 3 * step, 4), torch.rand(20 + 3 * step) > 0.2
        losses = []
        for function in (module, compiled):
            torch.manual_seed(step)
            result = function(z, mask)
            if ema_decay is None:
                result.loss.backward()
            losses.append(result.loss.detach())
        assert torch.equal(*losses)
    for name, value in module.state_dict().items():
        torch.testing.assert_close(value, compiled_module.state_dict()[name])


def test_a_copy_has_the_same_process_group(tmp_path: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        group = dist.new_group([0])
        module = VectorQuantizer(8, 4, ema_decay=0.9, process_group=group)
        module(torch.randn(5, 4))
        for same in (copy.deepcopy(module), copy.copy(module), copy.deepcopy([module])[0]):
            assert same.process_group is group
            same(torch.randn(5, 4))
        read = pickle.loads(pickle.dumps(module))
        assert read.process_group is None  # the default group
        for name, value in module.state_dict().items():
            assert torch.equal(read.state_dict()[name], value)
        read(torch.randn(5, 4))
    finally:
        dist.destroy_process_group()


def test_moving_averages_stay_in_float32() -> None:
    module = VectorQuantizer(8, 4, ema_decay=0.9).bfloat16()
    with pytest.raises(TypeError, match=r"update_codebook: .* cast to bfloat16; use autocast"):
        module(torch.randn(5, 4, dtype=torch.bfloat16))
    assert module.eval()(torch.randn(5, 4, dtype=torch.bfloat16)).index.shape == (5,)


def train_on_a_share(rank: int, processes: int, path: str, compiled: bool) -> None:
    """Take two steps on this process's share of the vectors, and write the state of every process."""
    dist.init_process_group(
        "gloo", init_method=f"file://{path}/store", rank=rank, world_size=processes
    )
    torch.manual_seed(0)
    module = VectorQuantizer(8, 4, ema_decay=0.9, dead_code_threshold=0.05)
    step = torch.compile(module, fullgraph=True, backend="aot_eager") if compiled else module
    torch.manual_seed(1)
    z = torch.randn(3, 40, 4)
    module.initialize(z[0, rank::processes], iterations=2)
    torch.manual_seed(rank)
    for batch in z[1:]:
        step(batch[rank::processes])
        assert compiled or module._pending is not None, "the statistics did not travel"
    torch.save(module.state_dict(), f"{path}/state{rank}")
    module(z[1])
    loaded = {name: value + 1 for name, value in torch.load(f"{path}/state{rank}").items()}
    module.load_state_dict(loaded)
    for name, value in module.state_dict().items():
        assert torch.equal(value, loaded[name]), "statistics of the state before were added"
    time.sleep(0.5)  # gloo's thread needs the GIL, which the next line holds, to drop its last work
    dist.destroy_process_group()


@pytest.mark.parametrize("compiled", (False, True))
def test_processes_share_their_statistics(compiled: bool, tmp_path: Path) -> None:
    """Both processes end with the same codebook, that of one process with all vectors."""
    spawn(train_on_a_share, 2, str(tmp_path), compiled)
    first, second = (torch.load(tmp_path / f"state{rank}") for rank in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    torch.manual_seed(0)
    alone = VectorQuantizer(8, 4, ema_decay=0.9)
    torch.manual_seed(1)
    z = torch.randn(3, 40, 4)
    # The same initialization as drawn by the first process; no code was replaced in this short run.
    order = torch.randperm(20)
    centers = z[0, 0::2][order[:8]]
    for _ in range(2):
        count, total = codebook_statistics(nearest_codeword(z[0], centers), z[0], 8)
        centers = torch.where(count[:, None] > 0, total / count.clamp(min=1)[:, None], centers)
    start = {"embedding.weight": centers, "cluster_size": count}
    alone.load_state_dict({**start, "embed_avg": centers * count[:, None]})
    for batch in z[1:]:
        alone(batch)
    for name, value in alone.state_dict().items():
        torch.testing.assert_close(first[name], value)


def legacy_loss(z: Tensor, codebook: Tensor, index: Tensor, beta: float) -> Tensor:
    """taming's legacy loss, with beta on the codebook term."""
    q = codebook[index]
    return (q.detach() - z).square().mean() + beta * (q - z.detach()).square().mean()


def test_the_legacy_loss_is_a_choice_of_weights() -> None:
    module = VectorQuantizer(8, 4, commitment=1.0, codebook_weight=0.25)
    z = torch.randn(20, 4, requires_grad=True)
    leaves = (z, module.embedding.weight)
    result = module(z)
    expected = legacy_loss(*leaves, result.index, beta=0.25)
    torch.testing.assert_close(result.loss, expected)
    for found, wanted in zip(
        torch.autograd.grad(result.loss, leaves), torch.autograd.grad(expected, leaves), strict=True
    ):
        torch.testing.assert_close(found, wanted)
