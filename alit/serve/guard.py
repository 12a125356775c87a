"""Guard of all requests: the hosts and origins that are allowed, and how much they may send."""

from __future__ import annotations

import asyncio
import ipaddress
from typing import Any
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse

#: Seconds in which an upload has to arrive.
PATIENCE = 60.0
#: Headers of every response: images stay in no cache, and no other site may show them.
HEADERS = {
    "Cache-Control": "no-store",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


class Refused(Exception):
    """Exception: a request is refused.

    Args:
        status: HTTP status code.
        field: the parameter or header that is wrong.
        reason: what was expected, and what came.
    """

    def __init__(self, status: int, field: str, reason: str) -> None:
        super().__init__(f"{field}: {reason}")
        self.status, self.field = status, field

    def answer(self) -> JSONResponse:
        return JSONResponse({"field": self.field, "error": str(self)}, self.status)


class Guard:
    """ASGI middleware that refuses foreign hosts and origins, and adds headers to every response.

    A page of another site can make a browser send requests here. Under a name of its own that leads to this machine
    (DNS rebinding) it could also read the answers; then ``Host`` has that name. Numeric addresses cannot be rebound.

    Args:
        names: those that ``Host`` may have, beside numeric addresses and localhost.
        policy: the Content-Security-Policy of every response.
    """

    def __init__(self, app: Any, names: tuple[str, ...], policy: str) -> None:
        self.app, self.names = app, {"localhost", *(name.lower() for name in names)}
        self.headers = HEADERS | {"Content-Security-Policy": policy}

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return

        async def send_with_headers(message: Any) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(self.headers)
            await send(message)

        try:
            self._check(Headers(scope=scope))
            await self.app(scope, receive, send_with_headers)
        except Refused as refused:
            await refused.answer()(scope, receive, send_with_headers)
        except asyncio.CancelledError:  # the server ends, and waits no longer
            await Refused(503, "server", "it ends").answer()(scope, receive, send_with_headers)

    def _check(self, headers: Headers) -> None:
        host, origin = headers.get("host", ""), headers.get("origin")
        if not self._is_ours(host):
            expected = "expected localhost, an address in numbers, or the name given with --host"
            raise Refused(403, "Host", f"{expected}, got {host[:100]!r}")
        if origin is not None and origin.partition("://")[2] != host:
            raise Refused(403, "Origin", f"expected the page of {host}, got {origin[:100]!r}")

    def _is_ours(self, host: str) -> bool:
        try:
            name = urlsplit(f"//{host}").hostname or ""
        except ValueError:
            return False
        return name in self.names or _is_address(name)


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


async def body(request: Request, field: str, most: int) -> bytes:
    """Body of a request, at most ``most`` bytes; reading stops beyond that.

    Raises:
        Refused: more bytes, none, or not all of them in time.
    """
    try:
        data = await asyncio.wait_for(_body(request, field, most), PATIENCE)
    except asyncio.TimeoutError as error:
        raise Refused(408, field, f"expected all of it in {PATIENCE:.0f} seconds") from error
    except ClientDisconnect as error:
        raise Refused(400, field, "the connection ended before all of it was there") from error
    if not data:
        raise Refused(400, field, "expected the bytes of a file, got none")
    return data


async def _body(request: Request, field: str, most: int) -> bytes:
    too_large = Refused(413, field, f"too large: expected at most {most} bytes")
    if int(request.headers.get("content-length", 0)) > most:
        raise too_large
    data = bytearray()
    async for part in request.stream():
        data += part
        if len(data) > most:
            raise too_large
    return bytes(data)
