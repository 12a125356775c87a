"""The Python blocks of pages run as they are, in order, each section with the names that its text mentions.

Links of pages lead to existing files and headings.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from skimage import data
from torch import nn

import alit_kernels
from tests.helpers.lucidrains import Lucidrains
from tests.helpers.peers import Chameleon, DiffusersQuantizer, LlamaGenQuantizer, VectorQuantizer2
from tests.helpers.titok import TiTok

DOCS = Path(__file__).parents[1] / "docs"


class Section(NamedTuple):
    page: str
    heading: str
    blocks: tuple[str, ...]


BLOCK = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)


def sections(page: str) -> Iterator[Section]:
    """Sections of a page that have Python blocks."""
    text = (DOCS / page).read_text()
    without = BLOCK.sub(lambda block: " " * len(block[0]), text)  # a comment is no heading
    starts = [match.start() for match in re.finditer(r"^#+ ", without, re.MULTILINE)]
    for start, end in zip(starts, [*starts[1:], len(text)], strict=True):
        part = text[start:end]
        blocks = re.findall(r"^```python\n(.*?)^```", part, re.DOTALL | re.MULTILINE)
        if blocks:
            yield Section(page, part.splitlines()[0].lstrip("# "), tuple(blocks))


#: Pages whose blocks run; python.md and the project's README need a photograph and have a test of their own.
PAGES = ["your-tokenizer.md", "vector-quantization.md", "attention.md", "README.md"]
PAGES += sorted(f"kernels/{path.name}" for path in (DOCS / "kernels").glob("*.md"))
SECTIONS = [each for page in PAGES for each in sections(page)]


def small() -> TiTok:
    return TiTok(width=32, layers=1, heads=4, latents=6, patch=4, grid=3, num_codes=40, dim=6)


def pretrained(module: nn.Module) -> Any:
    return SimpleNamespace(from_pretrained=lambda name: module)


def names() -> dict[str, Any]:
    """Name -> value of what the text of a section mentions; modules of other packages are reimplementations."""
    q, k, v = torch.randn(3, 2, 4, 7, 8)
    this: Any = nn.Module()
    this.embedding = nn.Embedding(16, 3)
    model = small()
    return {
        **{"alit_kernels": alit_kernels, "torch": torch, "F": F, "self": this, "name": "name"},
        **{"q": q, "k": k, "v": v, "model": model, "images": torch.randn(2, 3, 12, 12)},
        **{"x": torch.randn(2, 9, 512), "rotate": lambda heads: heads},
        "z": torch.randn(20, 3, requires_grad=True),
        **{"codebook": nn.Parameter(torch.randn(16, 3)), "share": torch.zeros(16)},
        **{
            "tokens": torch.randn(2, 9, 12, requires_grad=True),
            "first_batch": torch.randn(2, 9, 12),
        },
        **{"mask": torch.rand(2, 9) > 0.3, "reconstruction_loss": lambda x: x.square().mean()},
        "quantizer": alit_kernels.nn.VectorQuantizer(4096, 12),
        **{"codebook_entropy": alit_kernels.codebook_entropy, "weight": 0.1},
        "VectorQuantizer2": lambda n, dim, beta: VectorQuantizer2(n, dim, legacy=True),
        "VQ_models": {"VQ-16": lambda entropy_loss_ratio: LlamaGenQuantizer(40, 6, cosine=True)},
        **{"TiTok": lambda config: small(), "config": None},
        "VectorQuantize": lambda dim, codebook_size: Lucidrains(codebook_size, dim),
        "VQModel": pretrained(DiffusersQuantizer(40, 6, legacy=False)),
        "timm": SimpleNamespace(layers=SimpleNamespace(Attention=lambda *a, **k: nn.Module())),
        "ChameleonForConditionalGeneration": pretrained(Chameleon(40, 6)),
    }


def run(section: Section) -> dict[str, Any]:
    found = names()
    for block in section.blocks:
        exec(compile(block, f"{section.page}: {section.heading}", "exec"), found)
    return found


@pytest.mark.parametrize(
    "section", SECTIONS, ids=lambda section: f"{section.page}: {section.heading}"
)
def test_blocks_run(section: Section) -> None:
    """The blocks of a section run, and every module given to ``accelerate`` is swapped."""
    reports, accelerate = [], alit_kernels.accelerate
    record = lambda model, **options: reports.append(accelerate(model, **options)) or reports[-1]  # noqa: E731
    with mock.patch.object(alit_kernels, "accelerate", record):
        run(section)
    calls = "".join(section.blocks).count("alit_kernels.accelerate(")
    assert len(reports) == calls
    assert all(report.swapped and not report.left for report in reports)


def section(start: str) -> dict[str, Any]:
    return run(next(each for each in SECTIONS if each.heading.startswith(start)))


@pytest.mark.parametrize("page", ["python.md", "../README.md"])
def test_blocks_run_on_a_photograph(
    page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Image.fromarray(data.astronaut()).save("photo.jpg")
    found = {}
    for each in sections(page):
        found |= run(each)
    assert (tmp_path / "seen.png").exists()
    if page == "python.md":
        assert found["tokens"].lengths.numel() == 2 and found["short"].lengths.tolist() == [16] * 4
    else:
        assert found["out"].shape == (4 * 513, 8, 64) and found["tokens"].lengths.numel() == 1


ROOT = DOCS.parent
#: Every page of the repository that links to others.
TEXTS = [
    *sorted(DOCS.rglob("*.md")),
    *(ROOT / x for x in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")),
]
TEXTS += [ROOT / "alit" / "weights" / "README.md", ROOT / "benchmarks" / "results" / "README.md"]


def headings(text: str) -> set[str]:
    """Anchors of headings as made by code hosts and the site: lower case, no punctuation, hyphens for spaces."""
    lines = re.findall(
        r"^#+ (.*)$", re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL), re.MULTILINE
    )
    return {re.sub(r"[^\w\- ]", "", line.lower()).replace(" ", "-") for line in lines}


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(path: Path) -> None:
    text = BLOCK.sub("", path.read_text())
    for link in re.findall(r"\]\(([^()\s]+)\)", text):
        name, _, anchor = link.partition("#")
        if "://" in link:
            continue
        target = (path.parent / name).resolve() if name else path
        assert target.exists(), f"{path.name}: {link}"
        if anchor:
            assert anchor in headings(target.read_text()), f"{path.name}: {link}"


def test_sim_vq() -> None:
    """The projection's gradient equals that of the codebook written out; the frozen codes are not a parameter."""
    module = section("SimVQ")["SimVQ"](16, 4)
    z = torch.randn(50, 4, requires_grad=True)
    result = module(z)
    result.loss.backward()
    assert [name for name, _ in module.named_parameters()] == ["project.weight"]
    weight = module.project.weight.detach().clone().requires_grad_()
    codes = module.frozen @ weight.T
    index = torch.cdist(z, codes).argmin(-1)
    assert torch.equal(result.index, index)
    loss = (codes[index] - z.detach()).square().mean() + 0.25 * (
        codes[index].detach() - z
    ).square().mean()
    torch.testing.assert_close(result.loss, loss)
    (expected,) = torch.autograd.grad(loss, weight)
    torch.testing.assert_close(module.project.weight.grad, expected)


