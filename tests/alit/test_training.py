"""The training loop: what it computes, that it stops and goes on bit for bit, and what it says of bad input."""

from __future__ import annotations

import errno
import json
import os
import platform
import resource
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.utils.cpp_extension
from safetensors.torch import load_file
from torch import Tensor

from alit import AdaptiveTokenizer, atomic_files, stage1_loss
from alit.atomic_files import alone
from alit.training import Interrupted, NotFinite, TrainingConfig, checkpoints, train
from alit.training.optimisation import MovingAverage, Optimiser, schedule
from alit.training.processes import Processes
from alit.training.stage1 import Stage1, iterations_of, precision, recomputed
from alit.training.stages import build_stage
from tests.helpers.models import BASES, VARIANTS, images, model
from tests.helpers.training import SMALL, Synchronisations, config, state_of

pytestmark = pytest.mark.usefixtures("one_thread")

VQGAN_OPTIONS = {"kind": "vqgan", "latent_channels": 8, "channels": 32, "multipliers": [1, 1]}


# The loss.


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
    """The loss, its terms and all gradients are those of a run in every iteration."""
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


# One step.


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


def step_gradient(m: AdaptiveTokenizer, parts: list[Tensor], **fields: Any) -> dict[str, Tensor]:
    """Weights after one step of plain descent in place of AdamW, whose sign would hide a wrong scale."""
    stage = Stage1(m, config(**fields), Processes(torch.device("cpu")))
    optimiser = stage.optimisers["model"]
    gradients: dict[str, Tensor] = {}

    def keep(rate: float) -> Tensor:
        gradients.update({n: p.grad.clone() for n, p in optimiser.parameters if p.grad is not None})
        return torch.zeros(())

    optimiser.step = keep  # type: ignore[method-assign]
    stage.step(0, 0.0, 1e-3, parts)
    return gradients


def test_accumulated_parts_give_the_batch_gradient() -> None:
    x = images(4)
    whole = step_gradient(model("vqgan"), [x])
    parts = step_gradient(model("vqgan"), [x[:2], x[2:]], accumulate=2)
    assert whole.keys() == parts.keys()
    for name, gradient in whole.items():
        torch.testing.assert_close(parts[name], gradient, rtol=1e-4, atol=1e-6, msg=name)


def test_recomputed_activations_give_the_same_gradient() -> None:
    x, calls = images(2), []
    plain = step_gradient(model("vqgan"), [x])
    m = model("vqgan")
    m.encoder.transformer[0].register_forward_hook(lambda *_: calls.append(1))
    with recomputed(m.encoder, m.decoder):
        again = step_gradient(m, [x])
    assert len(calls) == 2 * m.config.iterations
    assert "forward" not in vars(m.encoder)
    assert all(torch.equal(again[name], gradient) for name, gradient in plain.items())


@pytest.mark.parametrize("together", [False, True])
def test_compiled_blocks_have_no_graph_break(together: bool) -> None:
    """``fullgraph`` raises at a graph break; one backend graph serves all lengths."""
    torch._dynamo.reset()
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
    """``compile: true`` with the default backend: one graph of the blocks for all lengths, one of a convolutional base
    encoder, no graph break, the same losses.
    """
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
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


