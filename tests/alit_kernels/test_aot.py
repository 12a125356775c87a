"""Ahead-of-time compilation: the shipped kernels have no fault, and each kind of fault is found.

Everything that compiles runs in a process of its own: this one has Triton's interpreter on.
"""

from __future__ import annotations

import sys
from contextlib import redirect_stderr
from dataclasses import replace
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import pytest

from alit_kernels import _machine_code as machine
from alit_kernels._chips import occupancy
from alit_kernels._machine_code import Expected, Result
from alit_kernels.aot import compare, main, read_results, write_results
from tests.helpers.forks import fork

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")

KERNELS = """
import triton, triton.language as tl

@triton.jit
def spilling(p_x, p_y, N: tl.constexpr):
    o = tl.arange(0, N)
    x = tl.load(p_x + o)
    tl.store(p_y + o, x * tl.sum(x))  # 512 values a thread, all alive during the sum

@triton.jit
def helper(x):
    return x + 1

@triton.jit
def narrow(p_x, p_y, pitch, BM: tl.constexpr, BN: tl.constexpr):
    o = tl.arange(0, BM)[:, None] * pitch + tl.arange(0, BN)[None, :]
    tl.store(p_y + o, helper(tl.load(p_x + o)))

@triton.jit
def product(p_x, p_y, M: tl.constexpr, N: tl.constexpr):
    o = tl.arange(0, M)[:, None] * N + tl.arange(0, N)[None, :]
    x = tl.load(p_x + o)
    tl.store(p_y + o, tl.dot(x, tl.trans(x)).to(tl.float16))

@triton.jit
def forgotten(p_x):
    tl.store(p_x, 1.0)
"""
BUILDS = """
import torch
from alit_kernels._builds import Expected
from alit_kernels._triton import launch
from .kernels import narrow, product, spilling

def record(recorder):
    x = torch.empty(16384, device="meta")
    with recorder("planted"):
        launch(spilling, (1,), p_x=x, p_y=x, N=16384, num_warps=1)
        launch(spilling, (0,), p_x=x, p_y=x, N=16384, num_warps=2)
    half = {"p_x": x.half(), "p_y": x.half()}
    tile = {**half, "BM": 64, "BN": 64}
    wide = {"narrow": Expected(wide=("p_x", "p_y"))}
    with recorder("odd pitch", wide):
        launch(narrow, (1,), **tile, pitch=63)
    with recorder("named twice", wide):
        launch(narrow, (1,), **tile, pitch=65)
    with recorder("good pitch", wide):
        launch(narrow, (1,), **tile, pitch=64)
    with recorder("rare", wide, rare=True):
        launch(narrow, (1,), **tile, pitch=63, num_warps=2)
    with recorder("no product", {"narrow": Expected(tensor_core=True)}):
        launch(narrow, (1,), **tile, pitch=63, num_warps=8)
    for rows, warps in ((64, 4), (16, 1)):
        with recorder(f"{rows} rows", {"product": Expected(tensor_core=True, wgmma=True)}):
            launch(product, (1,), **half, M=rows, N=rows, num_warps=warps)
"""


def call_main(path: Path, *arguments: str) -> None:
    sys.path.insert(0, str(path))
    with (path / "failures").open("w") as file, redirect_stderr(file):
        status = main(["--arch", "sm_90", "--jobs", "1", *arguments])
    sys.exit(status)


def aot(path: Path, *arguments: str) -> tuple[int, str, list[str]]:
    """Exit status, output and failures of the ``aot`` command."""
    process = fork(path / "said", call_main, path, *arguments)
    process.join()
    said = (path / "said").read_text()
    failures = (path / "failures").read_text().splitlines()
    return process.exitcode, said, failures


