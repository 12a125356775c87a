"""Compile every Triton kernel for GPUs that are not here, and read the machine code.

Every ``kernels.py`` of an op has ``builds() -> Iterator[Build]``: one :class:`Build` for each kernel and shipped launch
configuration. ``python -m alit_kernels.aot --arch sm_80,sm_90,sm_100`` compiles them all and prints registers, spills,
shared memory, occupancy, instruction counts and the predicted bound. ``--check`` fails on spills, too much shared
memory, a missing tensor-core instruction, accesses narrower than declared, or a kernel without a build; ``--compare
FILE`` on machine code that became worse than a committed result of the same Triton version. ``--common`` leaves out the
builds that are declared rare.
"""

from __future__ import annotations

import argparse
import ast
import importlib
import inspect
import json
import multiprocessing
import os
import pkgutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

from . import _machine_code as machine

ARCHITECTURES = (80, 90, 100)


@dataclass(frozen=True)
class Build:
    """One kernel at one shipped configuration.

    Attributes:
        kernel: the ``triton.jit`` function.
        label: what the table calls it: "forward d=64 bfloat16 M128 N64".
        signature: argument -> Triton type ("*bf16", "*fp32", "i32", "fp32"); constants are left out.
        constants: ``tl.constexpr`` argument -> value.
        divisible: arguments that are multiples of 16 at a real launch (pointers of fresh tensors, row pitches).
        num_warps, num_stages, fp_fusion: launch options.
        architectures: those it is shipped for.
        tensor_core: the kernel declares a tensor-core product: matrix instructions must appear.
        wgmma: on sm_90 that product must be ``wgmma`` (tiles of at least 64 rows and 4 warps).
        wide: pointer arguments whose base and row pitch are divisible: every access must be of 16 bytes.
        rare: a further case of a kernel that another build covers; ``--common`` leaves it out.
    """

    kernel: Any
    label: str
    signature: Mapping[str, str]
    constants: Mapping[str, Any] = field(default_factory=dict)
    divisible: tuple[str, ...] = ()
    num_warps: int = 4
    num_stages: int = 2
    fp_fusion: bool = True
    architectures: tuple[int, ...] = ARCHITECTURES
    tensor_core: bool = False
    wgmma: bool = False
    wide: tuple[str, ...] = ()
    rare: bool = False

    def key(self, arch: int) -> str:
        """What names this build for one architecture in a result file."""
        return f"{self.kernel.__module__}.{self.kernel.__name__} [{self.label}] sm_{arch}"


@dataclass
class Result:
    """What the machine code of one build for one architecture says."""

    kernel: str
    label: str
    arch: int
    registers: int
    stack: int
    shared: int
    occupancy: float
    instructions: dict[str, int]
    bound: str
    hot_loop_cycles: dict[str, int]
    faults: list[str]

    @property
    def key(self) -> str:
        return f"{self.kernel} [{self.label}] sm_{self.arch}"


def modules(package: str = "alit_kernels") -> list[str]:
    """Names of all ``kernels`` modules of a package."""
    path = importlib.import_module(package).__path__
    names = (info.name for info in pkgutil.walk_packages(path, package + "."))
    return sorted(name for name in names if name.endswith(".kernels"))


def uncovered(module: ModuleType) -> list[str]:
    """Kernels of a module without a build: its ``triton.jit`` functions that are launched.

    A function is launched unless another ``triton.jit`` function calls it and nothing subscripts it with a grid.
    """
    tree = ast.parse(inspect.getsource(module))
    kernels = {name for name, value in vars(module).items() if _is_kernel(value, module)}
    called, launched = set(), set()
    for function in (node for node in tree.body if isinstance(node, ast.FunctionDef)):
        for node in ast.walk(function):
            if isinstance(node, ast.Subscript) and isinstance(node.value, ast.Name):
                launched.add(node.value.id)
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                called |= {node.func.id} if function.name in kernels else set()
    covered = {build.kernel.__name__ for build in module.builds()}
    return sorted(kernels - (called - launched) - covered)


def _is_kernel(value: Any, module: ModuleType) -> bool:
    return type(value).__name__ == "JITFunction" and value.__module__ == module.__name__


