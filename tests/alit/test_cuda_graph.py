"""Steps from a CUDA graph equal plain ones; without a GPU only the capture is replaced by an imitation."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from alit.training import Interrupted, TrainingConfig, cuda_graph, stage1, train
from alit.training.cuda_graph import GradientGraph, Terms
from alit.training.processes import Processes
from alit.training.stage1 import Stage1
from tests.helpers.models import images, model
from tests.helpers.runs import config, state_of, stopping

GPU = pytest.param(
    "cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
)


def capture(work: Callable[[], Terms]) -> tuple[Terms, Callable[[], None]]:
    """Imitation of a capture: terms, and a function that recomputes them into the same tensors."""
    terms = work()

    def replay() -> None:
        for name, value in work().items():
            terms[name].copy_(value)

    return terms, replay


@pytest.fixture(params=["cpu", GPU])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "cpu":
        monkeypatch.setattr(cuda_graph, "_warm_up", lambda work: [work(), work()])
        monkeypatch.setattr(cuda_graph, "_capture", capture)
        monkeypatch.setattr(stage1, "check_capturable", lambda *_: None)
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    return request.param


#: Options with state and randomness: a moving-average codebook, replaced codes, random halting and posteriors.
STATEFUL: dict[str, Any] = {"halting": "mask", "ema_decay": 0.9, "dead_code_threshold": 0.5}
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "vqgan": ({"base": "vqgan", **STATEFUL}, {}),
    "vae": ({"base": "vae", **STATEFUL}, {}),
    "parts": ({"base": "vqgan"}, {"accumulate": 2}),
    "growing": ({}, {"first_only": 0.3}),
    "recomputed": ({"base": "vqgan"}, {"activation_checkpointing": True}),
    "truncated": ({}, {"through_time": False}),
}


def run(fields: TrainingConfig, options: dict[str, Any]) -> tuple[list[dict[str, float]], Any]:
    """Log records of a run without speeds, and its final weights."""
    records: list[dict[str, float]] = []
    m = model(**options)
    result = train(fields, model=m, images=images(8), on_log=records.append)
    for each in records:
        del each["images_per_second"]
    return records, result.model.state_dict()


@pytest.mark.parametrize("case", CASES)
def test_a_captured_run_is_the_plain_one(case: str, device: str) -> None:
    options, fields = CASES[case]
    fields = {"steps": 5, "warmup": 0.0, "ema": 0.0, "device": device, **fields}
    records, weights = run(config(**fields), options)
    captured, found = run(config(**fields, cuda_graph=True), options)
    exactly = device == "cpu"
    assert [x.keys() for x in captured] == [x.keys() for x in records]
    for one, other in zip(captured, records, strict=True):
        assert one == (other if exactly else pytest.approx(other, rel=1e-4))
    for name, value in weights.items():
        if exactly:
            assert torch.equal(found[name], value), name
        else:  # AdamW moves a weight whose gradient is noise as far as the others
            difference = (found[name].double() - value.double()).norm()
            assert difference <= 1e-3 * value.double().norm() + 1e-6, name


def test_a_stopped_captured_run_goes_on_as_if_it_had_not(device: str, tmp_path: Path) -> None:
    """A stopped run with a captured step resumes bit for bit, capturing again."""

    def go(name: str, **options: Any) -> None:
        fields = config(steps=4, device=device, cuda_graph=True, output=str(tmp_path / name))
        train(fields, model=model("vae", **STATEFUL), images=images(8), **options)

    go("whole")
    with pytest.raises(Interrupted, match="after step 2"):
        go("halves", on_log=stopping(2))
    go("halves", resume=True)
    assert state_of(tmp_path / "whole") == state_of(tmp_path / "halves")


def test_gradients_stay_in_place_and_unused_parameters_have_none(device: str) -> None:
    m = model("vqgan").to(device)
    stage = Stage1(m, config(device=device, cuda_graph=True), Processes(torch.device(device)))
    x = images(2).to(device)
    seen: list[dict[str, Tensor | None]] = []

    def keep(rate: float) -> Tensor:
        seen.append({name: p.grad for name, p in m.named_parameters()})
        return torch.zeros((), device=device)

    stage.optimizers["model"].step = keep  # type: ignore[method-assign]
    for step in range(2):
        stage.step(step, 0.0, 1e-3, [x])
    assert seen[0]["encoder_mask_token"] is None  # nothing halts
    assert seen[0]["patch_embed.weight"] is not None
    assert all(seen[1][name] is gradient for name, gradient in seen[0].items())


def test_another_shape_is_refused(device: str) -> None:
    layer = torch.nn.Linear(3, 1).to(device)

    def work(x: Tensor) -> Terms:
        loss = layer(x).sum()
        loss.backward()
        return {"loss": loss.detach()}

    graph = GradientGraph(layer, work, torch.ones(2, 3, device=device))
    graph.zero_gradients()
    for _ in range(2):
        graph(torch.full((2, 3), 2.0, device=device))
    torch.testing.assert_close(layer.weight.grad, torch.full((1, 3), 8.0, device=device))
    with pytest.raises(ValueError, match=r"images: expected the captured shape \(2, 3\), got"):
        graph(torch.ones(1, 3, device=device))


def test_a_failed_capture_changes_nothing(device: str) -> None:
    layer = torch.nn.BatchNorm1d(3).to(device)

    def work(x: Tensor) -> Terms:
        layer(x).sum().backward()
        raise RuntimeError("as if it could not be captured")

    before = {name: x.clone() for name, x in layer.state_dict().items()}
    with pytest.raises(RuntimeError, match="as if"):
        GradientGraph(layer, work, torch.randn(4, 3, device=device))
    for name, x in layer.state_dict().items():
        assert torch.equal(x, before[name]), name
    assert all(parameter.grad is None for parameter in layer.parameters())


@pytest.mark.parametrize(
    ("device", "processes", "halting", "expected"),
    [
        ("cpu", 1, "off", "cuda_graph: expected a CUDA device, got cpu"),
        ("cuda", 2, "off", "cuda_graph: expected one process, got 2"),
        ("cuda", 1, "drop", 'cuda_graph: halting "drop" asks'),
    ],
)
def test_a_run_that_cannot_be_captured_is_refused(
    device: str, processes: int, halting: str, expected: str
) -> None:
    own = Processes(torch.device(device), count=processes)
    with pytest.raises(ValueError, match=expected):
        Stage1(model(halting=halting), config(cuda_graph=True), own)
