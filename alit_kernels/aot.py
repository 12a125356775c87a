"""Compile every Triton kernel for GPUs that are not here, and read the machine code.

What is compiled follows from ``builds.py`` of every op: one build for each kernel and shipped launch configuration.
``python -m alit_kernels.aot --arch sm_80,sm_90`` compiles them and prints registers, spills, shared memory, occupancy,
instruction counts, bank conflicts and the predicted bound. ``--check`` fails on spills, too much shared memory, a
missing tensor-core instruction, accesses narrower than declared, or a kernel without a build; ``--compare FILE`` on
machine code that became worse than a committed result of the same Triton version. ``--unchanged-from FILE`` takes from
such a result what is compiled from the same source, with the same options, by the same compiler. ``--common`` leaves
out the builds that are declared rare, as is always done for the smaller chips, ``SMALL``.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import json
import multiprocessing
import os
import pkgutil
import sys
from collections.abc import Iterable, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from ._builds import Build, builds
from ._machine_code import MATRIX, Result

ARCHITECTURES = (80, 86, 89, 90, 100, 120)
#: Chips of workstations and laptops: 99 KiB of shared memory a block.
SMALL = (86, 89, 120)


def packages() -> list[str]:
    """Names of the packages of all ops that have Triton kernels."""
    path = importlib.import_module(__package__).__path__
    names = (info.name for info in pkgutil.walk_packages(path, f"{__package__}."))
    return sorted(name.removesuffix(".kernels") for name in names if name.endswith(".kernels"))


def uncovered(package: str, found: Iterable[Build]) -> list[str]:
    """Kernels of a package that no build compiles: its ``triton.jit`` functions that no other one calls."""
    module = importlib.import_module(f"{package}.kernels")
    functions = {n: f for n, f in vars(module).items() if type(f).__name__ == "JITFunction"}
    called = {name for f in functions.values() for name in f.fn.__code__.co_names}
    compiled = {build.kernel.__name__ for build in found}
    return [f"{module.__name__}.{name}" for name in sorted(set(functions) - called - compiled)]


def compare(
    results: list[Result], committed: Mapping[str, Result], left_out: Iterable[str] = ()
) -> list[str]:
    """Messages about what became worse: occupancy, spills, instructions or cycles of an iteration by more than 5 %.

    Builds of the same kernels and architectures must be in both, but for the keys ``left_out``, which were not
    compiled.
    """
    worse = []
    for new in results:
        before = committed.get(new.key)
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
        now, then = new.turn_cycles, before.turn_cycles
        if now > 1.05 * then:
            worse.append(f"{new.key}: cycles of a turn {then:g} -> {now:g}, bound {new.bound}")
    looked_at = {(new.kernel.rpartition(".")[0], new.arch) for new in results}
    gone = {k for k, r in committed.items() if (r.kernel.rpartition(".")[0], r.arch) in looked_at}
    gone -= {new.key for new in results} | set(left_out)
    return worse + [f"{key}: committed, but no longer built" for key in sorted(gone)]


_builds_of = functools.cache(builds)


def _job(package: str, architecture: int, key: str) -> Result:
    (build,) = (b for b in _builds_of(package, architecture) if b.key == key)
    try:
        return build.result()
    except Exception as error:
        raise RuntimeError(f"{key} does not compile") from error


def compile_all(wanted: list[Build], jobs: int, known: Mapping[str, Result]) -> list[Result]:
    """Results of all builds, in order: from ``known`` by their hash, the others compiled by ``jobs`` processes."""
    about = {build.key: build.about() for build in wanted}
    found = {k: replace(known[x["hash"]], **x) for k, x in about.items() if x["hash"] in known}
    tasks = [
        (build.kernel.__module__.rpartition(".")[0], build.architecture, build.key)
        for build in wanted
        if build.key not in found
    ]
    print(f"{len(found)} of {len(wanted)} builds are unchanged", flush=True)
    if jobs == 1:
        found |= {r.key: r for r in (_job(*task) for task in tasks)}
    elif tasks:
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(jobs, mp_context=context) as pool:
            found |= {r.key: r for r in pool.map(_job, *zip(*tasks, strict=True))}
    return [found[build.key] for build in wanted]


def show(builds: list[Build], results: list[Result]) -> None:
    """Print the table of results."""
    from rich.console import Console
    from rich.table import Table

    table = Table(
        title="Triton kernels, ahead of time (predicted bound: scheduler cycles of the hot loop)"
    )
    for column in ("kernel", "arch", "registers", "spills", "shared", "occupancy"):
        table.add_column(column, justify="left" if column == "kernel" else "right")
    for column in ("matrix", "exp2", "loads, stores (bits: count)", "all", "bound", "faults"):
        table.add_column(column)
    for build, result in zip(builds, results, strict=True):
        count, cycles = result.instructions, result.hot_loop_cycles
        sizes = " ".join(f"{n}={x}" for n, x in build.sizes.items() if type(x) is int)
        matrix = [f"{count[n]} {n}" for n in MATRIX if n in count]
        memory = [f"{n} {c}" for n, c in count.items() if n.startswith(("ld", "stg"))]
        table.add_row(
            f"{result.kernel.removeprefix('alit_kernels.')} {result.label} ({sizes})",
            f"sm_{result.arch}",
            str(result.registers),
            str(result.stack or count.get("local", 0)),
            str(result.shared),
            f"{result.occupancy:.0%}",
            " ".join(matrix) or "-",
            str(count.get("exp2", 0)),
            " ".join(memory),
            str(count["all"]),
            f"{result.bound} {cycles[result.bound]}/{cycles['issue']}"
            + (f", bank conflicts {result.conflicts:g}" if result.conflicts > 1 else ""),
            "; ".join(result.faults) or "none",
        )
    Console(width=None if sys.stdout.isatty() else 200).print(table)


def read_results(path: Path) -> list[Result]:
    """Results in a file that ``--json`` wrote with the Triton that is installed here.

    Raises:
        SystemExit: the file is of another version of Triton.
    """
    import triton

    content = json.loads(path.read_text())
    if content["triton"] != triton.__version__:
        raise SystemExit(f"{path} is of Triton {content['triton']}, this is {triton.__version__}")
    columns = [name.partition(".") for name in content["columns"]]
    results = []
    for kernel, rows in content["kernels"].items():
        for row in rows:
            fields: dict[str, Any] = {"kernel": kernel}
            for (field, _, name), value in zip(columns, row, strict=True):
                if not name:
                    fields[field] = value
                elif value:
                    fields.setdefault(field, {})[name] = value
            results.append(Result(**fields))
    return results


def write_results(path: Path, results: list[Result]) -> None:
    """Write a line for each build, below its kernel: values of ``columns``, "field" or, for counts, "field.name"."""
    import triton

    entries = []
    for fields in map(asdict, results):
        counted = {k: fields.pop(k) for k in ("instructions", "hot_loop_cycles", "other_cycles")}
        fields |= {f"{k}.{name}": x for k, of in counted.items() for name, x in of.items()}
        entries.append(fields)
    names = {name for fields in entries for name in fields} - {"kernel"}
    columns = sorted(names, key=lambda name: ("." in name, name))
    kernels: dict[str, list[str]] = {}
    for fields in entries:
        row = json.dumps([fields.get(name, 0) for name in columns], separators=(",", ":"))
        kernels.setdefault(json.dumps(fields["kernel"]), []).append(row)
    lines = ",\n".join(f"{k}: [\n" + ",\n".join(rows) + "\n]" for k, rows in kernels.items())
    head = f'"triton": "{triton.__version__}", "columns": {json.dumps(columns)}'
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.part")
    temporary.write_text(f'{{{head}, "kernels": {{\n{lines}\n}}}}\n')
    temporary.replace(path)


def main(arguments: list[str] | None = None) -> int:
    """Run the command; return its exit status, 1 for failures."""
    parser = argparse.ArgumentParser(prog="python -m alit_kernels.aot", description=__doc__)
    parser.add_argument(
        "--arch", default=",".join(f"sm_{x}" for x in ARCHITECTURES), help="comma-separated"
    )
    parser.add_argument("--module", action="append", help="an op's package; default: all")
    parser.add_argument("--jobs", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--common", action="store_true", help="leave out the rare builds")
    parser.add_argument("--json", type=Path, help="write the result here")
    parser.add_argument("--check", action="store_true", help="fail on spills and the like")
    parser.add_argument("--compare", type=Path, help="fail on code worse than this result")
    parser.add_argument("--unchanged-from", type=Path, help="take what has not changed from here")
    options = parser.parse_args(arguments)
    if os.environ.get("TRITON_INTERPRET", "0") != "0":
        raise SystemExit("TRITON_INTERPRET is set: kernels would not be compiled; unset it")
    architectures = [int(name.strip().removeprefix("sm_")) for name in options.arch.split(",")]
    unknown = set(architectures) - set(ARCHITECTURES)
    if unknown:
        raise SystemExit(f"--arch: expected some of {ARCHITECTURES}, got {sorted(unknown)}")
    names = options.module or packages()
    found = {name: [b for arch in architectures for b in builds(name, arch)] for name in names}
    every = [build for part in found.values() for build in part]
    common = SMALL if not options.common else ARCHITECTURES
    wanted = [build for build in every if not (build.rare and build.architecture in common)]
    unchanged = read_results(options.unchanged_from) if options.unchanged_from else []
    results = compile_all(wanted, options.jobs, {r.hash: r for r in unchanged})
    show(wanted, results)
    failures = []
    if options.check:
        failures += [f"{r.key}: {fault}" for r in results for fault in r.faults]
        missing = (kernel for name in names for kernel in uncovered(name, found[name]))
        failures += [f"{kernel}: no build covers this kernel" for kernel in missing]
    if options.compare:
        committed = {r.key: r for r in read_results(options.compare)}
        failures += compare(results, committed, {b.key for b in every} - {b.key for b in wanted})
    if options.json:
        write_results(options.json, results)
    for failure in failures:
        print(failure, file=sys.stderr)
    return 1 if failures else 0


if __name__ == "__main__":
    raise SystemExit(main())
