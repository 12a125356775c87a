"""The page of ``alit serve`` in headless Chromium, if that is installed.

``make browser`` installs it, fails where it is missing, and leaves screenshots in build/browser.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from alit import TokenSequence
from alit.serve.app import Limits
from tests.helpers.image_files import SIGN
from tests.helpers.models import model
from tests.helpers.served import Served, serving

MISSING = "this needs a browser: pip install playwright && playwright install chromium"
#: Folder of screenshots; if set, a missing browser is an error.
SCREENSHOTS = os.environ.get("ALIT_SCREENSHOTS")
if SCREENSHOTS:
    import playwright.sync_api as playwright
else:
    playwright = pytest.importorskip("playwright.sync_api", reason=MISSING)


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    with serving(model(), Limits(upload_bytes=50_000, megapixels=1, images=4)) as server:
        yield server


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    """Chromium of Playwright, or else one on the path."""
    playwright.expect.set_options(timeout=20_000)
    with playwright.sync_playwright() as started:
        own = Path(started.chromium.executable_path).exists()
        names = ("chromium-headless-shell", "chromium", "google-chrome")
        path = None if own else next(filter(None, map(shutil.which, names)), None)
        if not own and path is None and not SCREENSHOTS:
            pytest.skip(MISSING)
        browser = started.chromium.launch(executable_path=path)
        yield browser
        browser.close()


@pytest.fixture(params=["desktop light", "phone dark"])
def page(
    request: pytest.FixtureRequest, chromium: Any, served: Served, tmp_path: Path
) -> Iterator[Any]:
    """The page, just opened; any error of its script or message of the browser fails the test."""
    device, scheme = request.param.split()
    size = {"desktop": (1280, 900), "phone": (375, 740)}[device]
    viewport = dict(zip(("width", "height"), size, strict=True))
    context = chromium.new_context(viewport=viewport, color_scheme=scheme)
    opened, said = context.new_page(), []
    opened.on("pageerror", lambda error: said.append(str(error)))
    opened.on("console", lambda message: said.append(message.text))
    opened.goto(served.address)
    playwright.expect(opened.locator("#most")).to_have_text("12")
    yield opened
    wide, seen = opened.evaluate("[document.body.scrollWidth, document.body.clientWidth]")
    assert wide <= seen  # nothing to scroll sideways
    folder = Path(SCREENSHOTS or tmp_path)
    folder.mkdir(parents=True, exist_ok=True)
    name = re.sub(r"\W+", "-", request.node.name).strip("-")
    opened.screenshot(path=folder / f"{name}.png", full_page=True)
    context.close()
    # The browser itself reports refused uploads.
    assert not [text for text in said if "status of 400" not in text]


def drop(page: Any, tmp_path: Path, image: Any = SIGN, name: str = "a sign.png") -> None:
    path = tmp_path / name
    image.save(path)
    page.set_input_files("#file", path)
    playwright.expect(page.locator("#about")).to_contain_text(name)


def shown(page: Any) -> tuple[bytes, ...]:
    """Screenshots of the reconstruction, once it is decoded, and of the map."""
    page.evaluate("document.getElementById('decoded').decode()")
    return tuple(page.locator(place).screenshot() for place in ("#decoded", "#map"))


def move(page: Any, tokens: int) -> None:
    page.fill("#tokens", str(tokens))
    playwright.expect(page.locator("#errors")).to_contain_text(re.compile(f"^{tokens} token"))


def test_slider_curve_maps_and_download(page: Any, served: Served, tmp_path: Path) -> None:
    expect = playwright.expect
    drop(page, tmp_path)
    expect(page.locator("#errors")).to_contain_text(re.compile(r"^6 tokens: L1 0\.\d{3}, "))
    expect(page.locator("#map")).to_be_visible()
    expect(page.locator("#chart polyline.ours")).to_have_attribute(
        "points",
        re.compile(r"^(\S+ ){11}\S+$"),  # all lengths, once they are there
    )
    move(page, 12)
    decoded, looked = shown(page)
    move(page, 2)
    less, elsewhere = shown(page)
    assert less != decoded and elsewhere != looked
    expect(page.locator("#cost")).to_have_text("10 bits, 2 bytes")
    expect(page.locator("#cells .kept")).to_have_count(2)

    page.locator("#cells i").nth(11).hover()
    expect(page.locator("#where")).to_have_text("Where token 12 looks")
    expect(page.locator("#iteration")).to_have_text("token 12, of iteration 4")
    assert shown(page)[0] == less

    curve = page.locator("#chart").inner_html()
    page.check("[value=psnr]")
    assert page.locator("#chart").inner_html() != curve

    box = page.locator("#chart").bounding_box()
    page.locator("#chart").click(position={"x": box["width"] - 14, "y": box["height"] / 2})
    expect(page.locator("#count")).to_have_text("12 tokens")

    move(page, 5)
    with page.expect_download() as download:
        page.click("#download")
    assert download.value.suggested_filename == "a sign.alit"
    data = Path(download.value.path()).read_bytes()
    assert TokenSequence.from_bytes(data, served.model.identity()).lengths.tolist() == [5]


def test_a_dropped_image_takes_the_place_of_the_first(page: Any, tmp_path: Path) -> None:
    drop(page, tmp_path)
    move(page, 7)
    first = shown(page)
    page.evaluate(
        """async () => {
        const canvas = document.createElement("canvas");
        canvas.getContext("2d").fillRect(9, 9, 99, 99);
        const blob = await new Promise(done => canvas.toBlob(done));
        const files = new DataTransfer();
        files.items.add(new File([blob], "drawn.png"));
        document.dispatchEvent(new DragEvent("drop", { dataTransfer: files }));
    }"""
    )
    playwright.expect(page.locator("#about")).to_contain_text("drawn.png")
    move(page, 8)
    move(page, 7)
    assert shown(page) != first


def test_what_is_wrong_is_shown(page: Any, tmp_path: Path) -> None:
    """An error is shown, and the previous image stays."""
    error, expect = page.locator("#error"), playwright.expect
    drop(page, tmp_path)
    for size, reason in ((10, "image: not a readable image ("), (50_001, "image: too large")):
        (tmp_path / "notes.png").write_bytes(b"x" * size)
        page.set_input_files("#file", tmp_path / "notes.png")
        expect(error).to_contain_text(reason)
    expect(page.locator("#about")).to_contain_text("a sign.png")
    expect(page.locator("#drop")).to_have_text("Another image")
