"""Checkpoints of runs: nothing in them is executed, damage is found before training, one is always intact."""

from __future__ import annotations

import copyreg
import json
import math
import os
import pickle
import random
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from alit import CheckpointError
from alit.training import NotFinite, TrainingConfig, checkpoints, run_json, train
from alit.training.rows import check_finite
from alit.training.stage1 import Stage1
from tests.helpers.hostile import EXAMPLES, memory, mutated
from tests.helpers.runs import ALONE, config, differing, noise_images, weights_of

pytestmark = pytest.mark.usefixtures("one_thread")


def tensors() -> dict[str, Tensor]:
    values = torch.arange(24, dtype=torch.float32).reshape(6, 4)
    return {"a": values, "b": torch.tensor(7.0), "c": torch.arange(3), "d": torch.empty(0, 2)}


def written(run: Path, step: int = 1, keep: int = 2, data: Any = None) -> Path:
    about = {"config": {"steps": 5}, "model": {"x": 1}, "seconds": 1.5}
    return checkpoints.save(run, step, tensors(), about, data, ALONE, keep=keep)


def loaded(checkpoint: Path) -> Any:
    assert checkpoints.damage(checkpoint) is None
    found = {name: torch.zeros_like(x) for name, x in tensors().items()}
    data = checkpoints.load(checkpoint, found, ALONE)
    assert all(torch.equal(x, found[name]) for name, x in tensors().items())
    return data


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    assert loaded(written(tmp_path)) is None
    assert loaded(written(tmp_path, 2, data={"next": 1})) == [{"next": 1}]
    assert checkpoints.about(tmp_path / "checkpoint-00000002")["step"] == 2
    for other, message in (
        ({"a": torch.zeros(6, 5)}, r"a: expected the shape \(6, 5\), found \(6, 4\)"),
        ({"a": torch.zeros(6, 4, dtype=torch.float64)}, "a: expected torch.float64, found torch.f"),
        ({"e": torch.zeros(1)}, r"e: expected the shape \(1,\), found None"),
    ):
        with pytest.raises(CheckpointError, match=message):
            checkpoints.load(tmp_path / "checkpoint-00000002", other, ALONE)


def test_what_is_no_folder_gives_way(tmp_path: Path) -> None:
    """Files and links in the places of checkpoint folders are replaced; targets of links stay."""
    (tmp_path / "kept").mkdir()
    for name in ("checkpoint-00000001", ".checkpoint-00000001.part", ".checkpoint-00000001.aside"):
        (tmp_path / name).write_text("x")
        loaded(written(tmp_path))
        (tmp_path / ".checkpoint-00000009.part").symlink_to(tmp_path / "kept")
        checkpoints.recover(tmp_path)
        assert {x.name for x in tmp_path.iterdir()} == {"checkpoint-00000001", "kept"}
        checkpoints.drop(tmp_path / "checkpoint-00000001")


def test_the_newest_stay_however_many_digits(tmp_path: Path) -> None:
    for step in (99_999_999, 100_000_000, 7):
        written(tmp_path, step, keep=9)
    (tmp_path / "checkpoint-x").mkdir()
    (tmp_path / "checkpoint-00000001").touch()
    names = [x.name for x in checkpoints.saved(tmp_path)]
    assert names == ["checkpoint-00000007", "checkpoint-99999999", "checkpoint-100000000"]
    written(tmp_path, 100_000_001)
    steps = [checkpoints.about(x)["step"] for x in checkpoints.saved(tmp_path)]
    assert steps == [100_000_000, 100_000_001]


# Nothing is executed.


class Reduces:
    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.content = (function, arguments)

    def __reduce__(self) -> Any:
        return self.content


def payloads(mark: Path) -> list[bytes]:
    """Pickles that create the file ``mark`` if they are executed."""
    command, code = f"touch {mark}", f"open({str(mark)!r}, 'w')"
    found = [
        pickle.dumps(Reduces(function, argument), protocol=protocol)
        for function, argument in ((os.system, command), (eval, code), (exec, code))
        for protocol in (0, 2, 4)
    ]
    dotted = f"\x80\x04\x8c\x02os\x94\x8c\x06system\x94\x93\x8c{chr(len(command))}{command}\x85R."
    chained = f"cbuiltins\ngetattr\n(cos\n__dict__\nVget\ntR(Vsystem\ntR(V{command}\ntR."
    found += [dotted.encode("latin-1"), chained.encode(), f"cos\nsystem\n(V{command}\ntR.".encode()]
    copyreg.add_extension("os", "system", 0x7A)
    try:
        found.append(pickle.dumps(Reduces(os.system, command), protocol=2))
    finally:
        copyreg.remove_extension("os", "system", 0x7A)
    return found


