"""Published packages: metadata, license texts, contents, and the files that build them."""

from __future__ import annotations

import importlib.metadata
import os
import re
import subprocess
import sys
import tarfile
import zipfile
from email.message import Message
from email.parser import Parser
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml
from packaging.requirements import Requirement

import alit
import alit_kernels

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
#: Beginnings of the names of files that are not published.
LEFT_OUT = (".gitignore", ".ci/", "tests/full-run.jsonl")
#: Script that builds with setuptools alone, as in an isolated environment without torch.
BUILD = """
import sys
sys.modules["torch"] = None
from setuptools import build_meta
print(getattr(build_meta, sys.argv[1])(sys.argv[2]))
"""


def build(kind: str, source: Path, out: Path, **variables: str) -> Path:
    command = [sys.executable, "-c", BUILD, f"build_{kind}", str(out)]
    done = subprocess.run(
        command, cwd=source, env=os.environ | variables, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return out / done.stdout.splitlines()[-1]


def copied(folder: Path) -> list[str]:
    """Copy the files of the checkout, or of an unpacked sdist, to ``folder``, where a build may write; their names."""
    if (ROOT / ".git").exists():
        command = ["git", "ls-files"]
        listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        names = [name for name in listed.stdout.splitlines() if (ROOT / name).is_file()]
    else:
        sources = (ROOT / "alit.egg-info" / "SOURCES.txt").read_text().splitlines()
        names = [name for name in sources if ".egg-info/" not in name]
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes((ROOT / name).read_bytes())
    return names


class Built(NamedTuple):
    checkout: list[str]
    sdist: list[str]
    wheel: Path
    content: dict[str, bytes]
    metadata: Message


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    """The sdist, and the pure wheel built from it without a compiler."""
    folder = tmp_path_factory.mktemp("packaging")
    (folder / "checkout").mkdir()
    names = copied(folder / "checkout")
    with tarfile.open(build("sdist", folder / "checkout", folder)) as archive:
        archive.extractall(folder / "sdist", filter="data")
    (source,) = (folder / "sdist").iterdir()
    sdist = [path.relative_to(source).as_posix() for path in source.rglob("*") if path.is_file()]
    wheel = build("wheel", source, folder, PATH=str(folder), CXX="", ALIT_BUILD_CORE="")
    with zipfile.ZipFile(wheel) as archive:
        content = {name: archive.read(name) for name in archive.namelist()}
    (about,) = (x.decode() for name, x in content.items() if name.endswith(".dist-info/METADATA"))
    return Built(names, sdist, wheel, content, Parser().parsestr(about))


def test_one_version(built: Built) -> None:
    version = built.metadata["Version"]
    assert alit.__version__ == alit_kernels.__version__ == version
    assert built.wheel.name == f"alit-{version}-py3-none-any.whl"
    assert PROJECT["project"]["dynamic"] == ["version"] and "version" not in PROJECT["project"]
    found = [
        path.relative_to(ROOT).as_posix()
        for package in ("alit", "alit_kernels")
        for path in (ROOT / package).rglob("*.py")
        if re.search(r"^__version__\s*=", path.read_text(), re.MULTILINE)
    ]
    assert found == ["alit_kernels/__init__.py"]


def test_the_changelog_begins_with_the_version() -> None:
    heading = re.search(r"^## .*$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert heading is not None
    assert re.fullmatch(
        rf"## {re.escape(alit.__version__)} \((unreleased|20\d\d-\d\d-\d\d)\)", heading[0]
    )


def test_licenses(built: Built) -> None:
    """Metadata have the license expression of code and weights, and files have the whole texts."""
    assert built.metadata["License-Expression"] == "Apache-2.0 AND CC-BY-NC-4.0"
    files = built.metadata.get_all("License-File")
    assert {"LICENSE", "alit/weights/CC-BY-NC-4.0.txt"} <= set(files)
    info = f"alit-{alit.__version__}.dist-info"
    for name in files:
        assert built.content[f"{info}/licenses/{name}"] == (ROOT / name).read_bytes()
    apache = built.content[f"{info}/licenses/LICENSE"].decode()
    assert "Version 2.0, January 2004" in apache and "END OF TERMS AND CONDITIONS" in apache
    text = built.content["alit/weights/CC-BY-NC-4.0.txt"].decode()
    assert text.startswith("Attribution-NonCommercial 4.0 International\n")
    assert re.findall(r"^Section (\d) -- ", text, re.MULTILINE) == list("12345678")
    assert text.rstrip().endswith("Creative Commons may be contacted at creativecommons.org.")


def test_metadata(built: Built) -> None:
    about = built.metadata
    assert about["Author"] == "The alit authors" and about["Keywords"]
    assert not [x for x in about.get_all("Classifier") if x.startswith("License ::")]
    needed = {
        Requirement(x).name for x in about.get_all("Requires-Dist") if "extra ==" not in str(x)
    }
    assert needed == {"torch", "numpy", "safetensors", "pillow", "typer", "rich"}
    points = built.content[f"alit-{alit.__version__}.dist-info/entry_points.txt"].decode()
    assert "[console_scripts]\nalit = alit.cli:app" in points


def test_addresses_are_those_that_the_project_names() -> None:
    pages = "".join(path.read_text() for path in [ROOT / "README.md", *ROOT.glob("docs/*.md")])
    for name, address in PROJECT["project"]["urls"].items():
        assert address in pages, name


def test_the_build_leaves_torch_alone() -> None:
    """Builds do not require torch. (The builds in these tests run without it.)"""
    names = {Requirement(x).name for x in PROJECT["build-system"]["requires"]}
    assert names == {"setuptools", "pybind11", "cmake", "ninja"}


def test_the_sdist_is_complete(built: Built) -> None:
    """The sdist holds every file of the repository except those that are not published, and no leftovers."""
    expected = {name for name in built.checkout if not name.startswith(LEFT_OUT)}
    made = {"PKG-INFO", "setup.cfg"}
    found = {name for name in built.sdist if ".egg-info/" not in name} - made
    assert found == expected - made, sorted(found ^ (expected - made))
    assert {"csrc/ragged/ragged.cu", "csrc/CMakeLists.txt", "Makefile"} <= found


def test_the_wheel_holds_the_packages_alone(built: Built) -> None:
    """The wheel holds exactly the modules and data of the packages."""
    found = {name for name in built.content if ".dist-info/" not in name}
    names = [x for x in built.checkout if x.split("/")[0] in ("alit", "alit_kernels")]
    assert found == set(names), sorted(found ^ set(names))


def test_the_wheel_runs(built: Built, tmp_path: Path) -> None:
    """The wheel runs from its own files, without the checkout."""
    with zipfile.ZipFile(built.wheel) as archive:
        archive.extractall(tmp_path)
    script = (
        "import importlib.metadata, pathlib, alit\n"
        "from alit.cli import app\n"
        "assert pathlib.Path(alit.__file__).is_relative_to(pathlib.Path.cwd())\n"
        "print(importlib.metadata.version('alit'))\n"
        "app(['--version'])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{alit.__version__}\nalit {alit.__version__}\n"


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"ALIT_BUILD_CORE": "1", "CXX": ""}, "ALIT_BUILD_CORE=1 needs a C++ compiler"),
        ({"ALIT_BUILD_CORE": "yes"}, "ALIT_BUILD_CORE: expected 0 or 1, got 'yes'"),
    ],
)
def test_a_core_that_cannot_be_built_is_said(variables: dict[str, str], message: str) -> None:
    command = [sys.executable, "setup.py", "--version"]
    environment = os.environ | {"PATH": "/nowhere"} | variables
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1 and message in done.stderr


