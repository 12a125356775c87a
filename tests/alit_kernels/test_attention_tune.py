"""The script that times launch configurations of attention, rehearsed in Triton's interpreter."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from alit_kernels._clock import Clock
from alit_kernels.attention import tune
from alit_kernels.attention.configurations import TABLE, Tile

KEY = ("forward", 64, 2)


def test_lines_are_those_of_the_table() -> None:
    lines = [tune.line(key, tiles) for key, tiles in TABLE.items()]
    assert eval("{" + "\n".join(lines) + "}", {"Tile": Tile}) == TABLE


A, B, C = Tile(64, 64, 4, 2), Tile(64, 32, 4, 2), Tile(32, 64, 4, 2)


def turns(middle: float, spread: float = 0.0) -> list[float]:
    """Seven times with this median and this interquartile range."""
    return [middle + spread * x for x in (-2.0, -0.5, -0.5, 0.0, 0.5, 0.5, 2.0)]


@pytest.mark.parametrize(
    ("times", "chosen"),
    (
        ({A: turns(1.0), B: turns(0.9)}, B),
        ({A: turns(1.0), B: turns(0.98)}, A),  # 2 % faster
        ({A: turns(1.0), B: turns(0.96)}, B),
        ({A: turns(1.0, 0.06), B: turns(0.9)}, A),  # within twice the spread of the present tile
        ({A: turns(1.0), B: turns(0.9, 0.06)}, A),  # within twice that of the other tile
        ({A: turns(1.0, 0.04), B: turns(0.9, 0.04)}, B),
        ({A: [1.0], B: [0.5]}, A),  # one turn has no spread
        ({B: turns(3.0), C: turns(2.0)}, C),  # the present tile does not fit this GPU
        ({}, A),
    ),
)
def test_an_entry_gives_way_to_what_is_clearly_faster(
    times: dict[Tile, list[float]], chosen: Tile
) -> None:
    assert tune.best(A, times) == chosen


def measured(
    monkeypatch: pytest.MonkeyPatch,
    seconds: dict[Tile, float],
    results: dict[Tile, float] | None = None,
    expected: float = 1.0,
) -> tuple[dict[Tile, list[float]], list[Tile], list[Tile]]:
    """Measured times of fake tiles with these seconds and results, the order of their turns, and refused tiles."""
    order: list[Tile] = []
    refused: list[Tile] = []

    def clocks(calls: dict[Tile, Callable[[], object]]) -> dict[Tile, Clock]:
        def timed(tile: Tile) -> float:
            calls[tile]()
            order.append(tile)
            return seconds[tile]

        return {tile: Clock("fake", partial(timed, tile)) for tile in calls}

    def call() -> list[torch.Tensor]:
        tile = TABLE[KEY][0]
        if tile == C:
            raise tune._too_large()[0](1, 0, "shared memory")
        return [torch.tensor([1.0, (results or {}).get(tile, 1.0)])]

    monkeypatch.setattr(tune, "clocks", clocks)
    times = tune.measure(
        *(KEY, list(seconds), call, [torch.tensor([1.0, expected])], 3),
        lambda tile, off: refused.append(tile),
    )
    return times, order, refused


needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")


@needs_triton
def test_tiles_take_turns_and_hopeless_ones_leave(monkeypatch: pytest.MonkeyPatch) -> None:
    """Slow tiles are dropped after the warm-up and the first round; tiles that need too much memory are left out."""
    before = dict(TABLE)
    times, order, refused = measured(monkeypatch, {A: 1.0, B: 2.0, C: 0.1})
    assert times == {A: [1.0, 1.0, 1.0]} and order == [A, B, A, B, A, A]
    assert not refused and before == TABLE


@needs_triton
@pytest.mark.parametrize("result", (1.1, float("nan"), float("inf")))
def test_a_wrong_tile_is_not_timed(result: float, monkeypatch: pytest.MonkeyPatch) -> None:
    times, order, refused = measured(monkeypatch, {A: 1.0, B: 0.1}, {B: result})
    assert times.keys() == {A} and B not in order and refused == [B]
    assert not measured(monkeypatch, {A: 1.0}, expected=1.1)[0], "nor the present one"


@needs_triton
@pytest.mark.skipif(torch.cuda.is_available(), reason="the rehearsal runs on the CPU")
def test_rehearsal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Candidates run and are verified, faster ones are printed, and known ones are not timed again."""
    launched = []

    def measure(key: tune.Key, tiles: list[Tile], *rest: object) -> dict[Tile, list[float]]:
        times = recorded(key, tiles, *rest)
        launched.append((key, [len(values) for values in times.values()]))
        return {tile: turns(1.0 if tile == tiles[0] else 0.5) for tile in times}

    recorded = tune.measure
    monkeypatch.setattr(tune, "measure", measure)
    monkeypatch.setattr(tune, "HOPELESS", float("inf"))
    before, found = dict(TABLE), tmp_path / "tiles.json"
    command = ["--rehearsal", "--head-dim", "16", "--json", str(found)]
    tune.main([*command, "--kernel", "forward"])
    tune.main([*command, "--kernel", "forward", "--kernel", "backward_keys"])
    out = capsys.readouterr().out
    keys = [(kernel, 16, size) for kernel in ("forward", "backward_keys") for size in (2, 4)]
    assert launched == [(key, [2, 2]) for key in keys] and "wrong" not in out
    assert "# 500000.0 us, before 1000000.0 us" in out
    lines = eval("{" + out + "}", {"Tile": Tile})
    assert list(lines) == keys and all(lines[key] != TABLE[key] for key in keys)
    written = json.loads(found.read_text())
    assert list(written) == [" ".join(map(str, key)) for key in keys]
    for key, entry in written.items():
        assert Tile(*entry["present"]) != Tile(*entry["chosen"]) and len(entry["tiles"]) == 2, key
        assert [tile["spread_us"] for tile in entry["tiles"]] == [0.0, 0.0]
    assert before == TABLE
