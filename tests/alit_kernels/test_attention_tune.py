"""The script that regenerates the launch configurations of attention, rehearsed in Triton's interpreter."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from alit_kernels.attention import tune
from alit_kernels.attention.configurations import TABLE, Tile

KEY = ("forward", 64, 2)


def test_the_table_is_as_the_script_writes_it() -> None:
    """So that a run that finds nothing better changes nothing."""
    source = tune.SOURCE.read_text()
    assert tune.regenerated(source, TABLE) == source
    other = Tile(128, 32, 8, 1, True)
    changed = tune.regenerated(source, {**TABLE, KEY: (other, *TABLE[KEY][1:])})
    (line,) = set(changed.splitlines()) - set(source.splitlines())
    assert line.strip().startswith('("forward", 64, 2): (Tile(128, 32, 8, 1, True), Tile(')
    namespace = {"Tile": Tile}
    exec(tune.rendered({KEY: (other,) * 3}), namespace)
    assert namespace["TABLE"] == {KEY: (other,) * 3}
    with pytest.raises(ValueError, match="source: expected a table"):
        tune.regenerated("nothing", TABLE)


def test_an_entry_gives_way_to_what_is_clearly_faster() -> None:
    a, b = Tile(64, 64, 4, 2), Tile(64, 32, 4, 2)
    assert tune.faster(a, {a: 1.0, b: 0.9}) == [b]
    assert tune.faster(a, {a: 1.0, b: 0.99}) == []
    c = Tile(32, 64, 4, 2)
    assert tune.faster(a, {b: 3.0, c: 2.0}) == [c, b], (
        "the current one needs more than this GPU has"
    )


def test_hopeless_candidates_are_timed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    quick, slow = Tile(64, 64, 4, 2), Tile(64, 32, 4, 2)
    timed = []

    def seconds(call: object) -> float:
        tile = TABLE[KEY][0]
        timed.append(tile)
        return 1.0 if tile == quick else 2.0

    monkeypatch.setattr(tune, "seconds", seconds)
    assert tune.measure(KEY, [quick, slow], lambda: None, 3) == {quick: 1.0}
    assert timed == [quick, slow, quick, quick]


SOUND = """
from alit_kernels.attention import tune
from alit_kernels.attention.configurations import TABLE, Tile

spills = Tile(128, 64, 4, 2)
for key, tile in ((("forward", 16, 4), Tile(64, 64, 4, 1)), (("backward_keys", 64, 2), spills)):
    current = TABLE[key][1]
    builds = tune.served(key, current, 90)
    assert builds and all(build.architecture == 90 for build in builds)
    plain = [i for i, b in enumerate(builds) if not b.rare]
    assert not any(tune.faults(key, current, 90, i) for i in plain[:1])
    assert any("spills" in fault for fault in tune.faults(key, tile, 90, plain[0])), key
"""


@pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
def test_a_tile_that_spills_is_found() -> None:
    """By the machine code of what it would serve, compiled in a process without the interpreter."""
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    subprocess.run([sys.executable, "-c", SOUND], check=True, env=environment)


def test_write_replaces_the_file(tmp_path: Path) -> None:
    path = tmp_path / "table.py"
    path.write_text("old")
    path.chmod(0o640)
    tune.write(path, "new")
    assert path.read_text() == "new" and list(tmp_path.iterdir()) == [path]
    assert path.stat().st_mode & 0o777 == 0o640


@pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
@pytest.mark.skipif(torch.cuda.is_available(), reason="the rehearsal runs on the CPU")
def test_rehearsal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Candidates run, what would change is printed, and nothing is changed."""
    launched = []

    def measure(key: tune.Key, tiles: list[Tile], *rest: object) -> dict[Tile, float]:
        tiles = list(tiles)
        times = recorded(key, tiles, *rest)
        launched.append((key, len(times)))
        return {tile: 1.0 if tile == tiles[0] else 0.5 for tile in times}

    recorded = tune.measure
    monkeypatch.setattr(tune, "measure", measure)
    before = tune.SOURCE.read_text(), dict(TABLE)
    tune.main(
        ["--rehearsal", "--head-dim", "16", "--kernel", "forward", "--kernel", "backward_keys"]
    )
    out = capsys.readouterr().out
    keys = [(kernel, 16, size) for kernel in ("forward", "backward_keys") for size in (2, 4)]
    assert launched == [(key, 2) for key in keys]
    assert '-    ("forward", 16, 2)' in out and '+    ("forward", 16, 2)' in out
    assert "rehearsal: nothing is changed" in out
    assert (tune.SOURCE.read_text(), dict(TABLE)) == before
