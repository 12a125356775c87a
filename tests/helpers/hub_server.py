"""Local substitute for the Hugging Face Hub: repositories in memory, and a record of the requests it received."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any, NamedTuple
from urllib.parse import unquote

from alit import AdaptiveTokenizer


class Refusal(NamedTuple):
    """Error answer: its status, and the Hub's code and message in headers."""

    status: int
    code: str = ""
    message: str = ""


NO_REPOSITORY = Refusal(404, "RepoNotFound", "Repository not found")
NO_REVISION = Refusal(404, "RevisionNotFound", "Invalid rev id")
NO_FILE = Refusal(404, "EntryNotFound", "Entry not found")


@dataclass
class Hub:
    """Repositories in memory and the requests made so far.

    Attributes:
        files: (repository, revision) -> path -> content.
        refusals: repository, or path of the server -> its answer to every request.
        half: send only half of each file, then end the connection.
        asked: methods and paths of requests; tokens: their ``Authorization`` headers.
        made, commits: bodies of the requests that created repositories and commits.
    """

    address: str = ""
    files: dict[tuple[str, str], dict[str, bytes]] = field(default_factory=dict)
    refusals: dict[str, Refusal] = field(default_factory=dict)
    half: bool = False
    asked: list[str] = field(default_factory=list)
    tokens: set[str | None] = field(default_factory=set)
    made: list[dict[str, Any]] = field(default_factory=list)
    commits: list[dict[str, Any]] = field(default_factory=list)
    uploads: dict[str, bytes] = field(default_factory=dict)

    def add(self, name: str, content: bytes, revision: str = "main") -> None:
        self.files[name, revision] = {"model.safetensors": content}

    def find(self, name: str, revision: str, path: str) -> bytes | Refusal:
        if name in self.refusals:
            return self.refusals[name]
        if name not in {known for known, _ in self.files}:
            return NO_REPOSITORY
        if (name, revision) not in self.files:
            return NO_REVISION
        return self.files[name, revision].get(path, NO_FILE)

    def answer(self, path: str, body: bytes) -> Any:
        """Answer to a POST request: a JSON value, or a :class:`Refusal`."""
        if path in self.refusals:
            return self.refusals[path]
        if path == "/api/repos/create":
            self.made.append(json.loads(body))
            name = f"{self.made[-1]['organization']}/{self.made[-1]['name']}"
            self.files.setdefault((name, "main"), {})
            return {"url": f"{self.address}/{name}"}
        if path == "/api/validate-yaml":
            return {"errors": [], "warnings": []}
        if found := re.fullmatch(r"/api/models/(.+?)/branch/(.+)", path):
            self.files.setdefault((found[1], unquote(found[2])), {})
            return {}
        if re.fullmatch(r"/api/models/.+/preupload/.+", path):
            modes = {True: "lfs", False: "regular"}
            return {
                "files": [
                    {
                        "path": file["path"],
                        "uploadMode": modes[file["path"].endswith(".safetensors")],
                        "shouldIgnore": False,
                    }
                    for file in json.loads(body)["files"]
                ]
            }
        if path.endswith(".git/info/lfs/objects/batch"):
            href = f"{self.address}/upload/"
            return {
                "transfer": "basic",
                "objects": [
                    {**wanted, "actions": {"upload": {"href": href + wanted["oid"]}}}
                    for wanted in json.loads(body)["objects"]
                ],
            }
        if found := re.fullmatch(r"/api/models/(.+?)/commit/(.+)", path):
            return self.commit(found[1], unquote(found[2]), [*map(json.loads, body.splitlines())])
        return Refusal(404)

    def commit(self, name: str, revision: str, lines: list[dict[str, Any]]) -> dict[str, str]:
        files = self.files[name, revision]
        for line in lines:
            value = line["value"]
            if line["key"] == "header":
                self.commits.append({"name": name, "revision": revision, **value})
            elif line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.uploads[value["oid"]]
        return {"commitUrl": f"{self.address}/{name}/commit/{'0' * 40}", "commitOid": "0" * 40}


class Handler(BaseHTTPRequestHandler):
    hub: Hub

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        self.note()
        found = re.fullmatch(r"/(.+?)/resolve/(.+?)/(.+)", self.path)
        if found is None:
            return self.refuse(Refusal(404))
        content = self.hub.find(found[1], unquote(found[2]), found[3])
        if isinstance(content, Refusal):
            return self.refuse(content)
        self.send_response(200)
        digest = hashlib.sha256(content).hexdigest()
        self.send_header("ETag", f'"{digest}"')
        self.send_header("X-Repo-Commit", digest[:40])
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content[: len(content) // 2] if self.hub.half else content)

    def do_POST(self) -> None:
        self.note()
        body = self.rfile.read(int(self.headers["Content-Length"]))
        answer = self.hub.answer(self.path, body)
        if isinstance(answer, Refusal):
            return self.refuse(answer)
        text = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def do_PUT(self) -> None:
        self.note()
        content = self.rfile.read(int(self.headers["Content-Length"]))
        if "/upload" in self.hub.refusals:
            return self.refuse(self.hub.refusals["/upload"])
        self.hub.uploads[self.path.rpartition("/")[2]] = content
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def note(self) -> None:
        self.hub.asked.append(f"{self.command} {self.path}")
        self.hub.tokens.add(self.headers["Authorization"])

    def refuse(self, refusal: Refusal) -> None:
        self.send_response(refusal.status)
        if refusal.code:
            self.send_header("X-Error-Code", refusal.code)
        if refusal.message:
            self.send_header("X-Error-Message", refusal.message)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *args: object) -> None:
        """Print nothing."""


@contextmanager
def serving() -> Iterator[Hub]:
    """Context manager: an empty hub that serves at its ``address``."""
    hub = Hub()
    with ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Handler,), {"hub": hub})) as server:
        hub.address = f"http://127.0.0.1:{server.server_port}"
        thread = Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield hub
        finally:
            server.shutdown()
            thread.join()


def forget() -> None:
    """Drop ``huggingface_hub`` from the imported modules: it reads the environment when imported."""
    for name in [x for x in sys.modules if x.partition(".")[0] == "huggingface_hub"]:
        del sys.modules[name]


def saved(own: AdaptiveTokenizer) -> bytes:
    """Content of the model's file."""
    with tempfile.TemporaryDirectory() as folder:
        own.save_pretrained(Path(folder, "model.safetensors"))
        return Path(folder, "model.safetensors").read_bytes()