@pytest.mark.apart
def test_shipped_kernels(tmp_path: Path) -> None:
    """No fault on sm_90, every kernel covered, and machine code no worse than the committed result.

    Only what has changed since then is compiled, and no rare builds (attention on dense batches or with a key mask):
    ``make test-full`` compiles everything.
    """
    committed = str(ROOT / "benchmarks" / "results" / f"aot-triton-{version('triton')}.json")
    if not Path(committed).exists():
        pytest.skip(f"no committed machine code for Triton {version('triton')}")
    options = ("--common", "--check", "--compare", committed, "--unchanged-from", committed)
    status, said, failures = aot(tmp_path, *options)
    assert status == 0, (said, failures)


@pytest.mark.apart
def test_planted_faults(tmp_path: Path) -> None:
    package = tmp_path / "planted"
    package.mkdir()
    (package / "kernels.py").write_text(KERNELS)
    (package / "builds.py").write_text(BUILDS)
    result = tmp_path / "result.json"
    module = ("--module", "planted")
    status, _, lines = aot(tmp_path, "--check", *module, "--json", str(result))
    assert status == 1

    def faults(label: str) -> str:
        return " ".join(line for line in lines if f"[{label}]" in line)

    assert "spills" in faults("planted")
    assert "p_x: accesses of [2] bytes, expected 16" in faults("odd pitch")
    assert not faults("good pitch") and not faults("64 rows")
    assert faults("rare")
    assert "no tensor-core instruction" in faults("no product")
    assert "no wgmma" in faults("16 rows")
    uncovered = [line for line in lines if "no build covers" in line]
    assert uncovered == ["planted.kernels.forgotten: no build covers this kernel"]
    results = {r.label: r for r in read_results(result)}
    assert len(results) == 7, "an empty grid is no launch, and equal launches are one build"
    entry = results["64 rows"]
    assert entry.instructions["wgmma"] and entry.shared and 0 < entry.occupancy <= 1

    known = (*module, "--unchanged-from", str(result))
    status, said, failures = aot(tmp_path, "--common", "--check", *known)
    assert "6 of 6 builds are unchanged" in said and status == 1
    assert failures == [line for line in lines if "[rare]" not in line]
    worse = KERNELS.replace(
        "return x + 1", "return tl.exp(tl.sin(x.to(tl.float32))).to(tl.float16)"
    )
    (package / "kernels.py").write_text(worse)
    status, said, failures = aot(tmp_path, "--compare", str(result), *known)
    assert "3 of 7 builds are unchanged" in said and status == 1
    found = [line for line in failures if "instructions" in line]
    assert len(found) == 4 and all("planted.kernels.narrow" in line for line in found)


def test_too_much_shared_memory() -> None:
    """Shared memory above a block's limit of each architecture is a fault."""
    limits = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}
    limits |= dict.fromkeys((86, 89, 120), 99 << 10)
    for arch, limit in limits.items():
        assert machine.faults({"all": 100}, 0, limit, {}, arch, Expected()) == []
        (fault,) = machine.faults({"all": 100}, 0, limit + 1, {}, arch, Expected())
        assert fault == f"shared memory: {limit + 1} bytes, at most {limit}"
    columns = occupancy(100, 4, 64, 1 << 10, tensor_columns=1024)
    assert machine.faults({"all": 3}, 0, 0, {}, 100, Expected(), columns) == [
        "does not fit on a multiprocessor"
    ]


def test_compare() -> None:
    code = {"shared": 1024, "instructions": {"all": 100}, "occupancy": 0.5, "faults": []}
    turn = {"hot_loop_cycles": {"fma": 200}, "conflicts": 1.0, "unrolled": 2}
    good = Result("m.k", "a", 90, "", 64, 0, **code, **turn)
    committed = {good.key: good}
    assert compare([good], committed) == []
    changes = {
        "registers": replace(good, registers=128, occupancy=0.25),
        "stack": replace(good, stack=8),
        "instructions": replace(good, instructions={"all": 106}),
        "cycles of a turn 100 -> 106, bound fma": replace(good, hot_loop_cycles={"fma": 212}),
    }
    for word, changed in changes.items():
        (failure,) = compare([changed], committed)
        assert word in failure
    more = replace(good, instructions={"all": 105}, registers=72, unrolled=4)
    assert compare([more], committed) == [], "5 % and registers that cost nothing are admitted"
    renamed = replace(good, label="b")
    assert len(compare([renamed], committed)) == 2, "a new build and a missing one"
    assert len(compare([renamed], committed, [good.key])) == 1, "a new build; the other is left out"
    for elsewhere in (replace(good, arch=80), replace(good, kernel="n.k")):
        (failure,) = compare([elsewhere], committed)
        assert "not in the committed result" in failure