def test_optimiser_is_adamw_with_decay_on_matrices_alone() -> None:
    m, own, plain = (torch.nn.Linear(3, 2), torch.nn.Linear(3, 2), torch.nn.Linear(3, 2))
    del m
    plain.load_state_dict(own.state_dict())
    ours = Optimiser(list(own.named_parameters()), config(clip=1e9, weight_decay=0.5))
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
    """bfloat16 only on processors that multiply faster in it."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    for name, enabled in (("auto", expected), ("float32", False), ("bfloat16", True)):
        with precision(name, torch.device("cpu"))():
            assert torch.is_autocast_enabled("cpu") == enabled


@pytest.mark.parametrize("halting", ["off", "mask"])
@pytest.mark.parametrize("base", BASES)
def test_no_synchronisation_in_a_step(base: str, halting: str) -> None:
    m = model(base, halting=halting, dead_code_threshold=0.1)
    stage = Stage1(m, config(), Processes(torch.device("cpu")))
    stage.step(0, 0.0, 1e-3, [images(2)])
    with Synchronisations() as seen:
        stage.step(1, 0.0, 1e-3, [images(2)])
    # Checks of values, which run on CPU tensors only.
    allowed = ("_check_images", "check_index", "_check", "check_offsets", "check_lengths")
    assert [x for x in seen.places if x.rpartition(":")[2] not in allowed] == []
    with Synchronisations() as seen:
        float(stage.step(2, 0.0, 1e-3, [images(2)])["loss"])
    assert [x for x in seen.places if x.rpartition(":")[2] not in allowed]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("stage", ["1", "2"])
def test_no_synchronisation_on_a_gpu(stage: str) -> None:
    device = torch.device("cuda")
    fields = config(stage=stage, perceptual="off", gan_schedule=((0.0, 0.5),), device="cuda")
    m = model("vqgan", image_size=(24, 24), iterations=2).to(device)
    built = build_stage(m, fields, Processes(device))
    x = torch.rand(2, 3, 24, 24, device=device)
    built.step(0, 0.5, 1e-3, [x])  # allocations and choices of kernels
    torch.cuda.set_sync_debug_mode("error")
    try:
        terms = built.step(0, 0.5, 1e-3, [x])
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert float(terms["loss"]) > 0


# Stop and go on.


@pytest.mark.parametrize("sent", (signal.SIGINT, signal.SIGTERM))
def test_signals_to_the_whole_group(sent: signal.Signals, folder: Path, tmp_path: Path) -> None:
    """Ctrl-C, or a batch system's end, to the command and to its decoding workers: a checkpoint, exit status 130, and
    --resume goes on.
    """
    run = tmp_path / "run"
    options = config(data=str(folder), output=str(run), steps=100_000, workers=1).asdict()
    (tmp_path / "config.json").write_text(json.dumps(options))
    command = [sys.executable, "-m", "alit.cli", "train", str(tmp_path / "config.json")]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    ) as process:
        log = run / "log.jsonl"
        while process.poll() is None and not (log.exists() and log.read_text().count("\n") >= 2):
            time.sleep(0.1)
        assert process.poll() is None
        os.killpg(process.pid, sent)
        said = process.communicate(timeout=300)[0]
    assert process.returncode == 130, said
    steps = int(checkpoints.saved(run)[-1].name.rpartition("-")[2])
    assert f"stopped by {sent.name} after step {steps}; resume goes on from there" in said
    assert "Traceback" not in said and steps >= 2
    shorter = {**options, "steps": steps + 1}
    resumed = train(TrainingConfig.from_mapping(shorter), resume=True, allow_changes=True)
    assert resumed.steps == steps + 1


@pytest.mark.parametrize(
    "fields",
    [
        {"workers": 1, "iterations_per_step": 1},
        {"accumulate": 2, "precision": "bfloat16", "model": {**SMALL, "ema_decay": 0.9}},
    ],
)
def test_resume_bit_for_bit(folder: Path, tmp_path: Path, fields: dict[str, Any]) -> None:
    fields = {"data": str(folder), "checkpoint_every": 3, **fields}
    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    train(config(output=str(straight), **fields))

    def stop(record: dict[str, float]) -> None:
        if record["step"] == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Interrupted, match="SIGTERM after step 3; resume goes on from there"):
        train(config(output=str(stopped), **fields), on_log=stop)
    assert [x.name for x in checkpoints.saved(stopped)] == ["checkpoint-00000003"]
    result = train(config(output=str(stopped), **fields), resume=True)
    assert result.steps == 6
    one, other = state_of(straight), state_of(stopped)
    assert one.keys() == other.keys() and len(one) > 100
    assert [name for name in one if one[name] != other[name]] == []
    names = ("step", "loss", "gradient_norm", "learning_rate")
    logs = [
        [
            [json.loads(line)[n] for n in names]
            for line in (run / "log.jsonl").read_text().split("\n")[:-1]
        ]
        for run in (straight, stopped)
    ]
    assert logs[0] == logs[1] and len(logs[0]) == 6
    files = [load_file(run / "model.safetensors") for run in (straight, stopped)]
    assert all(torch.equal(value, files[1][name]) for name, value in files[0].items())
    again = AdaptiveTokenizer.from_pretrained(stopped / "model.safetensors")
    for name, value in result.model.state_dict().items():
        assert torch.equal(value, again.state_dict()[name])


KEPT = """
import resource, torch
from alit.training.processes import keep_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(50_000_000)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

