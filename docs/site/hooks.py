"""What makes the site of the pages in docs/, which are plain Markdown that a code host shows as well.

- Pages are those of docs/, and some of the repository (``ELSEWHERE``).
- Links of pages to other files of the repository lead to copies of them in the site, below repository/.
- ``<!-- api: NAME -->`` becomes the docstring of that function or class, ``<!-- source: FILE -->`` a program.
- docs/tour.ipynb becomes a page. The variable ``ALIT_TOUR`` names what nbconvert made of it (``make docs``); without it
  the cells are shown as they are, without outputs, and the page says so.
"""

from __future__ import annotations

import json
import os
import posixpath
import re
from pathlib import Path, PurePosixPath
from urllib.parse import unquote

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
#: Pages beside those of docs/, and what they are in the site.
ELSEWHERE = {
    "CONTRIBUTING.md": "CONTRIBUTING.md",
    "CHANGELOG.md": "CHANGELOG.md",
    "benchmarks/results/README.md": "results.md",
    "alit/weights/README.md": "repository/weights.md",
}
LINK = re.compile(r"(\]\()([^()\s]+)(\))")
API = re.compile(r"^<!-- api: ([\w.]+) -->$", re.MULTILINE)
SOURCE = re.compile(r"^<!-- source: ([\w.]+) -->$", re.MULTILINE)
FENCE = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
#: Between parts of what a cell prints, which come one by one.
PARTS = re.compile(r"^(    .*\S\n)\n\n(?=    +\S)", re.MULTILINE)
HIDDEN = "---\nsearch:\n  exclude: true\n---\n"
#: Page of the site -> its place in the repository.
_places: dict[str, str] = {}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Pages, and what they link to."""
    _places.clear()
    for path in sorted(DOCS.rglob("*.md")):
        if DOCS / "site" not in path.parents:
            _add(files, config, path.relative_to(DOCS).as_posix(), f"docs/{path.relative_to(DOCS)}")
    for place, uri in ELSEWHERE.items():
        _add(files, config, uri, place, (ROOT / place).read_text(encoding="utf-8"))
    _add_tour(files, config)
    for uri, place in list(_places.items()):
        if uri.endswith(".md"):
            for target in sorted(_targets(files.get_file_from_path(uri).content_string, place)):
                _add_linked(files, config, target)
    return files


def _add(files: Files, config: MkDocsConfig, uri: str, place: str, text: str | None = None) -> None:
    if text is None:
        files.append(File(uri, str(DOCS), config.site_dir, use_directory_urls=False))
    else:
        files.append(File.generated(config, uri, content=text))
    _places[uri] = place


def _uris() -> dict[str, str]:
    """Place in the repository -> page of the site."""
    return {place: uri for uri, place in _places.items()}


def _targets(text: str, place: str) -> set[str]:
    """Files of the repository that a page links to."""
    found = set()
    for _, link, _ in LINK.findall(FENCE.sub("", text)):
        path = unquote(link.partition("#")[0])
        if path and ":" not in path:
            found.add(posixpath.normpath(posixpath.join(posixpath.dirname(place), path)))
    return found


def _add_linked(files: Files, config: MkDocsConfig, place: str) -> None:
    """A copy of a file; a program as a page, a folder as a list of its files."""
    path, name = ROOT / place, PurePosixPath(place).name
    if {place, f"{place}/."} & _uris().keys() or not path.exists():
        return  # it is there, or mkdocs says that the link leads nowhere
    if path.is_dir():
        inside = sorted(x.name for x in path.iterdir() if x.is_file())
        for each in inside:
            _add_linked(files, config, f"{place}/{each}")
        lines = "\n".join(f"- [{each}]({each})" for each in inside)
        text = f"{HIDDEN}# {name}\n\n{lines}\n"
        _add(files, config, f"repository/{place}/index.md", f"{place}/.", text)
    elif path.suffix in (".py", ".yaml"):
        language = {".py": "python", ".yaml": "yaml"}[path.suffix]
        text = f"{HIDDEN}# {place}\n\n```{language}\n{path.read_text(encoding='utf-8')}```\n"
        _add(files, config, f"repository/{place}.md", place, text)
    else:
        uri = f"repository/{place}"
        files.append(File.generated(config, uri, abs_src_path=str(path)))
        _places[uri] = place


def _add_tour(files: Files, config: MkDocsConfig) -> None:
    made = os.environ.get("ALIT_TOUR")
    if made:
        text = Path(made).read_text(encoding="utf-8").replace("![png](", "![output](")
        text = PARTS.sub(r"\1", text)
        for uri in re.findall(r"\]\((tour_files/[\w.]+)\)", text):
            image = str(Path(made).parent / uri)
            files.append(File.generated(config, uri, abs_src_path=image))
            _places[uri] = f"docs/{uri}"
    else:
        cells = json.loads((DOCS / "tour.ipynb").read_text(encoding="utf-8"))["cells"]
        parts = []
        for cell in cells:
            source = "".join(cell["source"])
            parts.append(source if cell["cell_type"] == "markdown" else f"```python\n{source}\n```")
        note = "!!! note\n\n    The notebook has not been run for this page: `make docs` does."
        text = "\n\n".join([parts[0], note, *parts[1:]])
    _add(files, config, "tour.md", "docs/tour.ipynb", text)


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Links as they are in the site; docstrings and programs."""
    place = _places[page.file.src_uri]
    uris = _uris()

    def rewritten(match: re.Match[str]) -> str:
        path, hash_, anchor = match[2].partition("#")
        if not path or ":" in path:
            return match[0]
        target = posixpath.normpath(posixpath.join(posixpath.dirname(place), unquote(path)))
        uri = uris.get(target, uris.get(f"{target}/."))
        if uri is None:
            return match[0]  # mkdocs says that it leads nowhere
        return (
            match[1]
            + posixpath.relpath(uri, posixpath.dirname(page.file.src_uri) or ".")
            + hash_
            + anchor
            + match[3]
        )

    pieces, end = [], 0
    for fence in FENCE.finditer(markdown):  # text between blocks of code
        pieces += [LINK.sub(rewritten, markdown[end : fence.start()]), fence[0]]
        end = fence.end()
    text = "".join([*pieces, LINK.sub(rewritten, markdown[end:])])
    text = API.sub(lambda match: f"::: {match[1]}", text)
    return SOURCE.sub(lambda match: _program((ROOT / place).parent / match[1]), text)


def _program(path: Path) -> str:
    lines = [
        f'??? example "{path.name}"',
        "",
        "```python",
        *path.read_text(encoding="utf-8").splitlines(),
        "```",
    ]
    return "\n".join([lines[0], *(f"    {line}" if line else "" for line in lines[1:])])
