"""Runs that fail, their messages and files: losses that are not finite, full disks, wrong input."""

from __future__ import annotations

import json
import platform
import resource
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch

from alit.training import NotFinite, checkpoints, train
from alit.training.stage1 import Stage1
from tests.helpers.forks import fork
from tests.helpers.hostile import full_disk
from tests.helpers.models import images, model
from tests.helpers.runs import config, log_of

pytestmark = pytest.mark.usefixtures("one_thread")


def faults() -> int:
    """Page faults of an allocation of 40 MB that is freed again; the least of four."""
    found = []
    for _ in range(4):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        torch.ones(10_000_000)
        found.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
    return min(found)


def print_faults() -> None:
    """Print page faults before a run, after its step, and after the run, as JSON."""
    found = [faults()]
    train(
        config(steps=1),
        **{"model": model(), "images": images(4), "on_log": lambda _: found.append(faults())},
    )
    print(json.dumps([*found, faults()]))


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="it is glibc's heap that is told")
def test_what_a_step_frees_the_next_one_has_at_once(tmp_path: Path) -> None:
    """Memory freed by a step is reused without page faults, and returned to the system after the run."""
    fork(tmp_path / "said", print_faults).join()
    before, within, after = json.loads((tmp_path / "said").read_text())
    if before < 1000:
        pytest.skip("pages are huge here: there are few to map")
    assert within < before / 10 and after > before / 2


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


@pytest.mark.parametrize(
    ("step", "limit", "said", "kept"),
    [
        (2, lambda log: 100_000, r"could not be written.*before it are intact", 1),
        (3, lambda log: log.stat().st_size + 10, r"log\.jsonl: could not be written", 2),
    ],
    ids=["checkpoint", "line of the log"],
)
def test_full_disk(
    step: int, limit: Callable[[Path], int], said: str, kept: int, folder: Path, tmp_path: Path
) -> None:
    """A full disk, simulated by a limit on file sizes, raises OSError; the run resumes from its last checkpoint."""
    run = tmp_path / "run"
    fields = config(data=str(folder), output=str(run), steps=4, checkpoint_every=kept)

    disk = ExitStack()

    def fill(record: dict[str, float]) -> None:
        if record["step"] == step:
            disk.enter_context(full_disk(limit(run / "log.jsonl")))

    with disk, pytest.raises(OSError, match=said):
        train(fields, on_log=fill)
    assert [x.name for x in run.glob("*checkpoint*")] == [f"checkpoint-0000000{kept}"]
    assert train(fields, resume=True).steps == 4
    assert [line["step"] for line in log_of(run)] == [1, 2, 3, 4]


VQGAN_OPTIONS = {"kind": "vqgan", "latent_channels": 8, "channels": 32, "multipliers": [1, 1]}


@pytest.mark.parametrize(
    ("fields", "given", "message"),
    [
        ({}, 3, "data: expected at least a batch of 4 images, got 3"),
        ({"accumulate": 3}, 4, "batch_size: expected a multiple of accumulate"),
        ({}, 0, "data: expected a folder"),
        ({"parallel": "fsdp"}, 4, "parallel: fsdp needs processes that torchrun started"),
        ({"model": {"base": VQGAN_OPTIONS}}, 4, "vqgan base tokenizer has weights; expected base_"),
        ({"model": {"base": {"kind": "x"}}}, 4, "model.base.kind: expected one of vqgan, vae, dct"),
        ({"model": {"color": 1}}, 4, "model: no field 'color'"),
        ({"model": {"encoder": {"widht": 1}}}, 4, "configuration: encoder.widht: no such field"),
        ({"device": "cuda:77"}, 4, "device: expected auto, cpu or cuda:N that is there, got 'cuda"),
    ],
)
def test_configurations_that_do_not_fit(fields: dict[str, Any], given: int, message: str) -> None:
    own = None if "model" in fields else model()
    with pytest.raises(ValueError, match=message):
        train(config(**fields), model=own, images=images(given) if given else None)