def needed_by(*names: str) -> set[str]:
    """Names of these distributions and all their requirements, recursively, without extras."""
    found: set[str] = set()
    waiting = list(names)
    while waiting:
        name = re.sub(r"[-_.]+", "-", waiting.pop()).lower()
        if name in found:
            continue
        found.add(name)
        for line in importlib.metadata.requires(name) or ():
            requirement = Requirement(line)
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                waiting.append(requirement.name)
    return found


KERNELS_ALONE = """
import sys
allowed = set(sys.argv[1].split(",")) | sys.stdlib_module_names | {"alit_kernels"}
class Finder:
    def find_spec(self, name, path=None, target=None):
        top = name.partition(".")[0]
        if top not in allowed and not top.startswith(("__editable__", "_distutils_hack")):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Finder())
try:
    import rich
except ModuleNotFoundError:
    pass
else:
    raise SystemExit("rich was not blocked")
import torch, alit_kernels, alit_kernels.nn
z, codebook = torch.randn(40, 8), torch.randn(16, 8)
index = alit_kernels.nearest_codeword(z, codebook)
assert torch.equal(index, torch.cdist(z, codebook).argmin(-1))
alit_kernels.nn.VectorQuantizer(16, 8)(z).loss.backward()
model = torch.nn.Sequential(torch.nn.MultiheadAttention(8, 2))
alit_kernels.accelerate(model)
assert "alit" not in sys.modules
print("fine")
"""


def test_kernels_need_torch_and_numpy_alone() -> None:
    """The kernels work if only torch, numpy and their requirements can be imported."""
    distributions = needed_by("torch", "numpy")
    assert "safetensors" not in distributions
    packages = [
        package
        for package, owners in importlib.metadata.packages_distributions().items()
        if any(re.sub(r"[-_.]+", "-", owner).lower() in distributions for owner in owners)
    ]
    command = [sys.executable, "-c", KERNELS_ALONE, ",".join(packages)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "fine", done.stderr


def workflow(name: str) -> dict[str, Any]:
    return yaml.safe_load((ROOT / ".github" / "workflows" / name).read_text())


def test_pythons_and_torches_are_the_same_everywhere() -> None:
    project = PROJECT["project"]
    prefix = "Programming Language :: Python :: 3."
    pythons = [
        f"3.{x.removeprefix(prefix)}" for x in project["classifiers"] if x.startswith(prefix)
    ]
    assert project["requires-python"] == f">={pythons[0]}"
    wheels = [f"cp{x.replace('.', '')}-*" for x in pythons]
    assert PROJECT["tool"]["cibuildwheel"]["build"] == wheels
    matrix = workflow("ci.yml")["jobs"]["test"]["strategy"]["matrix"]
    assert matrix["python"] == pythons
    (torch,) = (Requirement(x) for x in project["dependencies"] if Requirement(x).name == "torch")
    oldest = str(torch.specifier).removeprefix(">=")
    assert matrix["torch"] == [f"torch=={oldest}.*", "torch"]


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_workflows(path: Path) -> None:
    """Workflows run existing targets, have time limits, and have no write permission that they do not state."""
    content = workflow(path.name)
    assert content["permissions"] == {"contents": "read"}
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for name, job in content["jobs"].items():
        assert job["timeout-minutes"] <= 90, name
        needs = job.get("needs", [])
        needs = {needs} if isinstance(needs, str) else set(needs)
        assert needs <= set(content["jobs"]), name
        for step in job["steps"]:
            called = re.findall(r"\bmake ([a-z-]+)", step.get("run", ""))
            assert set(called) <= targets, f"{path.name}: {name}"
            files = re.findall(r"\btests/[\w/]+\.py", step.get("run", ""))
            assert all((ROOT / file).is_file() for file in files), f"{path.name}: {name}"