def compiled(build: Build, arch: int) -> Any:
    """What Triton makes of a build for one architecture.

    Raises:
        what Triton raises where the kernel does not compile.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = build.kernel.arg_names
    types = {n: "constexpr" if n in build.constants else build.signature[n] for n in names}
    attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in build.divisible}
    return triton.compile(
        ASTSource(build.kernel, types, dict(build.constants), attributes),
        target=GPUTarget("cuda", arch, 32),
        options={
            "num_warps": build.num_warps,
            "num_stages": build.num_stages,
            "enable_fp_fusion": build.fp_fusion,
        },
    )


def compile_build(build: Build, arch: int) -> Result:
    """Compile one build for one architecture and read its machine code; raises as :func:`compiled`."""
    found = compiled(build, arch)
    meta = found.metadata
    registers, stack, sass = disassemble(found.asm["cubin"])
    code = machine.instructions(sass)
    columns = getattr(meta, "tmem_size", None) or 0
    bound, cycles = machine.predicted_bound(machine.hot_loop(code), arch)
    types = {n: build.signature[n] for n in build.kernel.arg_names if n not in build.constants}
    pointers = [name if kind.startswith("*") else "" for name, kind in types.items()]
    widths = machine.access_widths(found.asm["ptx"], pointers)
    result = Result(
        kernel=f"{build.kernel.__module__}.{build.kernel.__name__}",
        label=build.label,
        arch=arch,
        registers=registers,
        stack=stack,
        shared=meta.shared,
        occupancy=machine.occupancy(arch, meta.num_warps, registers, meta.shared, columns),
        instructions=machine.counts(code),
        bound=bound,
        hot_loop_cycles=cycles,
        faults=[],
    )
    result.faults = _faults(build, result, widths)
    return result


def disassemble(cubin: bytes) -> tuple[int, int, str]:
    """Registers, stack bytes and listing, from the cuobjdump that ships inside Triton."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage, sass = (
            subprocess.run([tool, option, file.name], capture_output=True, text=True, check=True)
            for option in ("-res-usage", "-sass")
        )
    values = dict(part.split(":") for part in usage.stdout.split() if part.count(":") == 1)
    return int(values["REG"]), int(values["STACK"]), sass.stdout


def _faults(build: Build, result: Result, widths: dict[str, set[int]]) -> list[str]:
    """What ``--check`` forbids."""
    count, faults = result.instructions, []
    if result.stack or count.get("local"):
        faults.append(f"spills: {result.stack} bytes of stack, {count.get('local', 0)} accesses")
    limit = machine.LIMITS[result.arch].shared_block
    if result.shared > limit:
        faults.append(f"shared memory: {result.shared} bytes, at most {limit}")
    if build.tensor_core and not any(count.get(name) for name in ("mma", "wgmma", "tcgen05")):
        faults.append("no tensor-core instruction")
    if build.wgmma and result.arch == 90 and not count.get("wgmma"):
        faults.append("no wgmma")
    for name in build.wide:
        narrow = sorted(size for size in widths.get(name, ()) if size != 16)
        if narrow:
            faults.append(f"{name}: accesses of {narrow} bytes, expected 16")
    return faults


def compare(
    results: list[Result], committed: Mapping[str, Any], left_out: Iterable[str] = ()
) -> list[str]:
    """What became worse: registers that cost occupancy, spills, or instructions by more than 5 %.

    A build must be in both, but for those of the keys ``left_out``, which were not compiled.
    """
    old = {Result(**entry).key: Result(**entry) for entry in committed["results"]}
    worse = []
    for new in results:
        before = old.get(new.key)
        if before is None:
            worse.append(f"{new.key}: not in the committed result; add it with --json")
            continue
        if new.occupancy < before.occupancy:
            worse.append(
                f"{new.key}: occupancy {before.occupancy:.0%} -> {new.occupancy:.0%}, registers"
                f" {before.registers} -> {new.registers}, shared {before.shared} -> {new.shared}"
            )
        if new.stack > before.stack:
            worse.append(f"{new.key}: stack {before.stack} -> {new.stack} bytes")
        if new.instructions["all"] > 1.05 * before.instructions["all"]:
            worse.append(
                f"{new.key}: instructions {before.instructions['all']} -> {new.instructions['all']}"
            )
    arches = {new.arch for new in results}
    gone = {key for key, entry in old.items() if entry.arch in arches} - {n.key for n in results}
    gone -= set(left_out)
    return worse + [f"{key}: committed, but no longer built" for key in sorted(gone)]


def _job(module: str, position: int, arch: int) -> Result:
    build = list(importlib.import_module(module).builds())[position]
    try:
        return compile_build(build, arch)
    except Exception as error:
        raise RuntimeError(f"{module} [{build.label}] does not compile for sm_{arch}") from error