plain = [faults() for _ in range(4)]
keep_memory()
print(min(plain), min(faults() for _ in range(4)))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="it is glibc's heap that is told")
def test_what_a_step_frees_the_next_one_has_at_once() -> None:
    done = subprocess.run([sys.executable, "-c", KEPT], capture_output=True, text=True)
    plain, kept = map(int, done.stdout.split())
    if plain < 1000:
        pytest.skip("pages are huge here: there are few to map")
    assert kept < plain / 10, done.stderr


def test_a_run_that_ends_by_the_clock_is_saved(tmp_path: Path) -> None:
    """Also where the time is up between the last step and a look at the pictures."""

    def slow(record: dict[str, float]) -> None:
        time.sleep(1.2 if record["step"] == 2 else 0)

    fields = config(steps=1000, seconds=1.0, output=str(tmp_path / "run"))
    result = train(fields, model=model(), images=images(4), on_log=slow)
    assert checkpoints.about(checkpoints.saved(tmp_path / "run")[-1])["step"] == result.steps
    assert (tmp_path / "run" / "model.safetensors").exists()


def test_the_clock_goes_on_where_a_run_is_resumed(tmp_path: Path) -> None:
    shares: list[float] = []

    def interrupting(record: dict[str, float]) -> None:
        shares.append(record["done"])
        time.sleep(0.5)
        if len(shares) > 1:
            os.kill(os.getpid(), signal.SIGINT)

    fields = config(steps=1000, seconds=60.0, output=str(tmp_path / "run"))
    for resume in (False, True):
        with pytest.raises(Interrupted):
            train(fields, model=model(), images=images(4), resume=resume, on_log=interrupting)
    assert len(shares) == 3 and shares[2] > shares[1] + 0.5 / 60


def test_a_given_model_is_that_of_the_run(tmp_path: Path) -> None:
    fields = {"output": str(tmp_path / "run"), "checkpoint_every": 2}
    train(config(steps=2, **fields), model=model(), images=images(4))
    with pytest.raises(ValueError, match="model: commitment, halting differ from those of checkpo"):
        train(
            config(steps=4, **fields),
            **{"model": model(commitment=9.0, halting="mask"), "images": images(4)},
            **{"resume": True, "allow_changes": True},
        )


def test_two_runs_in_one_folder(folder: Path, tmp_path: Path) -> None:
    """The second is refused, as long as the first goes on."""
    code = "import sys, time; from pathlib import Path; from alit.atomic_files import alone\n"
    code += f"with alone(Path({str(tmp_path)!r})): print(1, flush=True); sys.stdin.read()"
    fields = config(data=str(folder), output=str(tmp_path), steps=1)
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as other:
        assert other.stdout is not None and other.stdout.readline() == b"1\n"
        with pytest.raises(ValueError, match="output: another run is writing to"):
            train(fields)
        other.communicate()
    with alone(tmp_path), pytest.raises(ValueError, match="output: another run is writing to"):
        train(fields)
    assert train(fields).steps == 1


