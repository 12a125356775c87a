"""Stage 1: the loss by its formula, one step, compilation and recomputation."""

from __future__ import annotations

import shutil
from typing import Any

import pytest
import torch
import torch.utils.cpp_extension

from alit import stage1_loss
from alit.training import train
from alit.training.optimization import MovingAverage, Optimizer, schedule
from alit.training.processes import Processes
from alit.training.stage import iterations_of, precision, recomputed
from alit.training.stage1 import Stage1
from alit.training.trainer import STAGES
from tests.helpers.models import BASES, VARIANTS, images, model
from tests.helpers.runs import ALONE, Synchronizations, config, gradients

pytestmark = pytest.mark.usefixtures("one_thread")


def test_loss_is_its_formula() -> None:
    m, x = model("vqgan"), images()
    with torch.no_grad():
        loss = stage1_loss(m, x, weights=(2.5, 2.0))
        total = torch.zeros(())
        for iteration, weight in zip(m.rollout(x), (2.5, 2.0, 1.0, 1.0), strict=True):
            logits, target = iteration.prediction.decoded_BNV, iteration.base.target_BN
            nll = torch.nn.functional.cross_entropy(logits.flatten(0, 1), target.flatten())
            code = (
                (logits.softmax(-1) @ m.base_tokenizer.codebook - iteration.base.code_BNC)
                .square()
                .mean()
            )
            total += weight * nll + code + iteration.bottleneck.quantized.loss
    torch.testing.assert_close(loss.total, total)


def test_rollout_ends_with_the_last_iteration_needed() -> None:
    m, calls = model(), []
    m.encoder.register_forward_hook(lambda *_: calls.append(1))
    loss = stage1_loss(m, images(), at=[1])
    assert len(calls) == 2 and loss.iterations.keys() == {1}
    with pytest.raises(ValueError, match="at: expected at least one"):
        stage1_loss(m, images(), at=[])


@pytest.mark.parametrize("at", [None, [2], [0, 3]])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("base", BASES)
def test_one_run_of_the_decoder_for_all_iterations(
    base: str, variant: str, at: list[int] | None
) -> None:
    """One decoder run for all iterations gives the loss, terms and gradients of one run in each iteration."""
    m, x, calls, results = model(base, bottleneck=variant).train(), images(), [], []
    m.base_tokenizer.requires_grad_(False)
    m.decoder.ln_post.register_forward_hook(lambda *_: calls.append(1))
    for together in (True, False):
        calls.clear()
        tokens = m.base_tokenizer.encode(x)
        loss = stage1_loss(m, x, at=at, base=tokens, together=together, through_time=at is None)
        assert len(calls) == (1 if together else len(at or range(4)))
        m.zero_grad()
        loss.total.backward()
        terms = [value for term in loss.iterations.values() for value in term if value is not None]
        gradients = [p.grad for p in m.parameters() if p.grad is not None]
        results.append([loss.total.detach(), *(t.detach() for t in terms), *gradients])
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)


def test_halting_needs_each_prediction_at_once() -> None:
    m = model("vqgan", halting="mask")
    with pytest.raises(ValueError, match="predict_later: halting 'mask' needs predictions"):
        m.rollout(images(), predict_later=True)
    calls: list[int] = []
    m.decoder.ln_post.register_forward_hook(lambda *_: calls.append(1))
    stage1_loss(m, images(), together=True)
    assert len(calls) == 4


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("base", BASES)
def test_bfloat16_autocast(base: str, variant: str) -> None:
    m, x = model(base, bottleneck=variant).train(), images()
    m.base_tokenizer.requires_grad_(False)
    exact = stage1_loss(m, x, generator=torch.Generator().manual_seed(0)).total
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = stage1_loss(m, x, generator=torch.Generator().manual_seed(0)).total
    loss.backward()
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, exact, rtol=0.1, atol=0.0)
    assert all(p.grad is None or p.grad.isfinite().all() for p in m.parameters())


