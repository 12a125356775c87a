"""Updates of moving-average codebooks start from the present weight, however it was set; activation checkpointing."""

from __future__ import annotations

import functools
import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import normalize
from torch.utils.checkpoint import checkpoint

from alit_kernels.nn import VectorQuantizer, checkpointing

pytestmark = pytest.mark.usefixtures("one_thread")


def reference_step(
    state: dict[str, Tensor], vectors: Tensor, index: Tensor, decay: float
) -> dict[str, Tensor]:
    """Reference update of a moving-average codebook, one code after another, in float64: new state."""
    weight = state["embedding.weight"].double().clone()
    size = state["cluster_size"].double().clone()
    for k in range(len(weight)):
        own = vectors.double()[index == k]
        before = size[k].clone()
        size[k] = decay * before + (1 - decay) * len(own)
        if len(own):
            weight[k] = (decay * before * weight[k] + (1 - decay) * own.sum(0)) / size[k]
    return {"embedding.weight": weight, "cluster_size": size, "embed_avg": weight * size[:, None]}


@pytest.mark.parametrize("decay", (0.0, 0.5, 0.99))
@pytest.mark.parametrize("metric", ("euclidean", "cosine"))
def test_updates_are_those_of_the_formula(metric: str, decay: float) -> None:
    module = VectorQuantizer(40, 4, metric=metric, ema_decay=decay)
    for step in range(4):
        before = {name: x.clone() for name, x in module.state_dict().items()}
        z, mask = torch.randn(30, 4), torch.rand(30) > 0.2
        index = module(z, mask).index
        vectors = normalize(z, dim=1) if metric == "cosine" else z
        expected = reference_step(before, vectors[mask], index[mask], decay)
        for name, value in module.state_dict().items():
            torch.testing.assert_close(
                value.double(), expected[name], rtol=1e-5, atol=1e-6, msg=f"{name} {step}"
            )
        unused = module.usage(index, mask).count == 0
        assert unused.any()
        assert torch.equal(module.embedding.weight[unused], before["embedding.weight"][unused])


def in_place(module: VectorQuantizer, weight: Tensor) -> None:
    module.embedding.weight.data.copy_(weight)


def wandering(module: VectorQuantizer) -> None:
    """Train a module on other data, so that its averages move."""
    for _ in range(20):
        module(torch.randn(500, 8) * 3 + 1)


def in_place_later(module: VectorQuantizer, weight: Tensor) -> None:
    wandering(module)
    in_place(module, weight)


def loaded(module: VectorQuantizer, weight: Tensor) -> None:
    wandering(module)
    module.load_state_dict({"embedding.weight": weight})


def clustered(count: int, dim: int) -> Tensor:
    centers = torch.randn(16, dim, generator=torch.Generator().manual_seed(7)) * 3
    return centers[torch.randint(16, (count,))] + 0.3 * torch.randn(count, dim)


@pytest.mark.parametrize(
    "setting", (VectorQuantizer.set_codebook, loaded, in_place, in_place_later)
)
@pytest.mark.parametrize("data", (torch.randn, clustered))
@pytest.mark.parametrize("metric", ("euclidean", "cosine"))
def test_a_codebook_that_was_set_stays_in_use(
    metric: str, data: Callable[..., Tensor], setting: Callable[..., None]
) -> None:
    """At least 90 % of the used codes of 256 stay in use after 100 steps of 128 vectors."""
    module = VectorQuantizer(256, 8, metric=metric, ema_decay=0.99)
    setting(module, data(256, 8))
    many, used = data(10_000, 8), []
    for steps in (0, 100):
        for _ in range(steps):
            module(data(128, 8))
        used.append(float(module.usage(module.eval()(many)).fraction))
        module.train()
    assert used[0] > 0.95 and used[1] >= 0.9 * used[0], used
    assert bool(module.embedding.weight.isfinite().all())


