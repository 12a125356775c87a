"""What stops a run, what it says then, and what it leaves: losses that are not finite, full disks, wrong input."""

from __future__ import annotations

import platform
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from alit.training import NotFinite, checkpoints, train
from alit.training.stage1 import Stage1
from tests.helpers.models import images, model
from tests.helpers.runs import config, log_of

pytestmark = pytest.mark.usefixtures("one_thread")


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
    """A limit on file sizes stands in for a disk without room; the run goes on from its last checkpoint."""
    run, before = tmp_path / "run", resource.getrlimit(resource.RLIMIT_FSIZE)
    fields = config(data=str(folder), output=str(run), steps=4, checkpoint_every=kept)

    def fill(record: dict[str, float]) -> None:
        if record["step"] == step:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit(run / "log.jsonl"), before[1]))

    try:
        with pytest.raises(OSError, match=said):
            train(fields, on_log=fill)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [x.name for x in run.glob("*checkpoint*")] == [f"checkpoint-0000000{kept}"]
    assert train(fields, resume=True).steps == 4
    assert [line["step"] for line in log_of(run)] == [1, 2, 3, 4]


VQGAN_OPTIONS = {"kind": "vqgan", "latent_channels": 8, "channels": 32, "multipliers": [1, 1]}


@pytest.mark.parametrize(
    ("fields", "given", "message"),
    [
        ({}, 3, "data: expected at least a batch of 4 pictures, got 3"),
        ({"accumulate": 3}, 4, "batch_size: expected a multiple of accumulate"),
        ({}, 0, "data: expected a folder"),
        ({"parallel": "fsdp"}, 4, "parallel: fsdp needs processes that torchrun started"),
        ({"model": {"base": VQGAN_OPTIONS}}, 4, "vqgan base tokenizer has weights; expected base_"),
        ({"model": {"base": {"kind": "x"}}}, 4, "model.base.kind: expected one of vqgan, vae, dct"),
        ({"model": {"colour": 1}}, 4, "model: .*unexpected keyword argument 'colour'"),
        ({"model": {"encoder": {"widht": 1}}}, 4, "configuration: encoder.widht: no such field"),
        ({"device": "cuda:77"}, 4, "device: expected auto, cpu or cuda:N that is there, got 'cuda"),
    ],
)
def test_configurations_that_do_not_fit(fields: dict[str, Any], given: int, message: str) -> None:
    own = None if "model" in fields else model()
    with pytest.raises(ValueError, match=message):
        train(config(**fields), model=own, images=images(given) if given else None)