def test_training_lowers_the_loss_and_leaves_the_base_alone() -> None:
    m, x = model("vqgan", bottleneck="continuous"), images(4)
    before = {name: p.clone() for name, p in m.base_tokenizer.named_parameters()}
    errors: list[float] = []

    def on_log(record: dict[str, float]) -> None:
        assert record["step"] == len(errors) + 1
        errors.append(next(x for name, x in record.items() if name.startswith("code_")))

    fields: dict[str, Any] = {"steps": 60, "iterations_per_step": 1, "first_only": 0.7}
    result = train(config(flip=False, ema=0.0, **fields), model=m, images=x, on_log=on_log)
    assert result.model is m and result.steps == len(errors) == 60
    assert sum(errors[-10:]) < 0.8 * sum(errors[:10])
    assert not m.training
    assert all(p.requires_grad for p in m.base_tokenizer.parameters())
    assert all(torch.equal(p, before[name]) for name, p in m.base_tokenizer.named_parameters())


def test_accumulated_parts_give_the_batch_gradient() -> None:
    x = images(4)
    whole = gradients(Stage1(model("vqgan"), config(), ALONE), [x])["model"]
    parts = gradients(Stage1(model("vqgan"), config(), ALONE), [x[:2], x[2:]])["model"]
    assert whole.keys() == parts.keys()
    for name, gradient in whole.items():
        torch.testing.assert_close(parts[name], gradient, rtol=1e-4, atol=1e-6, msg=name)


def test_recomputed_activations_give_the_same_gradient() -> None:
    x, calls = images(2), []
    plain = gradients(Stage1(model("vqgan"), config(), ALONE), [x])["model"]
    m = model("vqgan")
    m.encoder.transformer[0].register_forward_hook(lambda *_: calls.append(1))
    with recomputed(m, "ddp"):
        again = gradients(Stage1(m, config(), ALONE), [x])["model"]
    assert len(calls) == 2 * m.config.iterations
    assert "forward" not in vars(m.encoder)
    assert all(torch.equal(again[name], gradient) for name, gradient in plain.items())


@pytest.mark.parametrize("together", [False, True])
def test_compiled_blocks_have_no_graph_break(together: bool) -> None:
    """``fullgraph`` raises at a graph break; one backend graph serves all lengths."""
    compiled = []

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        compiled.append(1)
        return graph.forward

    m, x = model(), images(2)
    plain = stage1_loss(m, x, together=together).total
    for block in (*m.encoder.transformer, *m.decoder.transformer):
        block.compile(backend=backend, fullgraph=True, dynamic=True)
    torch.testing.assert_close(stage1_loss(m, x, together=together).total, plain)
    assert 1 <= len(compiled) <= 2 * 4


@pytest.mark.skipif(
    shutil.which(torch.utils.cpp_extension.get_cxx_compiler()) is None,
    reason="the default backend of torch.compile needs a C++ compiler",
)
@pytest.mark.parametrize(("base", "graphs"), [("dct", 1), ("vqgan", 2), ("vae", 2)])
def test_compiled_run_is_the_plain_one(base: str, graphs: int) -> None:
    """``compile: true`` with the default backend compiles one graph of the blocks for all lengths and one of a
    convolutional base encoder, without graph breaks, and gives the same losses.
    """
    from torch._dynamo.utils import counters

    counters.clear()
    losses: dict[bool, list[float]] = {False: [], True: []}
    for compiled, seen in losses.items():
        fields: dict[str, Any] = {"steps": 2, "warmup": 0.0, "compile": compiled}

        def on_log(record: dict[str, float], seen: list[float] = seen) -> None:
            seen.append(record["loss"])

        train(config(**fields), model=model(base), images=images(4), on_log=on_log)
    assert losses[True] == pytest.approx(losses[False], rel=1e-4)
    assert losses[True][0] != losses[True][1]
    assert not counters["graph_break"] and counters["stats"]["unique_graphs"] == graphs
    assert sum(counters["inductor"].values()) > 0


def test_iterations_drawn() -> None:
    fields = config(iterations_per_step=2, first_only=0.25)
    assert iterations_of(config(), 8, 0, 0.0) == list(range(8))
    assert all(iterations_of(fields, 8, step, 0.2) == [0] for step in range(20))
    late = [tuple(iterations_of(fields, 8, step, 0.8)) for step in range(200)]
    assert all(len(set(at)) == 2 for at in late)
    assert {i for at in late for i in at} == set(range(8))
    assert late == [tuple(iterations_of(fields, 8, step, 0.8)) for step in range(200)]
    middle = {i for step in range(200) for i in iterations_of(fields, 8, step, 0.5)}
    assert max(middle) == round(0.5 * 7)