def compile_all(
    names: list[str], architectures: tuple[int, ...], jobs: int, common: bool = False
) -> list[Result]:
    """Every build, or every common one, of the named modules for every architecture, in parallel processes."""
    tasks = [
        (name, position, arch)
        for name in names
        for position, build in enumerate(importlib.import_module(name).builds())
        for arch in architectures
        if arch in build.architectures and not (common and build.rare)
    ]
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, mp_context=context) as pool:
        return list(pool.map(_job, *zip(*tasks, strict=True))) if tasks else []


def show(results: list[Result]) -> None:
    """Print the table."""
    from rich.console import Console
    from rich.table import Table

    table = Table(
        title="Triton kernels, ahead of time (predicted bound: issue slots of the hot loop)"
    )
    for column in ("kernel", "arch", "registers", "spills", "shared", "occupancy"):
        table.add_column(column, justify="left" if column == "kernel" else "right")
    for column in ("matrix", "exp2", "loads, stores (bits: count)", "all", "bound", "faults"):
        table.add_column(column)
    for result in results:
        count, cycles = result.instructions, result.hot_loop_cycles
        matrix = [f"{count[n]} {n}" for n in ("mma", "wgmma", "tcgen05") if n in count]
        memory = [f"{n} {c}" for n, c in count.items() if n.startswith(("ld", "stg"))]
        table.add_row(
            f"{result.kernel.removeprefix('alit_kernels.')} {result.label}",
            f"sm_{result.arch}",
            str(result.registers),
            str(result.stack or count.get("local", 0)),
            str(result.shared),
            f"{result.occupancy:.0%}",
            " ".join(matrix) or "-",
            str(count.get("exp2", 0)),
            " ".join(memory),
            str(count["all"]),
            f"{result.bound} {cycles[result.bound]}/{cycles['issue']}",
            "; ".join(result.faults) or "none",
        )
    Console(width=None if sys.stdout.isatty() else 200).print(table)


def _arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m alit_kernels.aot", description=__doc__)
    parser.add_argument("--arch", default="sm_80,sm_90,sm_100", help="comma-separated")
    parser.add_argument("--module", action="append", help="a kernels module; default: all")
    parser.add_argument("--jobs", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--common", action="store_true", help="leave out the rare builds")
    parser.add_argument("--json", type=Path, help="write the result here")
    parser.add_argument("--check", action="store_true", help="fail on spills and the like")
    parser.add_argument("--compare", type=Path, help="fail on code worse than this result")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """The command; the exit status counts as failed with 1."""
    options = _arguments(arguments)
    if os.environ.get("TRITON_INTERPRET", "0") != "0":
        raise SystemExit("TRITON_INTERPRET is set: kernels would not be compiled; unset it")
    import triton

    architectures = tuple(int(name.strip().removeprefix("sm_")) for name in options.arch.split(","))
    unknown = set(architectures) - set(ARCHITECTURES)
    if unknown:
        raise SystemExit(f"--arch: expected some of {ARCHITECTURES}, got {sorted(unknown)}")
    names: list[str] = options.module or modules()
    results = compile_all(names, architectures, options.jobs, options.common)
    show(results)
    failures = []
    if options.check:
        failures += [f"{r.key}: {fault}" for r in results for fault in r.faults]
        for name in names:
            missing = uncovered(importlib.import_module(name))
            failures += [f"{name}.{kernel}: no build covers this kernel" for kernel in missing]
    if options.compare:
        committed = json.loads(options.compare.read_text())
        if committed["triton"] != triton.__version__:
            raise SystemExit(
                f"{options.compare} is of Triton {committed['triton']}, this is {triton.__version__}"
            )
        rare = [b for n in names for b in importlib.import_module(n).builds() if b.rare]
        left_out = [b.key(arch) for b in rare for arch in architectures] if options.common else []
        failures += compare(results, committed, left_out)
    if options.json:
        lines = ",\n".join(json.dumps(asdict(r)) for r in results)  # one for each build
        options.json.parent.mkdir(parents=True, exist_ok=True)
        temporary = options.json.with_name(f".{options.json.name}.part")
        temporary.write_text(f'{{"triton": "{triton.__version__}", "results": [\n{lines}\n]}}\n')
        temporary.replace(options.json)
    for failure in failures:
        print(failure, file=sys.stderr)
    return 1 if failures else 0


if __name__ == "__main__":
    raise SystemExit(main())