@pytest.mark.parametrize("threshold", (0.0, 0.2))
@pytest.mark.parametrize("ema_decay", (None, 0.9))
def test_the_three_agree(ema_decay: float | None, threshold: float) -> None:
    """embed_avg = weight * cluster_size after set_codebook, loading, and steps with restarts."""
    module = VectorQuantizer(16, 4, ema_decay=ema_decay, dead_code_threshold=threshold)
    weight = torch.randn(16, 4)

    def check() -> None:
        if ema_decay is not None:
            average = module.embedding.weight * module.cluster_size[:, None]
            torch.testing.assert_close(module.embed_avg, average)

    for setting in (module.set_codebook, lambda w: module.load_state_dict({"embedding.weight": w})):
        setting(weight)
        assert torch.equal(module.embedding.weight, weight)
        if module._counts:
            assert bool((module.cluster_size == 1).all())
        check()
        for _ in range(5):
            module(torch.randn(20, 4))
            check()


def test_old_state_dicts_load_as_they_are() -> None:
    module, other = (VectorQuantizer(16, 4, ema_decay=0.9) for _ in range(2))
    module(torch.randn(50, 4))
    state = {name: x + 0.5 for name, x in module.state_dict().items()}
    other.load_state_dict(state)
    for name, value in other.state_dict().items():
        assert torch.equal(value, state[name]), name
    assert list(dict(other.named_parameters())) == []
    del state["embedding.weight"]
    with pytest.raises(RuntimeError, match=r"Missing key.*embedding\.weight"):
        other.load_state_dict(state)


def test_a_weight_alone_loads_within_a_model() -> None:
    model = nn.ModuleDict({"quantizer": VectorQuantizer(16, 4, ema_decay=0.9)})
    weight = {"quantizer.embedding.weight": torch.randn(16, 4)}
    model.load_state_dict(weight)
    assert list(weight) == ["quantizer.embedding.weight"]  # as it was
    assert torch.equal(model["quantizer"].embed_avg, weight["quantizer.embedding.weight"])


@pytest.mark.parametrize(
    ("weight", "error", "expected"),
    [
        (torch.zeros(16, 5), ValueError, r"weight: expected shape \(16, 4\), got"),
        (torch.zeros(16, 4, dtype=torch.int32), TypeError, "weight: expected dtype float32"),
        (torch.full((16, 4), torch.nan), ValueError, "weight: expected finite values"),
        ([[0.0] * 4] * 16, TypeError, "weight: expected a tensor, got list"),
    ],
)
def test_set_codebook_is_checked(weight: Any, error: type[Exception], expected: str) -> None:
    with pytest.raises(error, match=expected):
        VectorQuantizer(16, 4, ema_decay=0.9).set_codebook(weight)


KINDS: dict[str, dict[str, Any]] = {
    "averages": {"ema_decay": 0.5},
    "averages, all rewritten": {"ema_decay": 0.5, "ema_rewrites_all": True},
    "averages and restarts": {"ema_decay": 0.5, "dead_code_threshold": 0.3},
    "learned with restarts": {"dead_code_threshold": 0.3},
    "learned": {},
}
Checkpoint = Callable[..., Tensor]
CHECKPOINTS: dict[str, Checkpoint] = {
    "not reentrant": functools.partial(checkpoint, use_reentrant=False),
    "reentrant": functools.partial(checkpoint, use_reentrant=True),
    "nested": lambda function, x: checkpoint(
        lambda y: checkpoint(function, y * 1, use_reentrant=False), x, use_reentrant=False
    ),
}