def test_a_file_system_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_locks(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(atomic_files.fcntl, "lockf", no_locks)
    with pytest.warns(UserWarning, match="cannot be locked"), alone(tmp_path):
        pass


def test_resume_with_other_workers(folder: Path, tmp_path: Path) -> None:
    """Which change nothing with folders."""
    train(config(data=str(folder), output=str(tmp_path), steps=1))
    more = config(data=str(folder), output=str(tmp_path), steps=1, workers=1)
    assert train(more, resume=True).steps == 1


def test_resume_says_what_differs(folder: Path, tmp_path: Path) -> None:
    run = str(tmp_path / "run")
    short = config(output=run, data=str(folder), steps=1)
    train(short)
    with pytest.raises(ValueError, match="holds a run up to checkpoint-00000001; resume it"):
        train(short)
    other = replace(short, steps=2, clip=1.0, log_every=5)
    with pytest.raises(ValueError, match="configuration differs") as raised:
        train(other, resume=True)
    assert "steps: 1 there, 2 here" in str(raised.value) and "clip: 3.0 there, 1.0 here" in str(
        raised.value
    )
    assert "log_every" not in str(raised.value)
    assert train(other, resume=True, allow_changes=True).steps == 2


def test_a_loss_that_is_not_finite_stops(folder: Path, tmp_path: Path) -> None:
    fields: dict[str, Any] = {"data": str(folder), "output": str(tmp_path / "run"), "log_every": 4}
    fields |= {"checkpoint_every": 2, "steps": 8, "learning_rate": 1e-3}

    def poison(stage: Stage1, *args: Any, step: Any = Stage1.step) -> Any:
        if args[0] == 4:
            with torch.no_grad():
                stage.model.decoder.latent_token_positional_embedding.fill_(torch.nan)
        return step(stage, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Stage1, "step", poison)
        with pytest.raises(
            NotFinite, match=r"not finite at step 5: code_0 is nan; the last good.*00000004"
        ):
            train(config(**fields))
    assert checkpoints.saved(tmp_path / "run")[-1].name == "checkpoint-00000004"
    assert train(config(**fields), resume=True).steps == 8


def test_full_disk(folder: Path, tmp_path: Path) -> None:
    """A limit on file sizes stands in for a disk without room."""
    fields: dict[str, Any] = {"data": str(folder), "output": str(tmp_path / "run"), "steps": 2}
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill(record: dict[str, float]) -> None:
        if record["step"] == 2:
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))

    try:
        with pytest.raises(OSError, match=r"could not be written.*before it are intact"):
            train(config(checkpoint_every=1, **fields), on_log=fill)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [x.name for x in (tmp_path / "run").glob("*checkpoint*")] == ["checkpoint-00000001"]
    assert train(config(checkpoint_every=1, **fields), resume=True).steps == 2


def test_full_disk_at_a_line_of_the_log(folder: Path, tmp_path: Path) -> None:
    fields: dict[str, Any] = {"data": str(folder), "output": str(tmp_path / "run"), "steps": 4}
    before, size = resource.getrlimit(resource.RLIMIT_FSIZE), tmp_path / "run/log.jsonl"

    def fill(record: dict[str, float]) -> None:
        if record["step"] == 3:
            limit = size.stat().st_size + 10
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))

    try:
        with pytest.raises(OSError, match=r"log\.jsonl: could not be written"):
            train(config(checkpoint_every=2, **fields), on_log=fill)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    # The line that was cut short is dropped, and the run goes on from its last checkpoint.
    assert train(config(checkpoint_every=2, **fields), resume=True).steps == 4
    lines = [json.loads(line)["step"] for line in size.read_text().splitlines()]
    assert lines == [1, 2, 3, 4]


# The configuration.


def test_configurations_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match="data: expected at least a batch of 4 pictures, got 3"):
        train(config(), model=model(), images=images(3))
    with pytest.raises(ValueError, match="batch_size: expected a multiple of accumulate"):
        train(config(accumulate=3), model=model(), images=images(4))
    with pytest.raises(ValueError, match="data: expected a folder"):
        train(config(), model=model())
    with pytest.raises(ValueError, match="parallel: fsdp needs processes that torchrun started"):
        train(config(parallel="fsdp"), model=model(), images=images(4))
    with pytest.raises(ValueError, match="vqgan base tokenizer has weights; expected base_from"):
        train(config(model={"size": "nano", "base": VQGAN_OPTIONS}), images=images())
    with pytest.raises(ValueError, match=r"model: .*unexpected keyword argument 'colour'"):
        train(config(model={"size": "nano", "colour": 1}), images=images())
    with pytest.raises(ValueError, match="device: 'cuda:77' is not there"):
        train(config(device="cuda:77"), images=images())
