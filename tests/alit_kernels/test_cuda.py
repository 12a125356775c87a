"""CUDA sources compile for every architecture, and have no race when emulated on the CPU.

``make sanitize`` runs them, and the C++ kernels, under the other sanitizers.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from alit_kernels import append, compact, pack, unpack
from alit_kernels._library import ops
from tests.helpers.emulation import COMPILER, CSRC, NO_COMPILER, emulated_cuda
from tests.helpers.ops import tensors

SOURCES = sorted(CSRC.glob("*/*.cu"))
needs_compiler = pytest.mark.skipif(COMPILER is None, reason=NO_COMPILER)


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
@pytest.mark.apart
@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_compiles_without_spills(source: Path, tmp_path: Path) -> None:
    """Sources compile without register spills for sm_80, sm_90 and sm_100 (nvcc 12.8 and later)."""
    known = subprocess.run(["nvcc", "--list-gpu-arch"], capture_output=True, text=True, check=True)
    architectures = [a for a in (80, 90, 100) if f"compute_{a}\n" in known.stdout + "\n"]
    assert {80, 90} <= set(architectures)
    targets = [x for a in architectures for x in ("-gencode", f"arch=compute_{a},code=sm_{a}")]
    done = subprocess.run(
        [
            *("nvcc", "-std=c++17", "-O3", "-t", "3", *targets, "-Xptxas", "-v"),
            *("-c", str(source), "-o", str(tmp_path / "kernels.o")),
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    spills = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", done.stderr)
    assert len(spills) >= 10 * len(architectures)
    assert all(spill == ("0", "0") for spill in spills)


def build(tmp_path: Path, *options: str) -> Path:
    assert COMPILER is not None
    program = tmp_path / "ragged_cuda_test"
    sources = [str(CSRC / "tests" / f"{program.name}.cpp"), str(CSRC / "ragged" / "ragged.cpp")]
    flags = ["-std=c++17", "-g", "-O0", "-pthread", "-fno-sanitize-recover=all"]
    flags += ["-fsanitize=thread", "-DALIT_EMULATE_THREADS", "-DALIT_BLOCK_THREADS=64"]
    done = subprocess.run(
        [COMPILER, *flags, *options, *sources, "-o", str(program)],
        capture_output=True,
        text=True,
        check=False,
    )
    if "cannot find" in done.stderr and "san" in done.stderr:
        pytest.skip("g++ has no library for ThreadSanitizer")
    assert done.returncode == 0, done.stderr
    return program


@needs_compiler
def test_errors_are_our_own(tmp_path: Path) -> None:
    """csrc/launch.h as compiled by nvcc reports errors of a runtime whose calls ``launch_test.cpp`` makes fail."""
    assert COMPILER is not None
    tests, program = CSRC / "tests", tmp_path / "launch_test"
    options = ("-std=c++17", "-Wall", "-Wextra", "-Werror", "-I", str(tests / "runtime"))
    source = str(tests / "launch_test.cpp")
    subprocess.run([COMPILER, *options, source, "-o", str(program)], check=True)
    done = subprocess.run([program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


@pytest.mark.apart
@needs_compiler
def test_races(tmp_path: Path) -> None:
    """With a block's threads as real threads, ThreadSanitizer finds no race, and finds one without the barriers."""
    for options, clean in (((), True), (("-DALIT_EMULATE_WITHOUT_BARRIERS",), False)):
        program = build(tmp_path, *options)
        done = subprocess.run([program], capture_output=True, text=True, check=False)
        if "unexpected memory mapping" in done.stderr:
            pytest.skip("ThreadSanitizer does not know this kernel's memory layout")
        assert (done.returncode == 0) == clean, done.stderr[:3000]
        assert clean or "data race" in done.stderr


@needs_compiler
def test_debug_switch_turns_flags_into_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Values are not checked before a launch on a GPU; with the debug switch, flags set by kernels raise."""
    packed = torch.randn(4, 2)
    few, far, keep = (
        torch.tensor([0, 2, 4], dtype=torch.int32),
        torch.tensor([0, 3, 9], dtype=torch.int32),
        torch.ones(4, dtype=torch.bool),
    )
    select = torch.ones(2, dtype=torch.bool)
    calls = {
        "lengths: expected": lambda: ops()["cumulative_offsets"](
            torch.tensor([2, -1]), implementation="cuda"
        ),
        "alit_kernels.pack: capacity": lambda: ops()["pack"](
            packed[None].expand(2, 4, 2), torch.tensor([2, 2]), 3, implementation="cuda"
        ),
        "alit_kernels.unpack: offsets": lambda: ops()["unpack"](
            packed, far, 9, 0.0, implementation="cuda"
        ),
        "alit_kernels.compact: capacity": lambda: ops()["compact"](
            packed, few, keep, 3, implementation="cuda"
        ),
        "alit_kernels.append: capacity": lambda: ops()["append"](
            packed, few, packed[:1], select, 5, implementation="cuda"
        ),
        "alit_kernels.unpack_backward: lengths": lambda: ops()["unpack_backward"](
            packed.view(4, 1, 2), few, 4, implementation="cuda"
        ),
    }
    for op in ops().values():
        monkeypatch.setattr(op, "_check", None)  # as on a GPU
    with emulated_cuda():
        for call in calls.values():
            call()
        monkeypatch.setenv("ALIT_KERNELS_DEBUG", "1")
        for message, call in calls.items():
            with pytest.raises(ValueError, match=message):
                call()
        offsets = torch.tensor([0, 2, 4], dtype=torch.int32)
        pack(packed[None], torch.tensor([4]), capacity=4, implementation="cuda")
        unpack(packed, offsets, max_length=2, implementation="cuda")
        compact(packed, offsets, keep, capacity=4, implementation="cuda")
        append(packed, offsets, packed, capacity=12, implementation="cuda")


@needs_compiler
def test_values_that_do_not_fit_are_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the switch, values that do not fit are dropped as by the unchecked reference."""
    for op in ops().values():
        monkeypatch.setattr(op, "_check", None)
    padded, offsets = torch.randn(2, 3, 4), torch.tensor([0, 3, 6], dtype=torch.int32)
    target_row = torch.tensor([3, -1, 9, 0], dtype=torch.int32)
    packed, select = torch.randn(4, 4), torch.ones(2, dtype=torch.bool)
    far = torch.tensor([0, 3, 99], dtype=torch.int32)
    keep = torch.tensor([True, True, False, True])
    calls = {
        "pack": (padded, torch.tensor([3, 3]), 4),
        "unpack_backward": (padded, offsets, 4),
        "compact_backward": (packed, target_row),
        "unpack": (packed, offsets, 3, 0.5),
        "compact": (packed, torch.tensor([0, 1, 4], dtype=torch.int32), keep, 2),
        "append": (packed, torch.tensor([0, 1, 4], dtype=torch.int32), packed[:2], select, 5),
    }
    with emulated_cuda():
        for name, arguments in calls.items():
            ours = ops()[name](*arguments, implementation="cuda")
            expected = ops()[name](*arguments, implementation="reference")
            for a, b in zip(tensors(ours), tensors(expected), strict=True):
                assert torch.equal(a, b), name
        assert ops()["unpack"](packed, far, 3, 0.0, implementation="cuda").isfinite().all()
