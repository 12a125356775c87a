"""The choice of an implementation, and errors of those that are missing, broken or not for this machine."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

import alit_kernels as ak
from alit_kernels import _library
from alit_kernels._library import Op


def test_choice_of_implementation(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def other(x: Tensor) -> Tensor:
        calls.append("cpp")
        return x * 2

    op = Op(
        "test_choice(Tensor x) -> Tensor",
        reference=lambda x: x * 2,
        fake=torch.empty_like,
        others={"cpp": other},
    )
    monkeypatch.setattr(
        _library, "available", lambda name, device: "" if name == "cpp" else "not here"
    )
    op(torch.ones(2))
    assert calls == ["cpp"], "auto takes C++ on the CPU"
    op(torch.ones(2), implementation="reference")
    op(torch.ones(2, dtype=torch.float64))
    assert calls == ["cpp"], "float64 and an explicit choice take the reference"
    monkeypatch.setenv("ALIT_KERNELS_IMPLEMENTATION", "reference")
    op(torch.ones(2))
    assert calls == ["cpp"], "the environment variable replaces auto"
    with pytest.raises(
        ValueError,
        match=r"implementation='triton' of alit_kernels.test_choice cannot run: this op has",
    ):
        op(torch.ones(2), implementation="triton")
    monkeypatch.setattr(_library, "available", lambda name, device: "broken")
    with pytest.raises(ValueError, match="cannot run: broken"):
        op(torch.ones(2), implementation="cpp")


def test_gpus_that_the_kernels_are_not_for(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    capabilities = [(9, 0), (8, 0)]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(capabilities))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda i: capabilities[i])
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda i: f"GPU {i}")
    available = _library.available.__wrapped__  # without its cache
    assert available("triton", "cuda") == ""
    capabilities[1] = (7, 5)
    assert "8.0 or later, and GPU 1 is older" in available("triton", "cuda")
    capabilities[1] = (12, 0)
    assert available("triton", "cuda") == ""
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert "ROCm" in available("triton", "cuda")


BLOCKED = """
import sys
sys.modules["triton"] = sys.modules["alit_kernels._C"] = None
import torch, alit_kernels as ak
assert "alit" not in sys.modules, "alit_kernels imports alit"
q = torch.randn(1, 3, 2, 4)
assert ak.attention(q, q, q).shape == q.shape
assert ak.nearest_codeword(torch.randn(3, 2), torch.randn(5, 2)).shape == (3,)
try:
    ak.attention(q, q, q, implementation="triton")
except ValueError as error:
    assert "triton" in str(error)
else:
    raise SystemExit("an explicit choice that cannot run was accepted")
print("fine")
"""


def test_imports_without_triton_and_extension() -> None:
    done = subprocess.run(
        [sys.executable, "-c", BLOCKED], capture_output=True, text=True, check=False
    )
    assert done.stdout.strip() == "fine", done.stderr


def test_a_source_folder_without_a_core_says_so(tmp_path: Path) -> None:
    """A source folder without a core warns once a process that uses the reference on the CPU; installations do not."""
    package = Path(ak.__file__).parent
    ignored = shutil.ignore_patterns("_C*", "__pycache__")
    shutil.copytree(package, tmp_path / "alit_kernels", ignore=ignored)
    script = (
        "import sys\n"  # an editable installation would find its core all the same
        "sys.meta_path = [x for x in sys.meta_path if 'editable' not in repr(x).lower()]\n"
        "import torch, alit_kernels as ak\n"
        "for _ in range(2): ak.nearest_codeword(torch.ones(3, 2), torch.ones(5, 2))\n"
    )
    environment = {k: x for k, x in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": str(tmp_path), "PYTHONWARNINGS": "always"}
    for source in (False, True):
        if source:
            (tmp_path / "csrc").mkdir()
        command = [sys.executable, "-c", script]
        done = subprocess.run(
            command, capture_output=True, text=True, check=True, cwd=tmp_path, env=environment
        )
        assert done.stderr.count("has no compiled core") == source, done.stderr
        assert ("pip install -e ." in done.stderr) == source


def test_broken_extension_raises() -> None:
    script = (
        "import sys, types, importlib.abc, importlib.machinery\n"
        "class Broken(importlib.abc.Loader):\n"
        "    def create_module(self, spec): raise ImportError('undefined symbol')\n"
        "    def exec_module(self, module): pass\n"
        "class Finder:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'alit_kernels._C': return importlib.machinery.ModuleSpec(name, Broken())\n"
        "sys.meta_path.insert(0, Finder())\n"
        "from alit_kernels._library import extension\n"
        "extension()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1 and "undefined symbol" in done.stderr


def test_report_runs() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "alit_kernels"], capture_output=True, text=True, check=True
    )
    assert "what implementation='auto' runs" in done.stdout and "attention_backward" in done.stdout
