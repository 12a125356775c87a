"""The script that regenerates the launch configurations of attention, rehearsed in Triton's interpreter."""

from __future__ import annotations

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
    other = Tile(128, 32, 8, 1, "every")
    changed = tune.regenerated(source, {**TABLE, KEY: (other, TABLE[KEY][1])})
    (line,) = set(changed.splitlines()) - set(source.splitlines())
    assert line.strip().startswith('("forward", 64, 2): (Tile(128, 32, 8, 1, "every"), Tile(')
    namespace = {"Tile": Tile}
    exec(tune.rendered({KEY: (other, other)}), namespace)
    assert namespace["TABLE"] == {KEY: (other, other)}
    with pytest.raises(ValueError, match="source: expected a table"):
        tune.regenerated("nothing", TABLE)


def test_an_entry_gives_way_to_what_is_clearly_faster() -> None:
    a, b = Tile(64, 64, 4, 2), Tile(64, 32, 4, 2)
    assert tune.fastest(a, {a: 1.0, b: 0.9}) == b
    assert tune.fastest(a, {a: 1.0, b: 0.99}) == a
    assert tune.fastest(a, {b: 3.0}) == b, "the current one needs more than this GPU has"


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
