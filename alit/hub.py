"""Models on the Hugging Face Hub: one file of a repository, which ``huggingface_hub`` fetches and uploads."""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

#: The file of a repository that is a model; no other is fetched.
FILE = "model.safetensors"
#: Names of owners and repositories on the Hub: no "--" or ".."; and no suffix of a file (.pt, but .5 is a version's).
_PART = r"\w(?:[\w.-]{0,94}\w)?"
_NAME = re.compile(rf"(?!.*(?:--|\.\.|\.[A-Za-z]\w*$)){_PART}/{_PART}", re.ASCII)
_LOGIN = "hf auth login, or HF_TOKEN"


def is_name(given: object) -> bool:
    """True if ``given`` may name a repository: a text ``owner/name`` that does not end like a file, and no ``Path``."""
    return isinstance(given, str) and _NAME.fullmatch(given) is not None


def fetch(name: str, revision: str | None = None) -> Path:
    """Path of a repository's model file in the cache of ``huggingface_hub``; fetched if it is not there yet.

    Args:
        revision: branch, tag or commit; None: ``main``.

    Raises:
        FileNotFoundError: no such repository, revision or file; or ``huggingface_hub`` is not installed.
        PermissionError: a repository that takes a token, or another token.
        ConnectionError: the Hub cannot be reached, and the file is not in the cache (the message names its folder
            there); or the connection broke off, and the partial file is not used.
        OSError: the Hub fails, or the file cannot be written.
    """
    try:
        library = _library()
    except ModuleNotFoundError as error:
        raise FileNotFoundError(f"{name}: no such file; {error}") from error
    with _explained(name, revision):
        return Path(library.hf_hub_download(name, FILE, revision=revision))


def discard(path: Path) -> None:
    """Remove what :func:`fetch` returned from the cache: a file, or links there and the file that they lead to."""
    from huggingface_hub import constants

    cache = Path(constants.HF_HUB_CACHE).resolve()
    step: Path | None = path
    while step is not None and step.parent.resolve().is_relative_to(cache):
        following = step.parent / step.readlink() if step.is_symlink() else None
        step.unlink(missing_ok=True)
        step = following


def push(
    name: str,
    files: Mapping[str, Path | bytes],
    *,
    private: bool | None,
    revision: str | None,
    message: str,
    token: str | None,
) -> str:
    """Upload files in one commit, creating repository and branch if they are missing; returns the commit's URL.

    Raises:
        ModuleNotFoundError: ``huggingface_hub`` is not installed.
        ValueError: no ``owner/name``; or the Hub does not take the card.
        OSError: as :func:`fetch`.
    """
    if not is_name(name):
        raise ValueError(f"name: expected owner/name, as the Hub has them, got {name!r}")
    library = _library()
    hub = library.HfApi(token=token)
    additions = [
        library.CommitOperationAdd(path_in_repo=path, path_or_fileobj=content)
        for path, content in files.items()
    ]
    with _explained(name, revision):
        hub.create_repo(name, private=private, exist_ok=True)
        if revision is not None:
            hub.create_branch(name, branch=revision, exist_ok=True)
        done = hub.create_commit(name, additions, commit_message=message, revision=revision)
    return str(done.commit_url)


def _library() -> Any:
    try:
        return importlib.import_module("huggingface_hub")
    except ModuleNotFoundError as error:
        if error.name != "huggingface_hub":
            raise
        needed = "models on the Hugging Face Hub need huggingface_hub: pip install 'alit[hub]'"
        raise ModuleNotFoundError(needed, name=error.name) from error


@contextmanager
def _explained(name: str, revision: str | None) -> Iterator[None]:
    """Context manager: errors of the Hub, and of the connection to it, become an ``OSError`` of one line."""
    from huggingface_hub import constants, errors, file_download

    beside = ""
    try:
        yield
    except (errors.HTTPError, OSError, RuntimeError) as error:
        reason: BaseException = error
        if isinstance(error, errors.LocalEntryNotFoundError | RuntimeError):
            reason = error.__cause__ or error  # of a cache without the file, or a failed upload
        if isinstance(error, errors.LocalEntryNotFoundError):
            folder = file_download.repo_folder_name(repo_id=name, repo_type="model")
            beside = f", and {FILE} is not in {Path(constants.HF_HUB_CACHE, folder)}"
        elif isinstance(reason, OSError) and reason.errno is not None:
            raise  # a full disk, a folder that cannot be written
        kind, said = _said(reason, revision)
        raise kind(f"{name}: {said}{beside}") from error


def _said(reason: BaseException, revision: str | None) -> tuple[type[OSError], str]:
    """Exception type and message to raise for an error of the Hub. Subclasses are tested before base classes."""
    from huggingface_hub import errors

    if isinstance(reason, errors.GatedRepoError):
        page = "on the page of the repository, to those who log in"
        return PermissionError, f"access is granted {page} ({_LOGIN})"
    if isinstance(reason, errors.RepositoryNotFoundError):
        private = f"or a private one, which takes a token ({_LOGIN})"
        return FileNotFoundError, f"neither a file nor a repository on the Hub, {private}"
    if isinstance(reason, errors.RevisionNotFoundError):
        return FileNotFoundError, f"the repository has no revision {revision!r}"
    if isinstance(reason, errors.RemoteEntryNotFoundError):
        return FileNotFoundError, f"no {FILE} in the repository at revision {revision or 'main'!r}"
    if isinstance(reason, errors.HfHubHTTPError):
        status, words = reason.response.status_code, (reason.server_message or "").split()
        answer = f"the Hub answered {' '.join([str(status), *words])}"
        if status in (401, 403):
            return PermissionError, f"{answer}; it takes a token with the right to it ({_LOGIN})"
        return OSError, answer
    if isinstance(reason, errors.OfflineModeIsEnabled):
        return ConnectionError, "HF_HUB_OFFLINE is set"
    words = str(reason).split() or [type(reason).__name__]
    return ConnectionError, f"the connection to the Hub failed ({' '.join(words)})"
