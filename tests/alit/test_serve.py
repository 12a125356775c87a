"""What ``alit serve`` answers over HTTP; test_serve_page.py opens its page in a browser."""

from __future__ import annotations

import base64
import hashlib
import io
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
import uvicorn
from PIL import Image

from alit import FixedLength, TokenSequence
from alit.alit_format import Reader
from alit.attention_maps import latent_attention
from alit.evaluation.metrics import eight_bits, l1, psnr, thumbnail
from alit.fitting import fitted
from alit.images import to_image
from alit.serve import guard
from alit.serve.app import Limits
from alit.serve.guard import Guard
from tests.helpers.commands import refused, run
from tests.helpers.models import model
from tests.helpers.pictures import SIGN, saved
from tests.helpers.served import Served, serving

LIMITS = Limits(upload_bytes=20_000, megapixels=0.5, pictures=3)


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    with serving(model(), LIMITS) as server:
        yield server


def test_a_picture_from_upload_to_download(served: Served) -> None:
    m, picture = served.model, SIGN.resize((60, 40))
    answer = served.ask("/pictures?name=a%20sign.png", saved(picture, "PNG").getvalue())
    assert answer.status == 201 and answer.json.pop("key")
    expected = {"name": "a sign.png", "original": [40, 60], "size": [16, 24]}
    assert {**answer.json, "key": ""} == {**expected, "key": ""}
    path = f"/pictures/{answer.json['key']}"
    image = fitted(picture, (16, 24), 4, "whole").image
    assert served.ask(f"{path}/original.png").image.tobytes() == to_image(image).tobytes()

    tokens = m.encode([image], FixedLength(12))
    for count in (1, 5, 12):
        pixels = m.decode(tokens.truncated(count))[0]
        answer = served.ask(f"{path}/reconstruction.png?tokens={count}")
        assert answer.image.tobytes() == to_image(pixels).tobytes()
        for name, shown in (
            ("Alit-", eight_bits(pixels)),
            ("Alit-Thumbnail-", thumbnail(image[None], 5 * count)[0]),
        ):
            assert abs(float(answer.headers[f"{name}L1"]) - float(l1(shown, image))) < 1e-6
            assert abs(float(answer.headers[f"{name}PSNR"]) - float(psnr(shown, image))) < 1e-3

        answer = served.ask(f"{path}/tokens.alit?tokens={count}")
        found = TokenSequence.from_bytes(answer.data, m.identity())
        assert torch.equal(found.indices, tokens.indices[:count])
        said = Reader(io.BytesIO(answer.data)).pictures(0, 1)
        assert said.names == ["a sign.png"] and said.originals.tolist() == [[40, 60]]
        disposition = answer.headers["Content-Disposition"]
        assert disposition == "attachment; filename*=UTF-8''a%20sign.alit"

    found = served.ask(f"{path}/attention").json
    maps = latent_attention(m, image[None])[0].flatten(1).numpy()
    low, high = maps.min(1, keepdims=True), maps.max(1, keepdims=True)
    assert (found["rows"], found["columns"]) == (4, 6)
    shares = np.array(found["maps"]) / 255
    assert np.abs(shares - (maps - low) / (high - low)).max() < 0.003
    assert shares.shape == (12, 24)


def test_any_shape(served: Served) -> None:
    """Of the original's shape are the picture, its reconstruction and its maps."""
    path = served.upload(SIGN.resize((20, 90)), "../tall/one.png")
    size = served.ask(f"{path}/original.png").image.size
    assert size == (8, 40)
    assert served.ask(f"{path}/reconstruction.png?tokens=3").image.size == size
    found = served.ask(f"{path}/attention").json
    assert (found["columns"], found["rows"]) == (2, 10)
    file = served.ask(f"{path}/tokens.alit?tokens=3").data
    assert Reader(io.BytesIO(file)).pictures(0, 1).names == [".._tall_one.png"]


