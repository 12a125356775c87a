"""Check an installed alit, with no packages beside its dependencies:

    python -I tests/helpers/installed.py --core

Run it with the environment's interpreter; it imports nothing from its own folder. ``--core``: the package must have the
compiled core; ``--pure``: it must have none.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path


def command(*arguments: object, folder: Path) -> str:
    """Output of a command of the environment; raises ``SystemExit`` if it fails."""
    words = [str(x) for x in arguments]
    done = subprocess.run(words, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(words)}: {done.stdout}{done.stderr}")
    return done.stdout


def try_imports(core: bool) -> str:
    """Check versions, license texts and the compiled core; returns the version."""
    import alit
    import alit_kernels

    version = importlib.metadata.version("alit")
    assert alit.__version__ == alit_kernels.__version__ == version
    for module in (alit, alit_kernels):
        assert Path(module.__file__).is_relative_to(sys.prefix), f"{module.__file__}: not installed"
    names = [Path(str(file)).name for file in importlib.metadata.files("alit") or ()]
    assert {"LICENSE", "CC-BY-NC-4.0.txt", "nano.safetensors"} <= set(names)
    found = importlib.util.find_spec("alit_kernels._C") is not None
    assert found == core, f"compiled core: expected {core}, got {found}"
    if core:
        from alit_kernels._core import extension

        assert extension().build_info()["version"] == version
    return version


def try_kernels(core: bool) -> None:
    """Check the nearest codewords of each implementation that is installed."""
    import torch

    import alit_kernels

    z, codebook = torch.randn(100, 8), torch.randn(64, 8)
    expected = torch.cdist(z, codebook).argmin(-1)
    for implementation in ("auto", "reference", *(["cpp"] if core else [])):
        found = alit_kernels.nearest_codeword(z, codebook, implementation=implementation)
        assert torch.equal(found, expected), implementation


def try_commands(version: str) -> None:
    """Check that the commands encode an image to tokens and decode it, and print the version."""
    from PIL import Image, ImageChops, ImageStat

    alit = shutil.which("alit", path=str(Path(sys.executable).parent))
    assert alit is not None, "no command alit beside the interpreter"
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        image = Image.merge("RGB", [Image.linear_gradient("L").rotate(90 * k) for k in range(3)])
        image.save(folder / "gradient.png")
        assert command(alit, "--version", folder=folder).split() == ["alit", version]
        encode = ("encode", "gradient.png", "-o", "gradient.alit", "--tokens", "64")
        command(alit, *encode, folder=folder)
        assert "gradient" in command(alit, "info", "gradient.alit", folder=folder)
        command(alit, "decode", "gradient.alit", "-o", "decoded", folder=folder)
        with Image.open(folder / "decoded" / "gradient.png") as decoded:
            assert decoded.size == image.size
            error = max(ImageStat.Stat(ImageChops.difference(image, decoded.convert("RGB"))).mean)
        assert error < 25, f"mean error of {error:.1f} in 255"
        assert version in command(sys.executable, "-I", "-m", "alit_kernels", folder=folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    kind = parser.add_mutually_exclusive_group(required=True)
    kind.add_argument("--core", action="store_true")
    kind.add_argument("--pure", action="store_true")
    options = parser.parse_args()
    version = try_imports(options.core)
    try_kernels(options.core)
    try_commands(version)
    print(f"alit {version} {'with' if options.core else 'without'} its compiled core: works")


if __name__ == "__main__":
    main()
