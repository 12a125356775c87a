"""Imports have one direction, and the packages import nothing that they should not."""

from __future__ import annotations

import ast
import re
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
#: Parts of the packages: each imports only parts of the rows before its own.
ROWS = (
    "alit_kernels alit.display",
    "alit.checks alit.devices alit.console alit.colors alit.image_records alit.atomic_files alit.hub",
    "alit.base_config",
    "alit.config alit.alit_format alit.shipped alit.images alit.torch_archive alit.plots alit.pixel_errors",
    "alit.layers alit.published alit.folders alit.sizes alit.fitting alit.codebooks alit.model_card",
    "alit.base alit.decoder alit.sequence alit.model_file",
    "alit.iteration alit.allocation",
    "alit.length_head alit.pixel_filter",
    "alit.model",
    "alit.rollout",
    "alit.criterion alit.admission",
    "alit.criteria",
    "alit.prediction",
    "alit.combination alit.curves alit.selection",
    "alit.encoding",
    "alit.features",
    "alit.tokenizer",
    "alit.attention_maps alit.programs alit.training.initialization alit.losses alit.generation",
    "alit.training alit.evaluation alit.export",
    "alit.demo alit.serve",
    "alit.analysis",
    "alit.commands",
    "alit.cli",
    "alit.__main__",
)
#: Implementation -> file, where the implementation has the name of a top-level package.
OWN_FILE = {"torch": "torch_", "triton": "triton_"}
RANKS = {room: rank for rank, row in enumerate(ROWS) for room in row.split()}


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def rank(module: str) -> int:
    name = ".".join(module.split(".")[:2])
    return RANKS["alit_kernels"] if name.startswith("alit_kernels") else RANKS[name]


def imports(path: Path) -> list[str]:
    """Absolute names of the modules that a file imports, at run time or only for type checkers."""
    tree, package = ast.parse(path.read_text()), module_name(path)
    if path.name != "__init__.py":
        package = package.rpartition(".")[0]
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            prefix = (
                package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            )
            base = ".".join([*prefix, *([node.module] if node.module else [])])
            found += [base] if node.module else []
            found += [f"{base}.{alias.name}" for alias in node.names]
    return found


FILES = [p for p in sorted(ROOT.glob("alit*/**/*.py")) if p.parent.name != "__pycache__"]
IMPORTS = {module_name(path): imports(path) for path in FILES}


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_imports_go_one_way(path: Path) -> None:
    module = module_name(path)
    for target in imports(path):
        if target.split(".")[0] not in ("alit", "alit_kernels"):
            continue
        if module.startswith("alit_kernels"):
            assert target.startswith("alit_kernels"), f"{module} imports {target}"
        elif module != "alit" and ".".join(target.split(".")[:2]) != ".".join(
            module.split(".")[:2]
        ):
            assert target != "alit", f"{module} imports the whole package"
            assert rank(target) < rank(module), f"{module} imports {target}"


def test_no_test_imports_a_test() -> None:
    """No file imports a test; shared code is in tests/helpers, and every other file holds tests."""
    for path in (ROOT / "tests").glob("**/*.py"):
        assert not [x for x in imports(path) if x.startswith("tests.") and ".test_" in x], path
        place = path.relative_to(ROOT / "tests").parts[0]
        assert path.name.startswith(("test_", "__init__", "conftest")) or place in (
            "helpers",
            "data",
        ), path


def test_no_circle() -> None:
    """Imports have no cycle, even among the files of one part."""
    TopologicalSorter(IMPORTS).prepare()


def test_builds_import_no_command() -> None:
    """Modules that list ahead-of-time builds import no command, so that processes can import them only to compile."""
    found, known = {name for name in IMPORTS if name.endswith(".builds")}, 0
    while known < len(found):
        known = len(found)
        found.update(*(IMPORTS.get(name, []) for name in found))
    assert len(found & IMPORTS.keys()) > 10 and not found & {"argparse", "multiprocessing"}


def test_only_kernels_import_triton_at_the_top() -> None:
    """Only kernel files import Triton at the top; others must import without it."""
    for path in FILES:
        # Files of kernels and of their parts.
        if path.name not in ("kernels.py", "split.py", "distances.py", "units.py"):
            found = re.search(r"^(import|from) triton\b", path.read_text(), re.MULTILINE)
            assert found is None, f"{path} imports Triton"


def test_nothing_imports_the_hub_at_the_top() -> None:
    """huggingface_hub, an optional and slow import, is not imported at the top of any file."""
    for path in FILES:
        found = re.search(r"^(import|from) huggingface_hub\b", path.read_text(), re.MULTILINE)
        assert found is None, f"{path} imports huggingface_hub"


def test_a_file_bears_the_name_of_its_implementation() -> None:
    """Files have the names of their implementations, or safe ones, so that none shadows a package when run by path."""
    for path in (ROOT / "alit_kernels").glob("*/op.py"):
        for name, file in re.findall(r'"(\w+)": "alit_kernels\.\w+\.(\w+):', path.read_text()):
            assert file == OWN_FILE.get(name, name), f"{path}: {name} is in {file}.py"


def test_core_has_no_torch_header() -> None:
    for path in (ROOT / "csrc").glob("**/*"):
        if path.suffix in (".h", ".cpp", ".cu", ".cuh"):
            text = path.read_text()
            assert (
                not any(f"#include {mark}torch" in text for mark in '<"') and "ATen" not in text
            ), path
