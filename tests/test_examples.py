"""The programs of docs/examples, run small: their output and files."""

from __future__ import annotations

import base64
import io
import json
import os
import re
import runpy
import sys
from pathlib import Path

import pytest
from PIL import Image
from torch.distributed import run as torchrun

from tests.helpers.forks import fork

pytestmark = pytest.mark.apart
FOLDER = Path(__file__).parents[1] / "docs" / "examples"
EXAMPLES = sorted(FOLDER.glob("*.py"))


def _python(name: str, *arguments: str) -> None:
    sys.argv = [name, *arguments]
    runpy.run_path(str(FOLDER / name), run_name="__main__")


def _torchrun(name: str, *arguments: str) -> None:
    os.environ |= {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    paths = [str(FOLDER.parents[1]), os.environ.get("PYTHONPATH", "")]
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    torchrun.main(["--standalone", "--nproc-per-node", "2", str(FOLDER / name), *arguments])


def said(folder: Path, name: str, *arguments: str) -> str:
    """Output of an example, run in a process of its own on one thread."""
    launch = _torchrun if name == "two_processes.py" else _python
    process = fork(folder / "said", launch, name, *arguments)
    process.join()
    text = (folder / "said").read_text()
    assert process.exitcode == 0, text
    return text


def numbers(pattern: str, text: str) -> list[float]:
    return [float(found) for found in re.findall(pattern, text)]


def test_vq_autoencoder(tmp_path: Path) -> None:
    sheet = tmp_path / "sheet.png"
    text = said(tmp_path, "vq_autoencoder.py", "--steps", "50", "--output", str(sheet))
    psnr, used = numbers(r"PSNR +([\d.]+)", text), numbers(r"in use +(\d+)%", text)
    assert len(psnr) == 6 and psnr[-1] > psnr[0] + 5
    assert min(used) > 0
    with Image.open(sheet) as image:
        assert image.size == (4 * 128, 2 * 128)
        assert len(image.getcolors(maxcolors=2**20)) > 1000


def test_swap_kernels(tmp_path: Path) -> None:
    text = said(tmp_path, "swap_kernels.py", "--codes", "256", "--rounds", "1")
    assert re.search(r"^attn +attention +swapped$", text, re.MULTILINE)
    assert re.search(r"^quantize +taming +swapped$", text, re.MULTILINE)
    assert numbers(r"outputs ([\de.+-]+),", text)[0] < 1e-5 and "same keys: True" in text
    assert min(numbers(r"([\d.]+) ms", text)) > 0
    assert text.endswith("undone: MultiheadAttention, VectorQuantizer2\n")


def test_ragged_batch(tmp_path: Path) -> None:
    text = said(tmp_path, "ragged_batch.py", "--sequences", "4", "--rounds", "1")
    lengths = json.loads(re.search(r"lengths (\[.*\])", text)[1])
    assert len(set(lengths)) > 1 and f"rows {sum(lengths)} instead of {4 * 256}\n" in text
    differences = numbers(r"difference ([\de.+-]+)", text)
    assert len(differences) == 2 and max(differences) < 1e-4
    assert len(numbers(r"([\d.]+) ms", text)) == 2


def test_two_processes(tmp_path: Path) -> None:
    text = said(tmp_path, "two_processes.py", "--steps", "30")
    errors = numbers(r"error ([\d.]+)", text)
    assert len(errors) == 5 and errors[-1] < errors[0] / 2, "one process prints"
    assert "2 processes, the same codebook in each: True" in text


def test_web_page(tmp_path: Path) -> None:
    """Images on the page have the errors that it states, and nothing is loaded from elsewhere."""
    file = tmp_path / "page.html"
    text = said(tmp_path, "web_page.py", "--lengths", "16,64,256", "--output", str(file))
    page = file.read_text()
    steps = json.loads(re.search(r"const steps = (\[.*?\]),", page)[1])
    assert [(x["tokens"], x["bytes"]) for x in steps] == [(16, 24), (64, 96), (256, 384)]
    errors = [float(x["error"]) for x in steps]
    assert errors == sorted(errors, reverse=True) == numbers(r"error ([\d.]+)", text)
    for step in steps:
        kind, content = step["image"].split(",")
        assert kind == "data:image/png;base64"
        with Image.open(io.BytesIO(base64.b64decode(content))) as image:
            assert image.size == (256, 256)
    assert "http" not in page and 'src="data:image/png;base64,' in page


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_an_example_is_short_and_says_how_to_run_it(path: Path) -> None:
    text = path.read_text()
    header = text.split('"""')[1]
    assert len(text.splitlines()) < 80
    assert "\nShows: " in header and f"docs/examples/{path.name}" in header
    assert f"]({path.name})" in (FOLDER / "README.md").read_text()
    assert f"def test_{path.stem}(" in Path(__file__).read_text(), "every example is run"