def test_results_are_read_as_written(tmp_path: Path) -> None:
    """Results are read as they were written; counts that only other builds have are stored as 0 and dropped."""
    first = Result(
        *("m.k", "a", 90, "f0", 64, 0, 8, 0.5, {"all": 9, "mma": 3}, {"alu": 4}, 1.5, 2),
        faults=["no wgmma"],
    )
    results = [first, replace(first, label="b", faults=[], instructions={"all": 5, "wgmma": 1})]
    results.append(
        replace(first, kernel="n.k", hot_loop_cycles={"fma": 7}, other_cycles={"alu": 2})
    )
    write_results(tmp_path / "new" / "result.json", results)
    assert read_results(tmp_path / "new" / "result.json") == results


def test_occupancy() -> None:
    """Occupancy equals that of NVIDIA's occupancy calculator."""
    assert occupancy(90, 4, 32, 0) == 1
    assert occupancy(90, 4, 255, 0) == 0.125
    assert occupancy(90, 4, 168, 0) == 0.1875
    assert occupancy(80, 8, 64, 80 << 10) == 0.25
    assert occupancy(90, 8, 64, 80 << 10) == 0.25
    assert occupancy(100, 4, 64, 1 << 10, tensor_columns=256) == 0.125


SASS = """
        /*0000*/                   MOV R1, c[0x0][0x28] ;                /* 0x00000a0000017a02 */
        /*0010*/                   LDG.E.128 R4, desc[UR4][R2.64] ;      /* 0x0000000402047981 */
        /*0020*/                   HGMMA.64x128x16.F32.BF16 R24, R100, gdesc[UR8] ;  /* 0x0 */
        /*0030*/                   FFMA R0, R4, R5, R0 ;                 /* 0x0000000504007223 */
        /*0040*/              @!P0 MUFU.EX2 R6, R0 ;                     /* 0x0000000000067308 */
        /*0050*/               @P0 BRA 0x20 ;                            /* 0xffffffc000000947 */
        /*0060*/                   STG.E.U16 desc[UR4][R2.64], R6 ;      /* 0x0000000602007986 */
        /*0070*/                   EXIT ;                                /* 0x000000000000794d */
        /*0080*/                   BRA 0x80;                             /* 0xfffffff000007947 */
        /*0090*/                   NOP;                                  /* 0x0000000000007918 */
"""


def test_reading_of_machine_code() -> None:
    code = machine.instructions(SASS)
    assert machine.counts(code) == {"all": 9, "exp2": 1, "ldg128": 1, "stg16": 1, "wgmma": 1}
    loop = machine.hot_loop(code)
    assert [instruction.address for instruction in loop] == [0x20, 0x30, 0x40, 0x50]
    assert machine.cycles(loop, 90) == {
        "issue": 4,
        "matrix": 64 * 128 * 16 // 4 // 512,
        "fma": 1,
        "special": 8,
    }
    assert machine.cycles(loop, 80)["fma"] == 2
    shared = machine.instructions("        /*0000*/  LDS.128 R4, [R2] ;\n" + SASS)
    assert machine.cycles(shared, 90, conflicts=2.5)["memory"] == 2.5 * 16 + 16 + 4


def test_interpreter_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(SystemExit, match="TRITON_INTERPRET"):
        main([])
