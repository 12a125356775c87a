"""Cycle counts read from PTX: trip counts, bank conflicts, unrolling.

Kernels are compiled in a process of their own: this one has Triton's interpreter on.
"""

from __future__ import annotations

import json
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

from alit_kernels import _ptx, _ptx_machine
from tests.helpers.forks import fork

LANES = np.arange(32)
EVERY = np.ones(32, dtype=bool)


@pytest.mark.parametrize(
    ("addresses", "size", "expected"),
    [
        (4 * LANES, 4, 1),
        (np.zeros(32, dtype=int), 4, 1),
        (8 * LANES, 4, 2),
        (128 * LANES, 4, 32),
        (132 * LANES, 4, 1),
        (2 * LANES, 2, 1),
        (8 * LANES, 8, 2),
        (16 * LANES, 16, 4),
        (512 * LANES, 16, 32),
        (512 * (LANES % 16), 16, 32),  # the same 16 rows, but in other quarters
        (512 * (LANES // 16), 16, 2),  # each half one row: its quarters are one
        (16 * (LANES // 2), 16, 2),
        (528 * LANES, 16, 4),
    ],
)
def test_cycles_of_shared_memory(addresses: np.ndarray, size: int, expected: int) -> None:
    assert _ptx_machine.wavefronts(addresses, EVERY, size) == expected


def test_lanes_that_do_not_take_part() -> None:
    assert _ptx_machine.wavefronts(128 * LANES, LANES < 5, 4) == 5
    assert _ptx_machine.wavefronts(128 * LANES, LANES < 0, 4) == 0


PTX = """
.visible .entry kernel(.param .u64 kernel_param_0, .param .u32 kernel_param_1)
{
	.reg .pred 	%p<9>;
	ld.param.b64 	%rd1, [kernel_param_0];
	ld.param.b32 	%r1, [kernel_param_1];
	mov.u32 	%r2, %tid.x;
	mov.u32 	%r3, %ctaid.x;
	ld.global.b32 	%r4, [%rd1];            // data
	add.s32 	%r5, %r3, 3;
	shl.b32 	%r6, %r2, 7;
	mov.b32 	%r7, global_smem;
	add.s32 	%r8, %r7, %r6;
	mov.b32 	%r9, -3;
$L__BB0_1:
	st.shared.b32 	[%r8+4], %r2;
	mov.u32 %r11, 0x0;
	@%p4 ld.shared.v2.b32 	{%r10, %r11}, [%r7+8];
	add.f32 	%r12, %r10, %r11;
	add.s32 	%r9, %r9, 2;
	setp.lt.s32 	%p1, %r9, %r1;
	@%p1 bra 	$L__BB0_1;
	setp.eq.b32 	%p2, %r5, 7;
	@!%p2 bra 	$L__BB0_3;
	bar.sync 	0;
$L__BB0_3:
	setp.eq.b32 	%p5, %r4, 0;
	@%p5 bra 	$L__BB0_4;
	bar.sync 	0;
$L__BB0_4:
	setp.lt.f32 	%p3, %r12, 0f3F800000;
	@%p3 bra 	$L__BB0_3;
	st.shared.b32 	[%r12], %r12;
	ret;
}
"""


def test_a_program_is_run() -> None:
    blocks = _ptx.parse(PTX.replace("st.shared.b32 \t[%r12], %r12;", ""))
    for program, rare, even, data in ((4, 0, 1, 0), (5, 0, 0, 0), (5, 1, 0, 1), (5, 9, 0, 1)):
        before = [block.visits for block in blocks]
        _ptx_machine.run(blocks, 64, {1: 6}, [(program,)], (9,), rare=rare)
        now = [block.visits - x for block, x in zip(blocks, before, strict=True)]
        assert now == [1, 5, 1, even, 1, data, 1, 1], "-3, -1, 1, 3, 5; data go no way back"
    assert [block.label for block in _ptx.hot_loop(blocks)] == ["$L__BB0_1"]


ROTATED = """
	ld.global.b32 	%r1, [%rd1];                   // data
	setp.lt.s32 	%p1, %r1, 0;
	@!%p1 bra 	$L__BB0_2;
	ret;
$L__BB0_1:
	add.s32 	%r3, %r3, 1;
$L__BB0_2:
	setp.eq.b32 	%p2, %r1, 0;
	@%p2 bra 	$L__BB0_4;
	setp.eq.b32 	%p3, %r1, 1;
	@%p3 bra 	$L__BB0_1;
	bar.sync 	0;
	bra.uni 	$L__BB0_1;
$L__BB0_4:
	ret;
"""


@pytest.mark.parametrize(
    ("rare", "visits"),
    [
        (0, [1, 1, 0, 0, 0, 0, 0]),  # an early return
        (1, [1, 0, 0, 1, 0, 0, 1]),  # past it, and past the loop
        (2, [1, 0, 1, 2, 1, 0, 1]),  # one turn, the shorter way
        (3, [1, 0, 1, 2, 1, 1, 1]),  # one turn, all of it
        (9, [1, 0, 1, 2, 1, 1, 1]),
    ],
)
def test_data_take_the_shorter_way_to_the_end(rare: int, visits: list[int]) -> None:
    """Programs take the shorter branch, the first ``rare`` times the longer one, for any order of a loop's blocks."""
    blocks = _ptx.parse(ROTATED)
    _ptx_machine.run(blocks, 32, {}, rare=rare)
    assert [block.visits for block in blocks] == visits


def test_a_loop_with_two_ways_back() -> None:
    """A loop with two back edges, as made by ``continue``, is one loop up to the last of them."""
    ptx = "$L__BB0_1:\n mov.u32 %r1, 0;\n @%p1 bra $L__BB0_1;\n add.s32 %r1, %r1, 1;\n @p bra $L__BB0_1;\n ret;\n"
    assert [len(block.statements) for block in _ptx.hot_loop(_ptx.parse(ptx))] == [2, 2]


def test_conflicts_are_counted() -> None:
    blocks = _ptx.parse(PTX.replace("st.shared.b32 \t[%r12], %r12;", ""))
    _ptx_machine.walk(blocks, 64)
    (loop,) = _ptx.hot_loop(blocks)
    assert (loop.shared, loop.conflict_free) == (32 + 1, 1 + 2)
    assert _ptx.conflicts([loop]) == 11


def test_what_cannot_be_run() -> None:
    with pytest.raises(ValueError, match=r"st.shared.b32 \[%r12\]: the address depends on data"):
        _ptx_machine.walk(_ptx.parse(PTX), 64)
    endless = _ptx.parse("$L__BB0_1:\n\tbra.uni \t$L__BB0_1;\n")
    with pytest.raises(ValueError, match="visits more than"):
        _ptx_machine.run(endless, 32, {})


KERNELS = """
import triton, triton.language as tl

@triton.jit
def product(p_x, p_y, p_out, length, D: tl.constexpr, N: tl.constexpr, PRECISION: tl.constexpr):
    o_n, o_d = tl.arange(0, N), tl.arange(0, D)
    p_tile = o_n[:, None] * D + o_d[None, :]
    x = tl.load(p_x + p_tile)
    total = tl.zeros([N, N], tl.float32)
    for first in range(0, length, N):
        y = tl.load(p_y + first * D + p_tile)
        total += tl.dot(x, tl.trans(y), input_precision=PRECISION)
    tl.store(p_out + tl.program_id(0) * N * N + o_n[:, None] * N + o_n[None, :], total)
"""


def count_cycles(path: Path) -> None:
    sys.path.insert(0, str(path))
    import torch
    from planted_cycles import product

    from alit_kernels import _launch_cycles
    from alit_kernels._triton import launch

    def call(dtype: torch.dtype, size: int, precision: str) -> None:
        x = torch.empty(1 << 20, dtype=dtype, device="meta")
        given = {"p_x": x, "p_y": x, "p_out": x.float(), "length": 640, "D": 64, "N": size}
        launch(product, (3, 5), **given, PRECISION=precision)

    found = {}
    for name, *what in (
        ("half", torch.float16, 64, "ieee"),
        ("float32", torch.float32, 32, "ieee"),
    ):
        (one,) = _launch_cycles.launches(lambda what=what: call(*what), 90)
        cost = _launch_cycles.cost(one)
        found[name] = (cost.programs, cost.turns, cost.cycles, one.build.result().conflicts)
    (path / "found").write_text(json.dumps(found))


@pytest.mark.apart
@pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
def test_a_call(tmp_path: Path) -> None:
    """Matrix cycles of a product of known size are exact, and plain float32 has bank conflicts."""
    (tmp_path / "planted_cycles.py").write_text(KERNELS)
    process = fork(tmp_path / "said", count_cycles, tmp_path)
    process.join()
    assert process.exitcode == 0, (tmp_path / "said").read_text()
    found = json.loads((tmp_path / "found").read_text())
    programs, turns, cycles, conflicts = found["half"]
    assert (programs, turns, conflicts) == (15, 10, 1)
    assert cycles["matrix"] == 15 * 640 * 64 * 64 / 512, "512 multiply-adds a cycle of a scheduler"
    programs, turns, cycles, conflicts = found["float32"]
    assert (programs, turns) == (15, 20) and conflicts > 2
    assert cycles["fma"] >= 15 * 640 * 32 * 64 / 32
    assert cycles["memory"] > cycles["fma"]
