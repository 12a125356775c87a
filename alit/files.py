"""Files that are written whole or not at all."""

from __future__ import annotations

import errno
import importlib
import os
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

fcntl: Any = importlib.import_module("fcntl") if os.name == "posix" else None


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary file beside ``path`` that takes its place when the block ends well, and vanishes when it does not.

    A link stays one: what it points to is replaced.

    Raises:
        OSError: as :func:`check_replaceable`, or what could not be written, by its name.
    """
    check_replaceable(path)
    path = Path(os.path.realpath(path))
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
    os.close(descriptor)
    temporary = Path(name)
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        mask = os.umask(0)
        os.umask(mask)
        temporary.chmod(0o666 & ~mask)
        temporary.replace(path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if (
            isinstance(error, OSError)
            and error.errno is not None
            and error.filename in (None, name)
        ):
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise


_held: set[Path] = set()


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Within the context no other one of this machine enters it for the same folder (other processes: not on Windows).

    Where the file system has no locks there is a warning instead.

    Raises:
        BlockingIOError: another one is there.
    """
    folder = folder.resolve()
    if folder in _held:
        raise BlockingIOError(f"{folder}: held by this process")
    with (folder / ".lock").open("w") as file:
        try:
            if fcntl is not None:
                # Of this process alone: those that fork from it do not hold it.
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                raise BlockingIOError(f"{folder}: held by another process") from error
            warnings.warn(f"{folder}: cannot be locked ({error})", stacklevel=3)
        _held.add(folder)
        try:
            yield
        finally:
            _held.remove(folder)


def check_replaceable(path: Path) -> None:
    """Raise ``OSError`` where no file can be put: something that is no file is there, or there is no such folder."""
    if path.exists() and not path.is_file():
        raise OSError(f"{path}: expected a file or nothing there, found {_kind(path)}")
    if not Path(os.path.realpath(path)).parent.is_dir():
        raise FileNotFoundError(f"{path.parent}: no such folder")


def _kind(path: Path) -> str:
    return "a folder" if path.is_dir() else "something that is no file"
