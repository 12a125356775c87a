"""Quantizers under FSDP2: averages as without it, state dicts, and refusal of options that would lose state."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint import state_dict as dcp
from torch.distributed.fsdp import fully_shard

from alit_kernels.nn import VectorQuantizer
from tests.helpers.forks import spawn

STEPS = 3


class Model(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)
        self.q = VectorQuantizer(16, 8, **options)
        self.q.set_codebook(torch.randn(16, 8))

    def forward(self, x: Tensor) -> Tensor:
        result = self.q(self.a(x))
        return self.b(result.quantized).square().mean() + result.loss


def batches() -> Tensor:
    return torch.randn(STEPS, 12, 8, generator=torch.Generator().manual_seed(1))


def train(model: Model, rank: int = 0, processes: int = 1) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for batch in batches():
        model(batch[rank::processes]).backward()
        optimizer.step()
        optimizer.zero_grad()


OPTIONS: dict[str, dict[str, Any]] = {"averages": {"ema_decay": 0.5}, "learned": {}}


def sharded(rank: int, processes: int, path: str) -> None:
    store = f"file://{path}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=processes)
    for name, options in OPTIONS.items():
        check_sharded(rank, processes, f"{path}/{name}", options)
    dist.destroy_process_group()


def check_sharded(rank: int, processes: int, path: str, options: dict[str, Any]) -> None:
    """Train on this process's share; the first process writes the whole state; check that it loads again."""
    model = Model(**options)
    for part in (model.b, model):
        fully_shard(part)
    train(model, rank, processes)
    plain = {k: x for k, x in model.state_dict().items() if isinstance(x, Tensor)}
    assert plain.keys() == Model(**options).state_dict().keys()
    whole = dcp.StateDictOptions(full_state_dict=True)
    state = dcp.get_model_state_dict(model, options=whole)
    if rank == 0:
        torch.save(state, path)
    again = Model(**options)
    fully_shard(again)
    again.load_state_dict(plain)
    dcp.set_model_state_dict(again, state if rank == 0 else {}, options=broadcasting())
    for name, value in again.state_dict().items():
        assert torch.equal(local(value), local(plain[name])), name
    codes = model.q.codes(torch.arange(16))
    torch.testing.assert_close(codes, local(codes))
    model(batches()[0])  # training continues


def broadcasting() -> dcp.StateDictOptions:
    return dcp.StateDictOptions(
        full_state_dict=True, broadcast_from_rank0=dist.get_world_size() > 1
    )


def local(tensor: Any) -> Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


@pytest.mark.parametrize("processes", (1, 2))
def test_a_sharded_model_learns_as_a_whole_one(processes: int, tmp_path: Path) -> None:
    spawn(sharded, processes, str(tmp_path))
    for name, options in OPTIONS.items():
        found, model = torch.load(tmp_path / name), Model(**options)
        before = model.q.embedding.weight.detach().clone()
        train(model)
        assert not torch.equal(before, model.q.embedding.weight)
        for key, value in model.state_dict().items():
            torch.testing.assert_close(found[key], value, rtol=1e-4, atol=1e-5, msg=f"{name} {key}")


def test_restarts_of_a_sharded_codebook_are_refused(tmp_path: Path) -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        with pytest.raises(TypeError, match="fully_shard: a learned codebook with dead_code"):
            fully_shard(Model(dead_code_threshold=0.5))
        learned, averaged = Model(dead_code_threshold=0.5), Model(**OPTIONS["averages"])
        averaged.q.dead_code_threshold = 0.5
        fully_shard(learned, ignored_params={learned.q.embedding.weight})
        fully_shard(averaged)
        for model in (learned, averaged):
            model.q.cluster_size.zero_()
            before = model.q.embedding.weight.detach().clone()
            model(batches()[0])
            assert int((model.q.embedding.weight != before).any(1).sum()) > 4  # but few are chosen
        learned = Model()
        fully_shard(learned)
        with pytest.raises(
            TypeError, match=r"embedding\.weight: expected a dense tensor, got a DT"
        ):
            learned.q.set_codebook(torch.randn(16, 8))
    finally:
        dist.destroy_process_group()