def test_schedule() -> None:
    assert schedule(0.0, 0.1) == 0 and schedule(0.05, 0.1) == pytest.approx(0.5)
    assert schedule(0.1, 0.1) == pytest.approx(1) and schedule(0.55, 0.1) == pytest.approx(0.5)
    assert schedule(1.0, 0.1) == pytest.approx(0, abs=1e-12) and schedule(0.0, 0.0) == 1
    assert config(learning_rate=None, batch_size=256).peak_learning_rate == pytest.approx(1.5e-4)


def test_moving_average_is_one() -> None:
    p = torch.nn.Parameter(torch.zeros(3))
    average, expected = MovingAverage([("p", p)], 0.9), torch.zeros(3)
    for step in range(1, 200):
        with torch.no_grad():
            p += 1
        average.update(step)
        decay = min(0.9, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * p.detach()
    torch.testing.assert_close(average.tensors()["p"], expected)
    assert float(p[0] - expected[0]) == pytest.approx(9, rel=1e-3)  # it lags by decay / (1 - decay)


def test_optimizer_is_adamw_with_decay_on_matrices_alone() -> None:
    own, plain = torch.nn.Linear(3, 2), torch.nn.Linear(3, 2)
    plain.load_state_dict(own.state_dict())
    ours = Optimizer(list(own.named_parameters()), config(clip=1e9, weight_decay=0.5))
    groups = [
        {"params": [plain.weight], "weight_decay": 0.5},
        {"params": [plain.bias], "weight_decay": 0.0},
    ]
    reference = torch.optim.AdamW(groups, lr=0.1, betas=(0.9, 0.95))
    for seed in range(3):
        x = torch.randn(4, 3, generator=torch.Generator().manual_seed(seed))
        own(x).square().sum().backward()
        plain(x).square().sum().backward()
        ours.step(0.1)
        reference.step()
        reference.zero_grad()
        torch.testing.assert_close(own.weight, plain.weight)
        torch.testing.assert_close(own.bias, plain.bias)


@pytest.mark.parametrize(
    ("capabilities", "expected"),
    [
        ({}, False),
        ({"avx512_bf16": True}, False),
        ({"avx512_bf16": True, "sse4a": True}, True),
        ({"avx512_bf16": True, "amx_bf16": True}, True),
        ({"avx512_bf16": False, "sse4a": True}, False),
    ],
)
def test_automatic_precision(
    capabilities: dict[str, bool], expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Precision "auto" is bfloat16 only on processors that multiply faster in it."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    for name, enabled in (("auto", expected), ("float32", False), ("bfloat16", True)):
        with precision(name, torch.device("cpu"))():
            assert torch.is_autocast_enabled("cpu") == enabled


@pytest.mark.parametrize("halting", ["off", "mask"])
@pytest.mark.parametrize("base", BASES)
def test_no_synchronization_in_a_step(base: str, halting: str) -> None:
    m = model(base, halting=halting, dead_code_threshold=0.1)
    stage = Stage1(m, config(), ALONE)
    stage.step(0, 0.0, 1e-3, [images(2)])
    with Synchronizations() as seen:
        stage.step(1, 0.0, 1e-3, [images(2)])
    assert seen.places == []
    with Synchronizations() as seen:
        float(stage.step(2, 0.0, 1e-3, [images(2)])["loss"])
    assert seen.places


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("stage", ["1", "2"])
def test_no_synchronization_on_a_gpu(stage: str) -> None:
    device = torch.device("cuda")
    fields = config(stage=stage, perceptual="off", gan_schedule=((0.0, 0.5),), device="cuda")
    m = model("vqgan", image_size=(24, 24), iterations=2).to(device)
    built = STAGES[stage](m, fields, Processes(device))
    x = torch.rand(2, 3, 24, 24, device=device)
    built.step(0, 0.5, 1e-3, [x])  # allocations and choices of kernels
    torch.cuda.set_sync_debug_mode("error")
    try:
        terms = built.step(0, 0.5, 1e-3, [x])
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert float(terms["loss"]) > 0
