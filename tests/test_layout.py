"""Imports go one way, and nothing in the package needs what it should not."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
#: Higher rooms may import lower ones, never the other way.
RANKS = {
    "alit.cli": 11,
    "alit.demo": 10,
    "alit.reconstruct": 9,
    "alit.token_files": 8,
    "alit.training": 8,
    "alit.evaluation": 8,
    "alit.attention": 7,
    "alit.initialisation": 7,
    "alit.losses": 7,
    "alit.tokenizer": 6,
    "alit.encoding": 5,
    "alit.rollout": 4,
    "alit.criteria": 4,
    "alit.decoder": 3,
    "alit.sequence": 3,
    "alit.base": 3,
    "alit.checkpoint": 3,
    "alit.published": 2,
    "alit.layers": 2,
    "alit.images": 1,
    "alit.config": 1,
    "alit.archives": 1,
    "alit.checks": 0,
    "alit.devices": 0,
    "alit.alit_format": 0,
    "alit.files": 0,
    "alit_kernels": 0,
}


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def rank(module: str) -> int:
    name = ".".join(module.split(".")[:2])
    return RANKS["alit_kernels"] if name.startswith("alit_kernels") else RANKS[name]


def imports(path: Path) -> list[str]:
    """Modules imported at run time, made absolute; what only type checkers see does not count."""
    tree, package = ast.parse(path.read_text()), module_name(path)
    if path.name != "__init__.py":
        package = package.rpartition(".")[0]
    hidden = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    found = []
    for node in ast.walk(tree):
        if id(node) in hidden:
            continue
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            prefix = (
                package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            )
            base = ".".join([*prefix, *([node.module] if node.module else [])])
            found += [base] if node.module else [f"{base}.{alias.name}" for alias in node.names]
    return found


FILES = [p for p in sorted(ROOT.glob("alit*/**/*.py")) if p.parent.name != "__pycache__"]


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_imports_go_one_way(path: Path) -> None:
    module = module_name(path)
    for target in imports(path):
        if not target.startswith(("alit.", "alit_kernels")) and target != "alit":
            continue
        if module.startswith("alit_kernels"):
            assert target.startswith("alit_kernels"), f"{module} imports {target}"
        elif module != "alit" and ".".join(target.split(".")[:2]) != ".".join(
            module.split(".")[:2]
        ):
            assert target != "alit", f"{module} imports the whole package"
            assert rank(target) < rank(module), f"{module} imports {target}"


def test_kernels_import_no_triton_at_the_top() -> None:
    """Commands import it when they run."""
    commands = ("aot.py", "attention/tune.py", "attention/__main__.py")
    for path in (ROOT / "alit_kernels").glob("**/*.py"):
        name = path.relative_to(ROOT / "alit_kernels").as_posix()
        if path.name != "kernels.py" and name not in commands:
            assert not any(target.split(".")[0] == "triton" for target in imports(path)), path


def test_core_has_no_torch_header() -> None:
    for path in (ROOT / "csrc").glob("**/*"):
        if path.suffix in (".h", ".cpp", ".cu", ".cuh"):
            text = path.read_text()
            assert (
                not any(f"#include {mark}torch" in text for mark in '<"') and "ATen" not in text
            ), path
