"""``python -m alit_kernels``: what is installed, what runs where, and the command that adds what is missing."""

from __future__ import annotations

import importlib.util

import torch
from rich.console import Console
from rich.table import Table

from . import __version__
from ._library import extension, ops
from .nn.linear import onednn_is_faster


def main() -> None:
    console = Console(markup=False, highlight=False, soft_wrap=True)
    core, triton = extension(), importlib.util.find_spec("triton")
    build = {} if core is None else core.build_info()
    facts = {
        "versions": f"alit_kernels {__version__}, torch {torch.__version__}",
        "compiled core": ", ".join(f"{key} {value}" for key, value in build.items())
        or "not installed; with a C++ compiler at hand: pip install --force-reinstall --no-deps .",
        "triton": "installed" if triton else "not installed; pip install '.[dev]'",
        "CUDA device": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "float32 linear layers on the CPU": "oneDNN" if onednn_is_faster() else "torch",
    }
    for name, fact in facts.items():
        console.print(f"{name}: {fact}")
    table = Table("op", "cpu", "cuda", title="what implementation='auto' runs")
    for name, op in sorted(ops().items()):
        choices = (op.choose("auto", device, torch.float32) for device in ("cpu", "cuda"))
        table.add_row(name, *choices)
    console.print(table)


if __name__ == "__main__":
    main()
