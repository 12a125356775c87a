"""``alit serve``."""

from __future__ import annotations

import ipaddress
import socket
from contextlib import suppress
from typing import Annotated

import typer

from ..console import console, printable
from . import options

#: Connections at a time, and seconds that requests have when Ctrl-C ends the server.
CONNECTIONS, LAST_SECONDS = 64, 1


def serve(
    model: options.Model = "nano",
    host: Annotated[
        str,
        typer.Option(
            help="Address to listen at. The default is for this machine alone; 0.0.0.0 lets all of the network in."
        ),
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port; 0: any free one.", min=0, max=65535)] = 8000,
    max_megabytes: Annotated[int, typer.Option(help="Refuse larger uploads.", min=1)] = 32,
    max_megapixels: Annotated[
        int, typer.Option(help="Refuse larger images; reading takes 5 MB a megapixel.", min=1)
    ] = 50,
    keep: Annotated[
        int, typer.Option(help="Number of images kept in memory, the latest.", min=1)
    ] = 16,
    device: options.Device = "auto",
) -> None:
    """Play with an image in a browser: a slider over its tokens, what they keep, and where they look.

    Drop an image on the page. It shows the reconstruction from any number of tokens, the error against their number
    beside that of a thumbnail of as many bits, where each token looks, and gives the tokens as an .alit file.

        alit serve --port 9000

    Nothing leaves this machine, and no image is kept on the disk. Ctrl-C ends it.
    """
    import uvicorn

    from ..serve.app import Limits, Playground

    loaded = options.load(model, device)
    options.check_writes_files(loaded)
    limits = Limits(max_megabytes * 1_000_000, max_megapixels, keep)
    app = Playground(loaded, printable(model), limits).application(host)
    config = uvicorn.Config(
        app,
        log_level="warning",
        server_header=False,
        limit_concurrency=CONNECTIONS,
        timeout_graceful_shutdown=LAST_SECONDS,
    )
    with _listening(host, port) as listener:
        address, taken = listener.getsockname()[:2]
        if not ipaddress.ip_address(address).is_loopback:
            console.out("note: whoever reaches this address may use it; there is no password")
        shown = f"[{host}]" if ":" in host else host
        console.out(f"http://{shown}:{taken}: open it in a browser; Ctrl-C ends it")
        with suppress(KeyboardInterrupt):  # which uvicorn raises once it has ended
            uvicorn.Server(config).run(sockets=[listener])


def _listening(host: str, port: int) -> socket.socket:
    """Socket that listens at an address.

    Raises:
        ValueError: an address that is not this machine's, or a port that cannot be had.
    """
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family)
    except socket.gaierror as error:
        raise ValueError(
            f"--host: expected an address of this machine, got {host!r} ({error})"
        ) from error
    except OSError as error:
        raise ValueError(
            f"--host, --port: cannot listen at {host}, port {port} ({error}); --port 0 takes a free one"
        ) from error