def test_anchors() -> None:
    """Unused codes move to the nearest vector, by 1 - 1e-3; codes in even use hardly move."""
    move = section("CVQ")["move_anchors"]
    codebook = torch.cat(
        [torch.randn(8, 4), 100 + torch.randn(8, 4)]
    )  # the second half is far from all vectors
    z = codebook[:8].repeat(5, 1) + 0.1 * torch.randn(40, 4)
    share, index = torch.zeros(16), alit_kernels.nearest_codeword(z, codebook)
    assert index.max() < 8
    before, nearest = codebook.clone(), torch.cdist(codebook, z).argmin(-1)
    move(codebook, share, z, index, decay=0.5)
    expected = torch.bincount(index, minlength=16) / 40 * 0.5
    torch.testing.assert_close(share, expected)
    moves = torch.exp(-share * 16 * 10 / 0.5 - 1e-3)[:, None]
    torch.testing.assert_close(
        codebook, before + moves * (z[nearest] - before), atol=1e-4, rtol=1e-4
    )
    torch.testing.assert_close(codebook[8:], z[nearest[8:]], atol=0.2, rtol=0)
    torch.testing.assert_close(codebook[:8], before[:8], atol=1e-3, rtol=0)


def test_quantizers_without_a_search() -> None:
    found = section("Quantizers without a search")
    for channel, levels in enumerate((8, 5, 5)):
        wide = torch.linspace(-9, 9, 1000)
        half = (levels - 1) / 2
        values = (wide.tanh() * half - half % 1).round()
        assert len(values.unique()) == levels
        assert set(found["levels"][:, channel].tolist()) <= set(values.tolist())
    torch.testing.assert_close(found["signs"].norm(dim=-1), torch.ones(20))
    assert found["signs"].abs().std() < 1e-6


def test_what_the_reference_names_is_there() -> None:
    """Modules, classes and functions whose docstrings are shown on pages exist."""
    found = [
        name
        for path in sorted(DOCS.rglob("*.md"))
        for name in re.findall(r"<!-- api: ([\w.]+) -->", path.read_text())
    ]
    assert len(found) > 30
    for name in found:
        module, _, attribute = name.rpartition(".")
        own = importlib.import_module(module)
        # The site finds an object in the module that defines it, not in one that exports it.
        shown = getattr(own, attribute)
        assert getattr(shown, "__module__", module) in (module, name), name
