"""Application of ``alit serve`` on a local port, and requests to it."""

from __future__ import annotations

import http.client
import io
import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import uvicorn
from PIL import Image

from alit import AdaptiveTokenizer
from alit.serve.app import Limits, Playground
from tests.helpers.image_files import SIGN, saved

LIMITS = Limits(upload_bytes=20_000, megapixels=0.5, images=3)
#: First half of an upload.
HALF = b"POST /images HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n\r\nhalf"


class Answer(NamedTuple):
    status: int
    headers: Any
    data: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.data)

    @property
    def image(self) -> Image.Image:
        return Image.open(io.BytesIO(self.data))


class Served(NamedTuple):
    model: AdaptiveTokenizer
    port: int

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def ask(self, path: str, data: Any = None, *, method: str = "", **headers: str) -> Answer:
        """Answer to a GET request, or POST if ``data`` is given; names of headers have ``_`` for ``-``."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)
        given = {name.replace("_", "-"): value for name, value in headers.items()}
        chosen = method or ("GET" if data is None else "POST")
        connection.request(chosen, path, data, given, encode_chunked="Transfer-Encoding" in given)
        answer = connection.getresponse()
        found = Answer(answer.status, answer.headers, answer.read())
        connection.close()
        return found

    def upload(self, image: Image.Image = SIGN, name: str = "sign.png") -> str:
        """Upload an image; returns the path under which it is served."""
        answer = self.ask(f"/images?name={name}", saved(image, "PNG").getvalue())
        assert answer.status == 201, answer
        return f"/images/{answer.json['key']}"


@contextmanager
def serving(model: AdaptiveTokenizer, limits: Limits) -> Iterator[Served]:
    app = Playground(model, "small", limits).application()
    config = uvicorn.Config(app, log_level="warning")
    server = uvicorn.Server(config)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        while not server.started and thread.is_alive():
            time.sleep(0.01)
        try:
            yield Served(model, listener.getsockname()[1])
        finally:
            server.should_exit = True
            thread.join()