@pytest.mark.parametrize(
    "name",
    [".metadata", "__0_0.distcp", "data-0.json", "run.json", "tensors-00000.safetensors", "x.pt"],
)
def test_nothing_in_a_checkpoint_is_executed(name: str, tmp_path: Path) -> None:
    mark = tmp_path / "executed"
    for payload in payloads(mark):
        checkpoint = written(tmp_path)
        (checkpoint / name).write_bytes(payload)
        damaged = checkpoints.damage(checkpoint) is not None
        assert damaged == (name in ("run.json", "tensors-00000.safetensors"))
        with suppress(CheckpointError):
            checkpoints.load(checkpoint, tensors(), ALONE)
        assert not mark.exists()


def test_the_payloads_are_real(tmp_path: Path) -> None:
    mark = tmp_path / "executed"
    works = 0
    for payload in payloads(mark):
        with suppress(Exception):
            pickle.loads(payload)
        works += mark.exists()
        mark.unlink(missing_ok=True)
    assert works >= 9


# Damage.


@pytest.mark.parametrize("name", ["run.json", "tensors-00000.safetensors"])
def test_damage_is_a_checkpoint_error(name: str, tmp_path: Path) -> None:
    """``damage`` finds any damage; ``load``, which checks nothing, raises only CheckpointError, in little memory."""
    chance, checkpoint = random.Random(0), written(tmp_path)
    whole = (checkpoint / name).read_bytes()
    found = {key: torch.zeros_like(x) for key, x in tensors().items()}
    with memory() as used:
        for _ in range(EXAMPLES):
            damaged = mutated(whole, chance)
            (checkpoint / name).write_bytes(damaged)
            if damaged != whole and not same(name, damaged, whole):
                assert checkpoints.damage(checkpoint)
            with suppress(CheckpointError):
                checkpoints.load(checkpoint, found, ALONE)
    assert used.taken < 100 << 20
    (checkpoint / name).unlink()
    for kind in (None, "folder", "pipe"):
        if kind == "folder":
            (checkpoint / name).mkdir()
        elif kind == "pipe":
            (checkpoint / name).rmdir()
            os.mkfifo(checkpoint / name)
        assert checkpoints.damage(checkpoint)


def same(name: str, damaged: bytes, whole: bytes) -> bool:
    """True if both are JSON of equal value, as with an added blank."""
    with suppress(ValueError, RecursionError):
        return name == "run.json" and json.loads(damaged) == json.loads(whole)
    return False


