"""Runs stop and resume at any step, bit for bit; one run at a time in a folder; time limits."""

from __future__ import annotations

import errno
import json
import os
import signal
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from alit import AdaptiveTokenizer, atomic_files
from alit.atomic_files import alone
from alit.cli import app
from alit.losses import PatchDiscriminator
from alit.training import Interrupted, TrainingConfig, checkpoints, train
from tests.helpers.forks import FORKS, fork
from tests.helpers.image_files import tar
from tests.helpers.models import images, model
from tests.helpers.runs import SMALL, VAE, config, differing, log_of, state_of, stopping, weights_of

pytestmark = pytest.mark.usefixtures("one_thread")

CASES: dict[str, dict[str, Any]] = {
    "workers": {"workers": 1, "iterations_per_step": 1},
    "tails": {"tail_drop": 0.6, "model": {**SMALL, "any_length": True}},
    "parts": {"accumulate": 2, "precision": "bfloat16", "model": {**SMALL, "ema_decay": 0.9}},
    "shards": {"data": "shards", "workers": 1, "shuffle_buffer": 4},
    "base": {"stage": "base", "model": {**SMALL, "base": VAE}},
    "length": {"stage": "length", "start_from": "start.safetensors"},
    # The adversarial loss begins during the run.
    "stage 2": {
        **{"stage": "2", "start_from": "start.safetensors"},
        **{"gan_schedule": ((0.3, 0.2), (0.6, 0.8)), "perceptual": "lpips", "tail_drop": 0.5},
    },
}


def shards(folder: Path) -> str:
    """Write the images of a folder to four tar files of one or two each; returns their pattern."""
    files = sorted(folder.glob("**/*.png"))
    for number in range(4):
        tar(folder / f"x-{number}.tar", {x.name: x.read_bytes() for x in files[number::4]})
    return str(folder / "x-{0..3}.tar")


@pytest.mark.parametrize("case", CASES)
def test_resume_bit_for_bit(
    case: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, random_perceptual: Any
) -> None:
    """3 steps, a stop and 3 more give the checkpoint, log and model of 6 steps, bit for bit."""
    monkeypatch.setattr("alit.training.stage2.PatchDiscriminator", lambda: PatchDiscriminator(8))
    monkeypatch.setattr("alit.training.length_stage.FIT_STEPS", 100)  # as exact as thousands
    monkeypatch.chdir(tmp_path)
    fields = {"data": str(folder), "checkpoint_every": 3, **CASES[case]}
    if fields["data"] == "shards":
        fields["data"] = shards(folder)
    model("vqgan", image_size=(32, 32), iterations=2).save_pretrained("start.safetensors")
    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    train(config(output=str(straight), **fields))
    with pytest.raises(Interrupted, match="SIGTERM after step 3; resume goes on from there"):
        train(config(output=str(stopped), **fields), on_log=stopping(3))
    assert [x.name for x in checkpoints.saved(stopped)] == ["checkpoint-00000003"]
    result = train(config(output=str(stopped), **fields), resume=True)
    assert result.steps == 6
    state = state_of(straight)
    assert differing(state, state_of(stopped)) == [] and len(state) > 100
    assert log_of(straight) == log_of(stopped) and len(log_of(straight)) == 6
    assert differing(weights_of(straight), weights_of(stopped)) == []
    again = AdaptiveTokenizer.from_pretrained(stopped / "model.safetensors")
    assert differing(result.model.state_dict(), again.state_dict()) == []
    if case == "stage 2":
        assert {"discriminators/1.main.3.running_mean"} <= state.keys()
        assert any(name.startswith("optimizer/discriminators/") for name in state)
        assert "real_1" not in log_of(straight)[0] and "real_1" in log_of(straight)[3]
        assert not [name for name in weights_of(straight) if "discriminator" in name]


def in_a_group(*arguments: str) -> None:
    os.setsid()
    app(arguments)


@pytest.mark.parametrize("sent", (signal.SIGINT, signal.SIGTERM))
def test_signals_to_the_whole_group(sent: signal.Signals, folder: Path, tmp_path: Path) -> None:
    """Ctrl-C, or a batch system's SIGTERM, to the command and its decoding workers leads to a checkpoint and exit
    status 130, and --resume continues.
    """
    run = tmp_path / "run"
    options = config(data=str(folder), output=str(run), steps=100_000, workers=1).asdict()
    (tmp_path / "config.json").write_text(json.dumps(options))
    process = fork(tmp_path / "said", in_a_group, "train", str(tmp_path / "config.json"))
    log = run / "log.jsonl"
    while process.is_alive() and not (log.exists() and log.read_text().count("\n") >= 2):
        time.sleep(0.1)
    os.killpg(process.pid, sent)
    process.join(300)
    said = (tmp_path / "said").read_text().replace("\n", " ")
    assert process.exitcode == 130, said
    steps = int(checkpoints.saved(run)[-1].name.rpartition("-")[2])
    assert f"stopped by {sent.name} after step {steps}; resume goes on from there" in said
    assert "Traceback" not in said and steps >= 2
    shorter = {**options, "steps": steps + 1}
    resumed = train(TrainingConfig.from_mapping(shorter), resume=True, allow_changes=True)
    assert resumed.steps == steps + 1


def test_a_run_that_ends_by_the_clock_is_saved(tmp_path: Path) -> None:
    """A run that ends by its time limit is saved, even if the time ends between a step and the next batch."""

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


def stay_alone(folder: Path, entered: Any) -> None:
    with alone(folder):
        entered.set()
        signal.pause()


def test_two_runs_in_one_folder(folder: Path, tmp_path: Path) -> None:
    """A second run in the same folder raises ValueError while the first one runs."""
    fields, entered = config(data=str(folder), output=str(tmp_path), steps=1), FORKS.Event()
    other = fork(tmp_path / "said", stay_alone, tmp_path, entered)
    assert entered.wait(300)
    with pytest.raises(ValueError, match="output: another run is writing to"):
        train(fields)
    other.kill()
    other.join()
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
    """A run on a folder resumes with another number of workers."""
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
