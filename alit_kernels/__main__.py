"""``python -m alit_kernels``: what is installed, what runs where, and the command that adds what is missing."""

from __future__ import annotations

import importlib.util

import torch

from . import __version__
from ._library import extension, ops
from .nn.linear import onednn_is_faster


def main() -> None:
    core, triton = extension(), importlib.util.find_spec("triton")
    build = {} if core is None else core.build_info()
    facts = {
        "versions": f"alit_kernels {__version__}, torch {torch.__version__}",
        "compiled core": ", ".join(f"{key} {value}" for key, value in build.items())
        or "not installed; with a C++ compiler, in the clone: pip install --no-deps -e .",
        "triton": "installed" if triton else "not installed; pip install triton",
        "CUDA device": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "float32 linear layers on the CPU": "oneDNN" if onednn_is_faster() else "torch",
    }
    for name, fact in facts.items():
        print(f"{name}: {fact}")
    print("\nwhat implementation='auto' runs, by device:")
    rows: list[tuple[str, ...]] = [("op", "cpu", "cuda")]
    for name, op in sorted(ops().items()):
        rows.append((name, *(op.choose("auto", x, torch.float32) for x in ("cpu", "cuda"))))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print(
            "  ".join(f"{cell:{width}}" for cell, width in zip(row, widths, strict=True)).rstrip()
        )


if __name__ == "__main__":
    main()
