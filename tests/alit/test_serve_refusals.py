"""Requests that ``alit serve`` refuses: wrong, too large, too slow, with foreign names or from foreign pages."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest
from PIL import Image

from alit.serve import guard
from alit.serve.guard import Guard
from tests.helpers.image_files import SIGN, saved
from tests.helpers.models import model
from tests.helpers.served import HALF, LIMITS, Served, serving


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    with serving(model(), LIMITS) as server:
        yield server


@pytest.mark.parametrize(
    ("path", "data", "status", "error"),
    [
        ("/images", b"no image", 400, "image: not a readable image (cannot identify"),
        ("/images", b"", 400, "image: expected the bytes of a file, got none"),
        ("/images", b"%!PS-Adobe-3.0 EPSF-3.0\n", 400, "image: not a readable image"),
        ("/images", bytes(20_001), 413, "image: too large: expected at most 20000 bytes"),
        ("/images/none/original.png", None, 404, "key: no such image; the last 3 are kept"),
        ("/images/none/tokens.alit?tokens=3", None, 404, "key: no such image"),
        ("/nothing", None, 404, "address: not found"),
        ("/images", None, 405, "address: method not allowed"),
        ("/model", b"x", 405, "address: method not allowed"),
    ],
)
def test_what_is_wrong_is_named(
    served: Served, path: str, data: bytes | None, status: int, error: str
) -> None:
    answer = served.ask(path, data)
    assert answer.status == status and answer.json["error"].startswith(error), answer
    assert answer.json["field"] == error.partition(":")[0]


@pytest.mark.parametrize("what", ["reconstruction.png", "tokens.alit"])
@pytest.mark.parametrize("given", ["", "0", "13", "-1", "3.0", "\u0663", "9" * 5000])
def test_numbers_of_tokens(served: Served, what: str, given: str) -> None:
    query = "".join(f"%{byte:02X}" for byte in given.encode())
    answer = served.ask(f"{served.upload()}/{what}?tokens={query}")
    assert answer.status == 400
    assert answer.json["error"] == f"tokens: expected 1 to 12, got {given[:100]!r}"


def test_images_of_too_many_pixels_and_damaged_ones(served: Served) -> None:
    bomb = saved(Image.new("1", (1000, 1000)), "PNG").getvalue()
    assert len(bomb) < LIMITS.upload_bytes
    for data, reason in (
        (bomb, "too large: more than 0.5 megapixels"),
        (saved(SIGN, "PNG").getvalue()[:-30], "truncated"),
    ):
        answer = served.ask("/images", data)
        assert answer.status == 400 and reason in answer.json["error"], answer.json


def test_a_large_upload_is_refused_before_it_is_sent(served: Served) -> None:
    """A large upload is refused by its announced length, or as soon as it exceeds the limit."""
    with socket.create_connection(("127.0.0.1", served.port), timeout=20) as connection:
        head = "POST /images HTTP/1.1\r\nHost: localhost\r\nContent-Length: 99999999999\r\n\r\n"
        connection.sendall(head.encode())
        assert connection.recv(1000).startswith(b"HTTP/1.1 413 ")
    with socket.create_connection(("127.0.0.1", served.port), timeout=20) as connection:
        head = "POST /images HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"
        connection.sendall(head.encode() + b"7000\r\n" + bytes(0x7000) + b"\r\n")
        assert connection.recv(1000).startswith(b"HTTP/1.1 413 ")


def test_uploads_that_do_not_come_to_an_end(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stalled uploads time out, and other requests are answered."""
    for _ in range(3):
        with socket.create_connection(("127.0.0.1", served.port)) as connection:
            connection.sendall(HALF)
    monkeypatch.setattr(guard, "PATIENCE", 0.1)
    with socket.create_connection(("127.0.0.1", served.port), timeout=20) as connection:
        connection.sendall(HALF)
        assert connection.recv(1000).startswith(b"HTTP/1.1 408 ")
    monkeypatch.undo()
    assert served.upload()


@pytest.mark.parametrize(
    "host",
    ["localhost", "LOCALHOST:8000", "127.0.0.1", "127.0.0.1:1", "[::1]:8000", "192.168.1.20:8000"],
)
def test_own_names(served: Served, host: str) -> None:
    for origin in ({}, {"Origin": f"http://{host}"}):
        assert served.ask("/model", Host=host, **origin).status == 200


@pytest.mark.parametrize(
    "host",
    ["evil.example", "localhost.evil.example:8000", "127.0.0.1.evil.example", "", "[::1", "a@b"],
)
@pytest.mark.parametrize("path", ["/", "/model", "/nothing"])
def test_foreign_names(served: Served, host: str, path: str) -> None:
    """Requests with a foreign Host, as in DNS rebinding, are refused."""
    answer = served.ask(path, Host=host)
    assert answer.status == 403 and answer.json["field"] == "Host"


@pytest.mark.parametrize("origin", ["http://evil.example", "null", "http://127.0.0.1:1", "", "x"])
def test_foreign_pages(served: Served, origin: str) -> None:
    """Requests with a foreign Origin are refused: any page can send them, even if it cannot read the answer."""
    data = saved(SIGN, "PNG").getvalue()
    answer = served.ask("/images", data, Origin=origin, Content_Type="text/plain")
    assert answer.status == 403 and answer.json["field"] == "Origin"
    assert "Access-Control-Allow-Origin" not in served.ask("/model").headers


def test_the_name_that_the_command_gives_is_an_own_one() -> None:
    own = Guard(None, ("Box.local",), "")
    assert own._is_ours("box.local:8000") and not own._is_ours("other.local:8000")


@pytest.mark.parametrize("path", ["/", "/model", "/nothing", "/images/none/original.png"])
def test_headers_of_every_answer(served: Served, path: str) -> None:
    for host in ("localhost", "evil.example"):
        headers = served.ask(path, Host=host).headers
        assert headers["Cache-Control"] == "no-store"
        assert headers["Cross-Origin-Resource-Policy"] == "same-origin"
        assert headers["X-Content-Type-Options"] == "nosniff"
        assert "frame-ancestors 'none'" in headers["Content-Security-Policy"]