SHAPES = {
    **{"list": b"[]", "null": b"null", "nothing": b"", "fields": b"{}", "no text": b"\xff{"},
    **{"deep": b"[" * 100_000, "cut": b'{"step": 1', "large": b" " * 5_000_000},
    **{"digits": b'{"step": ' + b"9" * 10_000 + b"}", "wide": b"\xff\xfe{\0}\0"},
}
WRONG: dict[str, list[Any]] = {
    "step": [-1, 2, 1.0, True, None, "1", [], math.inf, 10**30],
    "config": [None, [], "x", 1],
    "model": [None, [], "x", {}],
    "seconds": [-1.0, math.nan, math.inf, True, "1", None, 10**400],
    "files": [None, [], {}, [[1]], [[1, 2, 3]], [["1", 2]], [[-1, 0]], [[True, 0]], [1]],
    "data": [None, {}, "x"],
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("finished") / "run"
    train(config(steps=1, output=str(run)), images=noise_images(side=32))
    return run


def refused(run: Path, tmp_path: Path, content: bytes) -> None:
    """Check that resuming a run with this ``run.json`` raises CheckpointError."""
    copy = tmp_path / "copy"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(run, copy)
    (copy / "checkpoint-00000001" / "run.json").write_bytes(content)
    with pytest.raises(CheckpointError):
        train(
            config(steps=1, output=str(copy)),
            images=noise_images(side=32),
            resume=True,
            allow_changes=True,
        )


@pytest.mark.parametrize("name", SHAPES)
def test_a_run_json_of_another_shape(name: str, finished: Path, tmp_path: Path) -> None:
    refused(finished, tmp_path, SHAPES[name])


@pytest.mark.parametrize("honest", [False, True])
@pytest.mark.parametrize("name", WRONG)
def test_fields_of_another_kind(name: str, honest: bool, finished: Path, tmp_path: Path) -> None:
    """A ``run.json`` with a missing or wrongly typed field is refused, with a right or a wrong checksum."""
    good = json.loads((finished / "checkpoint-00000001" / "run.json").read_text())
    missing = {key: value for key, value in good.items() if key != name}
    for content in (missing, *({**good, name: value} for value in WRONG[name])):
        if honest:
            del content["checksum"]
            content["checksum"] = run_json.checksum(content)
            if content == good or (name == "seconds" and content is missing):
                continue
        if honest and name in ("config", "seconds") and name not in content:
            continue  # these have a default
        refused(finished, tmp_path, json.dumps(content).encode())


# The checkpoint that is loaded.


def test_a_damaged_one_names_the_intact_one(folder: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    fields: dict[str, Any] = {"data": str(folder), "output": str(run), "checkpoint_every": 1}
    fields |= {"steps": 4, "keep": 4}
    train(config(**fields))
    straight = weights_of(run)
    for step in (3, 4):
        file = run / f"checkpoint-0000000{step}" / "tensors-00000.safetensors"
        content = bytearray(file.read_bytes())
        content[-5] ^= 1
        file.write_bytes(content)
    with pytest.raises(
        CheckpointError,
        match=r"-00000004: damaged .*; checkpoint-00000002 is intact: --resume --checkpoint check",
    ):
        train(config(**fields), resume=True)
    with pytest.raises(ValueError, match=r"expected one of checkpoint-00000001, .* got '\.\./x'"):
        train(config(**fields), resume=True, checkpoint="../x")
    with pytest.raises(ValueError, match="checkpoint: expected it with resume alone"):
        train(config(**fields), checkpoint="checkpoint-00000002")
    seen: list[float] = []

    def look(record: dict[str, float]) -> None:
        if not seen:
            assert [x.name[-1] for x in checkpoints.saved(run)] == ["1", "2"]
        seen.append(record["step"])

    train(config(**fields), resume=True, checkpoint="checkpoint-00000002", on_log=look)
    assert seen == [3, 4]
    assert differing(straight, weights_of(run)) == []
    assert len((run / "log.jsonl").read_text().splitlines()) == 4
    for checkpoint in checkpoints.saved(run):
        (checkpoint / "run.json").write_text("{")
    with pytest.raises(CheckpointError, match="no other one is intact"):
        train(config(**fields), resume=True)


class Killed(BaseException):
    pass


@pytest.mark.parametrize("same_step", [True, False])
def test_at_no_moment_without_an_intact_one(
    same_step: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There is an intact checkpoint if saving is stopped before or after any rename or removal, or within one."""
    rename, rmtree, unlink = Path.rename, shutil.rmtree, os.unlink
    for stop in range(20):
        run, left = tmp_path / str(stop), [stop]
        run.mkdir()
        written(run, 1)
        written(run, 2)

        def killing(action: Any, left: list[int] = left) -> Any:
            def act(*arguments: Any, **options: Any) -> Any:
                left[0] -= 1
                if left[0] == -1:
                    raise Killed
                return action(*arguments, **options)

            return act

        with monkeypatch.context() as patch:
            patch.setattr(Path, "rename", killing(rename))
            patch.setattr(shutil, "rmtree", killing(rmtree))
            patch.setattr(os, "unlink", killing(unlink))
            ended = True
            with suppress(Killed):
                written(run, 2 if same_step else 3)
                ended = False
        loaded(checkpoints.saved(run)[-1])
        checkpoints.recover(run)
        found = checkpoints.saved(run)
        assert found and not [x for x in run.iterdir() if x.name.startswith(".")]
        for checkpoint in found:
            loaded(checkpoint)
        assert found[-1].name in ("checkpoint-00000002", "checkpoint-00000003")
        if not ended:
            break
    assert stop > 3 and not ended


def test_all_is_on_the_disk_before_it_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []
    flush, rename, sync = checkpoints._flush, Path.rename, checkpoints.sync

    def flushing(path: Path) -> None:
        done.append(path.name)
        flush(path)

    def syncing(path: Path) -> None:
        done.append(f"names in {path.name}")
        sync(path)

    def renaming(path: Path, target: Path) -> Path:
        done.append(f"to {target.name}")
        return rename(path, target)

    monkeypatch.setattr(checkpoints, "_flush", flushing)
    monkeypatch.setattr(checkpoints, "sync", syncing)
    monkeypatch.setattr(Path, "rename", renaming)
    written(tmp_path)
    part = "names in .checkpoint-00000001.part"
    expected = ["tensors-00000.safetensors", "run.json", part, "to checkpoint-00000001"]
    assert done == [*expected, f"names in {tmp_path.name}"]


TAILS = (
    *(
        b'{"step": 2, "lo',
        b'{"step"',
        b"\xff\xfe\x00",
        b"[" * 5000,
        b'{"step": 1e999}\n',
        b"null\n",
    ),
    *(b'{"step": true', b'[1]\n{"step": null}\n"\n'),
)


@pytest.mark.parametrize("tail", TAILS)
def test_a_log_that_a_kill_cut_short(tail: bytes, finished: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    line = (run / "log.jsonl").read_bytes()
    (run / "log.jsonl").write_bytes(line + tail)
    (run / "config.json").write_text('{"steps"')
    (run / ".checkpoint-00000009.part").mkdir()
    (run / ".checkpoint-00000009.part" / "x").touch()
    train(config(steps=1, output=str(run)), images=noise_images(side=32), resume=True)
    assert (run / "log.jsonl").read_bytes() == line
    assert TrainingConfig.read(run / "config.json").steps == 1
    assert not list(run.glob(".checkpoint*"))


# Values that are not finite.


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["weight", "average", "optimizer", "codebook"])
def test_what_is_not_finite_is_not_saved(
    where: str, value: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """State with values that are not finite is not saved, even if losses are finite; the last checkpoint is named."""
    run, step = tmp_path / "run", Stage1.step

    def poisoned(stage: Stage1, number: int, *rest: Any) -> Any:
        terms = step(stage, number, *rest)
        if number == 2:
            model = stage.model
            tensor = {
                "weight": model.decoder.ln_post.bias,
                "average": stage.average.values[3],
                "optimizer": stage.optimizers["model"].adamw.state[model.decoder.ln_post.bias][
                    "exp_avg_sq"
                ],
                "codebook": next(x for n, x in model.named_parameters() if "embedding.weight" in n),
            }[where]
            with torch.no_grad():
                tensor.view(-1)[-1] = value
        return terms

    monkeypatch.setattr(Stage1, "step", poisoned)
    fields: dict[str, Any] = {"steps": 3, "checkpoint_every": 1, "output": str(run), "keep": 9}
    with pytest.raises(NotFinite, match=r"not finite after step 3: .*; the last good .*00000002"):
        train(config(**fields), images=noise_images(side=32))
    found = checkpoints.saved(run)
    assert [x.name[-1] for x in found] == ["1", "2"]
    for file in (*run.glob("*/*.safetensors"), run / "model.safetensors"):
        assert all(x.isfinite().all() for x in load_file(file).values())


def test_what_counts_as_finite() -> None:
    """Large values, integers and empty tensors count as finite; NaN and infinity raise NotFinite with names."""
    good = {
        **tensors(),
        "e": torch.full((3,), 3e38),
        "f": torch.tensor([1e300], dtype=torch.float64),
    }
    check_finite(good, 1, ALONE)
    bad = {f"x{n}": torch.tensor([1.0, math.nan]) for n in range(7)}
    with pytest.raises(NotFinite, match="after step 1: x0, x1, x2, x3, x4 and 2 more"):
        check_finite({**good, **bad}, 1, ALONE)
