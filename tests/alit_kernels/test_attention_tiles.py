"""The Triton kernels of attention: tiles, independence of launches from lengths, and the work issued."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import pytest
import torch

from alit_kernels import attention, stops_causal
from alit_kernels.attention import configurations, issued_work
from alit_kernels.attention.__main__ import table as issued_work_table
from alit_kernels.attention.cases import Case, make
from alit_kernels.attention.problem import Problem
from tests.helpers.attention import check_forward, check_gradients
from tests.helpers.forks import fork
from tests.helpers.targets import DEVICE, Target, targets


@pytest.mark.parametrize("target", targets("triton")[1:])
@pytest.mark.parametrize("mask_all", (False, True))
@pytest.mark.parametrize("columns", (16, 64))
def test_every_kind_of_tile(
    columns: int, mask_all: bool, target: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tiles of other sizes than the table's are right, with only the last step masked or all of them."""
    tile = configurations.Tile(32, columns, 4, 2, mask_all)
    for kernel in configurations.KERNELS:
        monkeypatch.setitem(configurations.TABLE, (kernel, 16, 2), (tile,) * 3)
    for stops in ("", "random"):
        case = Case((16, 64, 65, 33, 63), 1, 16, spare=3, stops=stops)
        x = make(case, dtype=torch.float16, device=target.device)
        check_forward(x, target)
        check_gradients(x, target)


@pytest.mark.parametrize("target", targets("triton")[1:])
def test_offsets_that_begin_late(target: Target) -> None:
    """Wrong first offsets, which are not checked on a GPU, cause no reads outside, and sequences are right."""
    triton_ = pytest.importorskip("alit_kernels.attention.triton_")
    rows = torch.full((350, 1, 16), torch.nan, device=target.device)
    q = rows[200:].normal_()
    memory = torch.tensor([-192, 100, 150], dtype=torch.int32, device=target.device)
    out, _ = triton_.attention(Problem(q, q, q, memory[1:], None, 50, 50, None, None, 0.25))
    assert out[64:100].isfinite().all()
    expected = attention(q[None, 100:], q[None, 100:], q[None, 100:])
    torch.testing.assert_close(out[None, 100:], expected)


def check_sizes() -> None:
    from alit_kernels.attention import kernels

    sizes = {"sequences", "length", "key_length", "lse_b", "lse_h", "mask_b", "stop_b"}
    for name in ("forward_kernel", "backward_queries_kernel", "backward_keys_kernel"):
        parameters = getattr(kernels, name).params
        found = {p.name for p in parameters if p.name in sizes}
        fixed = {p.name for p in parameters if p.is_constexpr or not p.do_not_specialize}
        assert found == sizes and not found & fixed, (name, found & fixed)


@pytest.mark.parametrize("target", targets("triton")[1:])
def test_kernels_do_not_depend_on_lengths(target: Target, tmp_path: Path) -> None:
    """Nothing that follows from the lengths is a compile-time constant or specialized on divisibility."""
    process = fork(tmp_path / "said", check_sizes)  # the interpreter is off there
    process.join()
    assert process.exitcode == 0, (tmp_path / "said").read_text()


def test_limits_of_head_dimensions() -> None:
    """Wider heads than the kernels take: an explicit request raises and names the reason."""
    q = torch.randn(1, 3, 1, 520)
    if "triton" in [t.values[0].implementation for t in targets("triton") if not t.marks]:
        with pytest.raises(ValueError, match="head dimension 520 exceeds 512"):
            attention(q.to(DEVICE), q.to(DEVICE), q.to(DEVICE), implementation="triton")
    assert attention(q, q, q).shape == q.shape


def test_issued_work_counts_what_the_kernel_does() -> None:
    """``issued`` equals the steps and programs of the kernels, counted one by one."""
    tile = configurations.Tile(64, 32, 4, 2)
    for length, issued in {0: 0, 1: 64, 64: 64, 65: 128, 129: 192}.items():
        assert tile.issued(length, 32) == 32 * issued
    for length, issued in {0: 0, 1: 32, 32: 32, 33: 64, 289: 320}.items():
        assert tile.issued(64, length) == 64 * issued
    assert issued_work(configurations.Tile(128, 128, 4, 2), 289) == Fraction(384**2, 289**2)


def visited(kernel: str, launch: configurations.Tile, stops: torch.Tensor, keys: int) -> int:
    """Number of tiles that the loops of a kernel's programs visit.

    They run to the largest stop of a tile of queries, or, in the kernel of the keys' gradients, over tiles of queries
    with a stop beyond the first key of the tile.
    """
    if kernel == "backward_keys":
        reach = [int(block.max()) for block in stops.split(launch.columns)]
        return sum(r > first for first in range(0, keys, launch.rows) for r in reach)
    return sum(-(-int(block.max()) // launch.columns) for block in stops.split(launch.rows))


@pytest.mark.parametrize("architecture", (80, 90, 100))
@pytest.mark.parametrize("kernel", configurations.KERNELS)
def test_stops_save_tiles(kernel: str, architecture: int) -> None:
    """At 1024 tokens causal order visits at most 0.6 of the tiles, a prefix of a quarter at most 0.45."""
    causal, prefix = stops_causal(1024), torch.full((1024,), 256)
    for name, head_dim, size in configurations.TABLE:
        if name == kernel:
            dtype = torch.float32 if size == 4 else torch.bfloat16
            launch = configurations.tile(kernel, head_dim, dtype, architecture)
            every = launch.issued(1024, 1024) // (launch.rows * launch.columns)
            assert visited(kernel, launch, causal, 1024) <= 0.6 * every
            assert visited(kernel, launch, prefix, 1024) <= 0.45 * every


@pytest.mark.parametrize("target", targets("triton")[1:])
def test_the_kernels_visit_no_other_tiles(target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    """Loads of keys or queries, counted in the interpreter, equal the visited tiles."""
    if target.device == "cuda":
        pytest.skip("the interpreter counts")
    from alit_kernels.attention import kernels

    loads = {"forward": "_forward_step", "backward_queries": "_query_gradient_step"}
    loads["backward_keys"] = "_key_gradient_step"
    launch = configurations.Tile(16, 16, 4, 2, True)
    for kernel in loads:
        monkeypatch.setitem(configurations.TABLE, (kernel, 16, 4), (launch,) * 3)
    counts = dict.fromkeys(loads, 0)
    for kernel, name in loads.items():
        step = getattr(kernels, name)

        def counted(*arguments: object, kernel: str = kernel, step: object = step) -> object:
            counts[kernel] += 1
            return step(*arguments)

        monkeypatch.setattr(kernels, name, counted)
    q, k, v = (torch.randn(1, 64, 1, 16, requires_grad=True) for _ in range(3))
    for stops in (stops_causal(64), torch.full((64,), 16, dtype=torch.int32)):
        counts.update(dict.fromkeys(loads, 0))
        attention(q, k, v, key_stop=stops, implementation="triton").sum().backward()
        assert counts == {kernel: visited(kernel, launch, stops, 64) for kernel in loads}


def test_the_page_shows_the_issued_work() -> None:
    page = Path(__file__).parents[2] / "docs" / "attention-machine-code.md"
    assert issued_work_table() in page.read_text(), "run python -m alit_kernels.attention"
