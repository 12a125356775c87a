"""HTTP interface of the page; docs/serve.md has a table of its routes."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import re
import secrets
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route

from ..images import to_image
from ..tokenizer import AdaptiveTokenizer
from .guard import Guard, Refused, body
from .uploads import Upload, attention, encoded, png, reconstruction

#: Uploads that are processed at a time; others wait unread.
UPLOADS = 2


@dataclass(frozen=True)
class Limits:
    """Limits: bytes and millions of pixels of an upload, and number of images that are kept."""

    upload_bytes: int
    megapixels: float
    images: int


class Playground:
    """A model, the one thread that runs it, and the images that were requested last.

    Args:
        model: one that gives indices.
        name: its name on the page.
    """

    def __init__(self, model: AdaptiveTokenizer, name: str, limits: Limits) -> None:
        self.model, self.name, self.limits, self.identity = model, name, limits, model.identity()
        self.page = (Path(__file__).parent / "page.html").read_text(encoding="utf-8")
        self.images: OrderedDict[str, Upload] = OrderedDict()
        self.uploads = asyncio.Semaphore(UPLOADS)
        self.thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="model")

    def application(self, *names: str) -> Starlette:
        """ASGI application; ``names`` are those of this machine, beside localhost, that requests may use."""
        routes = [
            Route("/", self.show_page),
            Route("/model", self.about),
            Route("/images", self.upload, methods=["POST"]),
            Route("/images/{key}/original.png", self.original),
            Route("/images/{key}/reconstruction.png", self.reconstruction),
            Route("/images/{key}/attention", self.attention),
            Route("/images/{key}/tokens.alit", self.tokens),
        ]
        return Starlette(
            routes=routes,
            middleware=[Middleware(Guard, names=names, policy=policy(self.page))],
            exception_handlers={Refused: _refused, HTTPException: _no_such},
            lifespan=self.lifespan,
        )

    @asynccontextmanager
    async def lifespan(self, app: Starlette) -> AsyncIterator[None]:
        """Context manager: cancel work that has not begun when the server ends."""
        yield
        self.thread.shutdown(wait=False, cancel_futures=True)

    async def work(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Run a function of the model in its thread, after earlier work; returns its result."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self.thread, function, self.model, *arguments)

    async def show_page(self, request: Request) -> Response:
        return HTMLResponse(self.page)

    async def about(self, request: Request) -> Response:
        config = self.model.config
        return JSONResponse(
            {
                "name": self.name,
                "tokens": config.max_tokens,
                "tokens_per_iteration": config.latents_per_iteration,
                "bits_per_token": self.identity.bits,
                "max_bytes": self.limits.upload_bytes,
                "max_megapixels": self.limits.megapixels,
            }
        )

    async def upload(self, request: Request) -> Response:
        async with self.uploads:
            data = await body(request, "image", self.limits.upload_bytes)
            name = request.query_params.get("name", "")
            try:
                upload = await self.work(encoded, data, name, self.limits.megapixels)
            except OSError as error:
                reason = f"not a readable image ({error})"
                raise Refused(400, "image", reason) from error
        key = secrets.token_urlsafe(16)
        self.images[key] = upload
        while len(self.images) > self.limits.images:
            self.images.popitem(last=False)
        size = list(upload.image.shape[1:])
        said = {"key": key, "name": upload.name, "original": list(upload.original), "size": size}
        return JSONResponse(said, 201)

    async def original(self, request: Request) -> Response:
        upload = self.asked(request)
        return Response(png(to_image(upload.image)), media_type="image/png")

    async def reconstruction(self, request: Request) -> Response:
        upload, tokens = self.asked(request), self.count(request)
        made = await self.work(reconstruction, upload, tokens)
        headers = {
            "Alit-L1": f"{made.l1:.6f}",
            "Alit-PSNR": f"{made.psnr:.4f}",
            "Alit-Thumbnail-L1": f"{made.thumbnail_l1:.6f}",
            "Alit-Thumbnail-PSNR": f"{made.thumbnail_psnr:.4f}",
        }
        return Response(made.png, media_type="image/png", headers=headers)

    async def attention(self, request: Request) -> Response:
        try:
            maps = await self.work(attention, self.asked(request))
        except ValueError as error:  # a model without attention maps
            field, _, reason = str(error).partition(": ")
            raise Refused(409, field, reason) from error
        rows, columns = maps.shape[1:]
        return JSONResponse({"rows": rows, "columns": columns, "maps": maps.flatten(1).tolist()})

    async def tokens(self, request: Request) -> Response:
        upload, tokens = self.asked(request), self.count(request)
        name = f"{Path(upload.name).stem or 'image'}.alit"
        headers = {"Content-Disposition": f"attachment; filename*=UTF-8''{quote(name, safe='')}"}
        data = upload.file(tokens, self.identity)
        return Response(data, media_type="application/octet-stream", headers=headers)

    def asked(self, request: Request) -> Upload:
        """Image that the request's address names, now the last to be dropped; raises ``Refused`` if it is not kept."""
        key = request.path_params["key"]
        if key not in self.images:
            reason = f"no such image; the last {self.limits.images} are kept, upload it again"
            raise Refused(404, "key", reason)
        self.images.move_to_end(key)
        return self.images[key]

    def count(self, request: Request) -> int:
        """Query parameter ``tokens``, 1 to the model's most; raises ``Refused`` for anything else."""
        given, most = request.query_params.get("tokens", ""), self.model.config.max_tokens
        if not re.fullmatch("[0-9]{1,9}", given) or not 1 <= int(given) <= most:
            raise Refused(400, "tokens", f"expected 1 to {most}, got {given[:100]!r}")
        return int(given)


def policy(page: str) -> str:
    """Content-Security-Policy of the page, which allows its own script and style, by their hashes, and this server."""

    def own(tag: str) -> str:
        (text,) = re.findall(f"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        digest = hashlib.sha256(text.encode()).digest()
        return f"'sha256-{base64.b64encode(digest).decode()}'"

    return (
        f"default-src 'none'; script-src {own('script')}; style-src {own('style')}; connect-src 'self'; "
        "img-src 'self' blob: data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )


async def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, Refused)
    return error.answer()


async def _no_such(request: Request, error: Exception) -> Response:
    """Response for an unknown address, or a method that it lacks."""
    assert isinstance(error, HTTPException)
    answer = Refused(error.status_code, "address", error.detail.lower()).answer()
    answer.headers.update(error.headers or {})
    return answer
