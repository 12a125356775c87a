"""Answers of ``alit serve`` over HTTP, and the command; refusals and the page have tests of their own."""

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
from tests.helpers.commands import refused, run
from tests.helpers.image_files import SIGN, saved
from tests.helpers.models import model
from tests.helpers.served import HALF, LIMITS, Served, serving


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    with serving(model(), LIMITS) as server:
        yield server


def test_an_image_from_upload_to_download(served: Served) -> None:
    m, photo = served.model, SIGN.resize((60, 40))
    answer = served.ask("/images?name=a%20sign.png", saved(photo, "PNG").getvalue())
    said = answer.json
    path = f"/images/{said.pop('key')}"
    assert answer.status == 201
    assert said == {"name": "a sign.png", "original": [40, 60], "size": [16, 24]}
    image = fitted(photo, (16, 24), 4, "whole").image
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
        said = Reader(io.BytesIO(answer.data)).images(0, 1)
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
    """The image, its reconstruction and its maps have the original's shape."""
    path = served.upload(SIGN.resize((20, 90)), "../tall/one.png")
    size = served.ask(f"{path}/original.png").image.size
    assert size == (8, 40)
    assert served.ask(f"{path}/reconstruction.png?tokens=3").image.size == size
    found = served.ask(f"{path}/attention").json
    assert (found["columns"], found["rows"]) == (2, 10)
    file = served.ask(f"{path}/tokens.alit?tokens=3").data
    assert Reader(io.BytesIO(file)).images(0, 1).names == [".._tall_one.png"]


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


def test_the_last_images_are_kept(served: Served) -> None:
    """The images used last are kept, older ones are dropped."""
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
    """The command serves until Ctrl-C during an upload; its token file is decoded by ``alit decode``."""
    command = [sys.executable, "-m", "alit", "serve", "--port", "0", "--model"]
    process = subprocess.Popen(
        [*command, "weights/nano.safetensors"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    try:
        line = process.stdout.readline().decode()
        port = int(re.fullmatch(r"http://127\.0\.0\.1:(\d+): open it in a .*\n", line)[1])
        asked = Served(model(), port)
        file = asked.ask(f"{asked.upload()}/tokens.alit?tokens=7").data
        with socket.create_connection(("127.0.0.1", port), timeout=20) as connection:
            connection.sendall(HALF)
            asked.ask("/model")  # answered after the upload has begun
            process.send_signal(signal.SIGINT)
            assert connection.recv(1000).startswith(b"HTTP/1.1 503 ")
        assert process.wait(20) == 0 and b"Traceback" not in process.stdout.read()
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
