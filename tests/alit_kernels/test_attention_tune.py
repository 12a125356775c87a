"""The script that times launch configurations of attention, rehearsed in Triton's interpreter."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
import torch

from alit_kernels.attention import tune
from alit_kernels.attention.configurations import TABLE, Tile

KEY = ("forward", 64, 2)


def test_lines_are_those_of_the_table() -> None:
    lines = [tune.line(key, tiles) for key, tiles in TABLE.items()]
    assert eval("{" + "\n".join(lines) + "}", {"Tile": Tile}) == TABLE


def test_an_entry_gives_way_to_what_is_clearly_faster() -> None:
    a, b, c = Tile(64, 64, 4, 2), Tile(64, 32, 4, 2), Tile(32, 64, 4, 2)
    assert tune.best(a, {a: 1.0, b: 0.9}) == b
    assert tune.best(a, {a: 1.0, b: 0.99}) == a
    assert tune.best(a, {b: 3.0, c: 2.0}) == c, "the current one needs more than this GPU has"
    assert tune.best(a, {}) == a


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


@pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
@pytest.mark.skipif(torch.cuda.is_available(), reason="the rehearsal runs on the CPU")
def test_rehearsal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Candidates run, and what is faster stands in the lines."""
    launched = []

    def measure(key: tune.Key, tiles: list[Tile], *rest: object) -> dict[Tile, float]:
        tiles = list(tiles)
        times = recorded(key, tiles, *rest)
        launched.append((key, len(times)))
        return {tile: 1.0 if tile == tiles[0] else 0.5 for tile in times}

    recorded = tune.measure
    monkeypatch.setattr(tune, "measure", measure)
    before = dict(TABLE)
    tune.main(
        ["--rehearsal", "--head-dim", "16", "--kernel", "forward", "--kernel", "backward_keys"]
    )
    out = capsys.readouterr().out
    keys = [(kernel, 16, size) for kernel in ("forward", "backward_keys") for size in (2, 4)]
    assert launched == [(key, 2) for key in keys]
    assert "# 500000 us, before 1000000 us" in out
    found = eval("{" + out + "}", {"Tile": Tile})
    assert list(found) == keys and all(found[key] != TABLE[key] for key in keys)
    assert before == TABLE