def test_the_model_and_its_page(served: Served) -> None:
    assert served.ask("/model").json == {
        **{"name": "small", "tokens": 12, "tokens_per_iteration": 3, "bits_per_token": 5},
        **{"max_bytes": 20_000, "max_megapixels": 0.5},
    }
    answer = served.ask("/")
    page, policy = answer.data.decode(), answer.headers["Content-Security-Policy"]
    assert answer.headers["Content-Type"] == "text/html; charset=utf-8"
    (script,) = re.findall("<script>(.*?)</script>", page, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in policy and "unsafe" not in policy
    assert set(re.findall(r"https?://[\w.]+", page)) == {"http://www.w3.org"}  # names of SVG
    assert not re.search(r"\bstyle=|\bon\w+=", page)  # the policy forbids them


@pytest.mark.parametrize(
    ("path", "data", "status", "error"),
    [
        ("/pictures", b"no picture", 400, "picture: not a readable picture (cannot identify"),
        ("/pictures", b"", 400, "picture: expected the bytes of a file, got none"),
        ("/pictures", b"%!PS-Adobe-3.0 EPSF-3.0\n", 400, "picture: not a readable picture"),
        ("/pictures", bytes(20_001), 413, "picture: too large: expected at most 20000 bytes"),
        ("/pictures/none/original.png", None, 404, "key: no such picture; the last 3 are kept"),
        ("/pictures/none/tokens.alit?tokens=3", None, 404, "key: no such picture"),
        ("/nothing", None, 404, "address: not found"),
        ("/pictures", None, 405, "address: method not allowed"),
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


def test_pictures_of_too_many_pixels_and_damaged_ones(served: Served) -> None:
    bomb = saved(Image.new("1", (1000, 1000)), "PNG").getvalue()
    assert len(bomb) < LIMITS.upload_bytes
    for data, reason in (
        (bomb, "too large: more than 0.5 megapixels"),
        (saved(SIGN, "PNG").getvalue()[:-30], "truncated"),
    ):
        answer = served.ask("/pictures", data)
        assert answer.status == 400 and reason in answer.json["error"], answer.json


def test_a_large_upload_is_refused_before_it_is_sent(served: Served) -> None:
    """Where its length is announced; else as soon as there is more than the limit."""
    with socket.create_connection(("127.0.0.1", served.port), timeout=20) as connection:
        head = "POST /pictures HTTP/1.1\r\nHost: localhost\r\nContent-Length: 99999999999\r\n\r\n"
        connection.sendall(head.encode())
        assert connection.recv(1000).startswith(b"HTTP/1.1 413 ")
    with socket.create_connection(("127.0.0.1", served.port), timeout=20) as connection:
        head = "POST /pictures HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"
        connection.sendall(head.encode() + b"7000\r\n" + bytes(0x7000) + b"\r\n")
        assert connection.recv(1000).startswith(b"HTTP/1.1 413 ")


def test_uploads_that_do_not_come_to_an_end(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Others are answered afterwards."""
    head = b"POST /pictures HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n\r\nhalf"
    for _ in range(3):
        with socket.create_connection(("127.0.0.1", served.port)) as connection:
            connection.sendall(head)
    monkeypatch.setattr(guard, "PATIENCE", 0.1)
    with socket.create_connection(("127.0.0.1", served.port), timeout=20) as connection:
        connection.sendall(head)
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
    """As a page has them whose name leads here (DNS rebinding)."""
    answer = served.ask(path, Host=host)
    assert answer.status == 403 and answer.json["field"] == "Host"


@pytest.mark.parametrize("origin", ["http://evil.example", "null", "http://127.0.0.1:1", "", "x"])
def test_foreign_pages(served: Served, origin: str) -> None:
    """Any page can send a request here without asking, if it cannot read the answer."""
    data = saved(SIGN, "PNG").getvalue()
    answer = served.ask("/pictures", data, Origin=origin, Content_Type="text/plain")
    assert answer.status == 403 and answer.json["field"] == "Origin"
    assert "Access-Control-Allow-Origin" not in served.ask("/model").headers


def test_the_name_that_the_command_gives_is_an_own_one() -> None:
    own = Guard(None, ("Box.local",), "")
    assert own._is_ours("box.local:8000") and not own._is_ours("other.local:8000")


@pytest.mark.parametrize("path", ["/", "/model", "/nothing", "/pictures/none/original.png"])
def test_headers_of_every_answer(served: Served, path: str) -> None:
    for host in ("localhost", "evil.example"):
        headers = served.ask(path, Host=host).headers
        assert headers["Cache-Control"] == "no-store"
        assert headers["Cross-Origin-Resource-Policy"] == "same-origin"
        assert headers["X-Content-Type-Options"] == "nosniff"
        assert "frame-ancestors 'none'" in headers["Content-Security-Policy"]


def test_the_last_pictures_are_kept(served: Served) -> None:
    """Those that were asked for last."""
    first, second, third = (served.upload() for _ in range(3))
    assert served.ask(f"{first}/original.png").status == 200
    fourth = served.upload()
    status = [served.ask(f"{path}/original.png").status for path in (first, second, third, fourth)]
    assert status == [200, 404, 200, 200]


def test_the_model_runs_one_request_at_a_time(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, decode, running, threads = served.upload(), served.model.decode, [], set()

    def alone(tokens: TokenSequence) -> torch.Tensor:
        running.append(1)
        threads.add(threading.get_ident())
        assert len(running) == 1
        result = decode(tokens)
        running.pop()
        return result

    monkeypatch.setattr(served.model, "decode", alone)
    with ThreadPoolExecutor(8) as pool:
        asked = [f"{path}/reconstruction.png?tokens={1 + i % 12}" for i in range(24)]
        assert [answer.status for answer in pool.map(served.ask, asked)] == [200] * 24
    assert len(threads) == 1 and threading.get_ident() not in threads


def test_a_model_without_maps() -> None:
    with serving(model("vqgan", halting="drop"), LIMITS) as server:
        answer = server.ask(f"{server.upload()}/attention")
    assert answer.status == 409 and answer.json["error"].startswith(
        "model: expected one that keeps"
    )


def test_the_command(here: Path) -> None:
    """From its start to Ctrl-C, with what it gives decoded by another command."""
    command = [sys.executable, "-m", "alit", "serve", "--port", "0", "--model"]
    process = subprocess.Popen([*command, "weights/nano.safetensors"], stdout=subprocess.PIPE)
    try:
        line = process.stdout.readline().decode()
        port = int(re.fullmatch(r"http://127\.0\.0\.1:(\d+): open it in a .*\n", line)[1])
        asked = Served(model(), port)
        file = asked.ask(f"{asked.upload()}/tokens.alit?tokens=7").data
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 0 and process.stdout.read() == b""
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
    Path("sign.alit").write_bytes(file)
    done = run("decode", "sign.alit", "-o", "out", "--model", "weights/nano.safetensors")
    assert done.exit_code == 0 and Image.open("out/sign.png").size == SIGN.size


@pytest.mark.parametrize(
    "host, alone", [("127.0.0.1", True), ("localhost", True), ("0.0.0.0", False)]
)
def test_the_command_says_who_may_ask(
    here: Path, host: str, alone: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(uvicorn.Server, "run", lambda self, sockets: None)
    done = run("serve", "--host", host, "--port", 0)
    assert done.exit_code == 0 and f"http://{host}:" in done.output
    assert ("whoever reaches this address may use it" in done.output) is not alone


def test_the_command_says_what_is_wrong(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        refused(run("serve", "--port", port), f"cannot listen at 127.0.0.1, port {port} (")
    refused(run("serve", "--host", "no such host"), "--host: expected an address of this machine")
    refused(run("serve", "--model", "nanno"), "did you mean 'nano'?")
    assert run("serve", "--port", 70000).exit_code == 2
    model(bottleneck="continuous").save_pretrained("c.safetensors")
    refused(run("serve", "--model", "c.safetensors"), "model: expected one that gives indices")
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    refused(run("serve"), "this needs uvicorn: pip install 'alit[serve]'")