class Block(nn.Module):
    """Block of linear layer, quantizer and dropout, called ``calls`` times; every part affects the gradients."""

    def __init__(self, calls: int, **options: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.quantizer = VectorQuantizer(16, 4, **options)
        self.quantizer.set_codebook(0.5 * torch.randn(16, 4))
        self.linear, self.dropout, self.calls = nn.Linear(4, 4), nn.Dropout(0.5), calls

    def forward(self, x: Tensor) -> Tensor:
        loss = x.new_zeros(())
        for _ in range(self.calls):
            result = self.quantizer(self.linear(x))
            x = self.dropout(result.quantized * torch.arange(1.0, 5))
            loss = loss + result.loss
        return x.square().mean() + loss


def trained(block: Block, forwards: int, run: Checkpoint, steps: int = 2) -> dict[str, Tensor]:
    """Gradients of each step and the state after it, several forwards before each backward."""
    found, z = {}, torch.randn(steps, forwards, 40, 4, generator=torch.Generator().manual_seed(1))
    torch.manual_seed(2)
    for step, parts in enumerate(z.requires_grad_()):
        block.zero_grad()
        sum(run(block, part) for part in parts).backward()
        found |= {f"{step} {name}": p.grad for name, p in block.named_parameters()}
        found |= {f"{step} {name}": x.clone() for name, x in block.state_dict().items()}
    return {**found, "z": z.grad}


@pytest.mark.filterwarnings("ignore:torch.utils.checkpoint")
@pytest.mark.parametrize(("calls", "forwards"), ((1, 1), (1, 3), (3, 1), (2, 2)))
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("way", CHECKPOINTS)
def test_checkpointing_changes_nothing(way: str, kind: str, calls: int, forwards: int) -> None:
    """With checkpointing each forward updates once; recomputation uses the first run's codebook and random numbers."""
    plain = trained(Block(calls, **KINDS[kind]), forwards, lambda f, x: f(x))
    again = trained(Block(calls, **KINDS[kind]), forwards, CHECKPOINTS[way])
    for name, value in plain.items():
        torch.testing.assert_close(again[name], value, rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize("way", CHECKPOINTS)
def test_checkpointing_in_the_order_of_a_pipeline(way: str) -> None:
    """Checkpointing is right with forwards between backwards, and with two backwards through one graph."""
    found = []
    for run in (lambda f, x: f(x), CHECKPOINTS[way]):
        block, z = Block(1, ema_decay=0.5), torch.randn(3, 40, 4, requires_grad=True)
        torch.manual_seed(3)
        first, second = run(block, z[0]), run(block, z[1])
        first.backward(retain_graph=way != "reentrant")
        third = run(block, z[2])
        if way != "reentrant":
            first.backward()
        (second + third).backward()
        found.append((z.grad.clone(), block.linear.weight.grad, block.quantizer.embedding.weight))
        torch.manual_seed(0)
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(other, one)


@pytest.mark.parametrize("way", CHECKPOINTS)
def test_a_checkpoint_without_gradients_updates_nothing(way: str) -> None:
    block = Block(1, ema_decay=0.5)
    before = block.quantizer.embedding.weight.clone()
    with torch.no_grad():
        CHECKPOINTS[way](block, torch.randn(9, 4, requires_grad=True))
    assert torch.equal(block.quantizer.embedding.weight, before)


@pytest.mark.parametrize("way", ("not reentrant", "nested"))
def test_a_call_without_gradients_within_a_checkpoint(way: str) -> None:
    """A call without gradients within a checkpoint updates nothing, in the first run and recomputed."""
    module, z = VectorQuantizer(16, 4, ema_decay=0.5), torch.randn(9, 4, requires_grad=True)

    def block(x: Tensor) -> Tensor:
        with torch.no_grad():
            quantized = module(x).quantized
        return (quantized * x).square().sum()

    before = module.embedding.weight.clone()
    CHECKPOINTS[way](block, z).backward()
    assert torch.equal(module.embedding.weight, before)
    (expected,) = torch.autograd.grad(block(z), z)
    torch.testing.assert_close(z.grad, expected)


def test_reentrant_within_reentrant_is_refused() -> None:
    module, z = VectorQuantizer(16, 4, ema_decay=0.5), torch.randn(9, 4, requires_grad=True)
    run = CHECKPOINTS["reentrant"]
    loss = run(lambda x: run(lambda y: module(y).loss, x * 1), z)
    with pytest.raises(RuntimeError, match=r"VectorQuantizer: .*torch\.utils\.checkpoint"):
        loss.backward()


def test_the_module_alone_within_a_checkpoint() -> None:
    """The module itself can be checkpointed: its result, tensors and None for the mask, passes through."""
    found = []
    for run in (lambda f, x: f(x), *CHECKPOINTS.values()):
        torch.manual_seed(0)
        module, z = VectorQuantizer(16, 4, ema_decay=0.5), torch.randn(9, 4, requires_grad=True)
        quantized, index, loss, *_, mask = run(module, z)
        assert mask is None and index.dtype == torch.int64
        (quantized.square().sum() + loss).backward()
        found.append((z.grad, module.embedding.weight))
    for other in found[1:]:
        torch.testing.assert_close(other, found[0])


def test_recorded_codebooks_go_with_the_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    block, kept = Block(1, ema_decay=0.5), []
    original = checkpointing.record

    def noting(region: Any, module: nn.Module, tensor: Tensor) -> None:
        kept.append(weakref.ref(tensor))
        original(region, module, tensor)

    monkeypatch.setattr(checkpointing, "record", noting)
    for run in CHECKPOINTS.values():
        run(block, torch.randn(9, 4, requires_grad=True)).backward()
    gc.collect()
    assert len(kept) == len(CHECKPOINTS) and all(tensor() is None for tensor in kept)


def test_recomputations_that_are_not_known_are_refused() -> None:
    """Recomputation by another checkpoint implementation, or in a hook, raises instead of updating twice."""
    z = torch.randn(9, 4, requires_grad=True)

    class Another(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, block: Block, x: Tensor) -> Tensor:
            ctx.block = block
            ctx.save_for_backward(x)
            return block(x)

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor]:
            x = ctx.saved_tensors[0].detach().requires_grad_()
            with torch.enable_grad():
                ctx.block(x).backward(grad)
            return None, x.grad

    block = Block(1, ema_decay=0.5)
    hooked = z * 1
    hooked.register_hook(lambda grad: block(z.detach().requires_grad_()).expand_as(grad))
    before = block.quantizer.embedding.weight.clone()
    for loss in (Another.apply(block, z), hooked.sum()):
        with (
            pytest.raises(RuntimeError, match=r"VectorQuantizer: .*torch\.utils\.checkpoint"),
            torch.enable_grad(),
        ):
            loss.backward(create_graph=True)
    block.eval()
    Another.apply(block, z).backward()
    assert torch.equal(block.quantizer.embedding.weight, before)


@pytest.mark.parametrize("way", CHECKPOINTS)
def test_a_compiled_module_is_not_recomputed(way: str) -> None:
    """A compiled module raises in a checkpoint's recomputation, where it would update twice."""
    module = VectorQuantizer(16, 4, ema_decay=0.5)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    z = torch.randn(9, 4, requires_grad=True)
    compiled(z).loss.backward()
    loss = CHECKPOINTS[way](lambda x: compiled(x * 1).loss, z)
    with pytest.raises(
        RuntimeError, match=r"VectorQuantizer: compiled, .*torch\.utils\.checkpoint"
    ):
        loss.backward()


def test_a_checkpoint_within_compiled_code_is_refused() -> None:
    """A checkpoint within compiled code raises, as it would recompute with the updated codebook; not in evaluation."""
    module = VectorQuantizer(16, 4, ema_decay=0.5)
    z = torch.randn(9, 4, requires_grad=True)

    def step(x: Tensor) -> Tensor:
        return checkpoint(lambda y: module(y * 1).loss, x, use_reentrant=False)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    with pytest.raises(
        RuntimeError, match=r"VectorQuantizer: compiled within torch\.utils\.checkpoint"
    ):
        compiled(z)
    module.eval()
    (ours,) = torch.autograd.grad(compiled(z), z)
    (expected,) = torch.autograd.grad(module(z).loss, z)
    torch.testing.assert_close(ours, expected)


def test_state_is_buffers_under_the_published_names() -> None:
    names = ["embed_avg", "cluster_size", "embedding.weight"]
    module = VectorQuantizer(4, 2, ema_decay=0.9)
    assert list(module.state_dict()) == names == [name for name, _ in module.named_buffers()]
    assert list(VectorQuantizer(4, 2).state_dict()) == ["embedding.weight"]
