"""Atomic writing of files, reading of nothing but regular files, and locks on folders."""

from __future__ import annotations

import contextlib
import errno
import importlib
import os
import stat
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

fcntl: Any = importlib.import_module("fcntl") if os.name == "posix" else None

#: Most temporary files of one file, and so most writers of it at a time.
SLOTS = 64
#: Flags of every ``open``: do not wait for the other end of a pipe; no translation of line ends on Windows.
_AT_ONCE = getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
_NO_LINK = _AT_ONCE | getattr(os, "O_NOFOLLOW", 0)


@contextmanager
def reading(path: str | Path) -> Iterator[BinaryIO]:
    """Context manager: a file, open for reading; links are followed.

    Raises:
        OSError: no such file, or a folder, a pipe or a device: nothing is read from them, nor waited for.
    """
    descriptor = os.open(path, os.O_RDONLY | _AT_ONCE)
    mode = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(mode):
        os.close(descriptor)
        raise OSError(f"{path}: expected a file, found {_kind(mode)}")
    with os.fdopen(descriptor, "rb") as file:
        yield file


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Context manager: path of a temporary file that replaces ``path`` if the block succeeds, else is removed.

    The block writes into this file, and puts no other in its place. A file that was there before keeps its mode, and
    its owner where that is permitted; a new one has the mode that the umask leaves. At the end file and folder are
    synced to disk.

    Writers hold a lock on their temporary file. The file of a killed writer is not locked, and is removed when the same
    path is written again (where there are no locks, and on Windows, it stays). Several writers at once do not disturb
    each other: the last one's file remains.

    Raises:
        OSError: as :func:`check_replaceable`, or what could not be written, by its name.
    """
    check_replaceable(path)
    place = path.absolute()
    try:
        with _temporary(place) as (file, temporary):
            try:
                mode = _take_after(place, file)
                yield temporary
                os.fsync(file)
                if mode is not None:
                    os.fchmod(file.fileno(), mode)
                if fcntl is None:
                    file.close()  # Windows moves no open file
                temporary.replace(place)
            except BaseException:
                temporary.unlink(missing_ok=True)
                raise
        sync(place.parent)
    except OSError as error:
        named = error.filename is None or str(error.filename).endswith(".part")
        if error.errno is None or not named:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


@contextmanager
def _temporary(path: Path) -> Iterator[tuple[BinaryIO, Path]]:
    """Context manager: a new, locked file beside ``path``, and its path; files that no writer holds are removed."""
    # Names are cut to a length that file systems take; files whose names begin alike share temporary files.
    parts = [path.with_name(f".{path.name[:60]}.{slot}.part") for slot in range(SLOTS)]
    for part in parts:
        _remove_abandoned(part)
    for part in parts:
        try:
            descriptor = os.open(part, os.O_RDWR | os.O_CREAT | os.O_EXCL | _NO_LINK, 0o666)
        except FileExistsError:
            continue
        with os.fdopen(descriptor, "r+b") as file:
            if fcntl is not None:
                with contextlib.suppress(OSError):  # a file system without locks
                    fcntl.flock(file, fcntl.LOCK_EX)
            if fcntl is None or os.fstat(descriptor).st_nlink:
                yield file, part
                return
            # Another writer took the file for abandoned and removed it, just before it was locked.
    raise OSError(errno.EBUSY, f"{SLOTS} writers at once, or their temporary files", str(path))


def _remove_abandoned(part: Path) -> None:
    with contextlib.suppress(OSError):  # not there, still written, or not for us to remove
        if fcntl is None or not stat.S_ISREG(part.lstat().st_mode):
            return
        with os.fdopen(os.open(part, os.O_RDWR | _NO_LINK), "r+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # By now the name may be that of another writer's file.
            if os.path.samestat(os.fstat(file.fileno()), part.lstat()):
                part.unlink()


def _take_after(path: Path, file: BinaryIO) -> int | None:
    """Give an open file the owner and mode of ``path``, but writable; returns the mode, or None without such a file."""
    if fcntl is None or not path.exists():
        return None
    old, new = path.lstat(), os.fstat(file.fileno())
    if (old.st_uid, old.st_gid) != (new.st_uid, new.st_gid):
        with contextlib.suppress(PermissionError):
            os.fchown(file.fileno(), old.st_uid, old.st_gid)
    mode = stat.S_IMODE(old.st_mode) & 0o777
    os.fchmod(file.fileno(), mode | stat.S_IRUSR | stat.S_IWUSR)
    return mode


def sync(folder: Path) -> None:
    """Sync a folder's entries to disk; does nothing on Windows, or where the file system does not support it."""
    if fcntl is None:
        return
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EACCES):
            raise


_held: set[Path] = set()


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Context manager: exclusive per-machine lock on ``folder`` (on Windows within this process alone).

    The lock is on the file ``.lock`` in the folder, which is created if it is missing, and stays. A file system without
    locks gives a warning instead.

    Raises:
        BlockingIOError: the folder is locked already.
        OSError: no such folder; ``.lock`` is a link, or anything else that is no file.
    """
    folder = folder.resolve()
    if folder in _held:
        raise BlockingIOError(f"{folder}: held by this process")
    check_replaceable(folder / ".lock")
    descriptor = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT | _NO_LINK, 0o666)
    with os.fdopen(descriptor, "r+b") as file:
        try:
            if fcntl is not None:
                # A lock of this process alone: child processes that it forks do not inherit it.
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
    """Raise ``OSError`` if no file can be put at ``path``: no such folder, or something is there that is no file.

    A link counts as no file: neither the link nor what it points to is replaced.
    """
    try:
        mode = path.lstat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        if not path.parent.is_dir():
            raise FileNotFoundError(f"{path.parent}: no such folder") from None
        return
    if not stat.S_ISREG(mode):
        raise OSError(f"{path}: expected a file or nothing there, found {_kind(mode)}")


def _kind(mode: int) -> str:
    kinds = {
        "l": "a link",
        "d": "a folder",
        "p": "a pipe",
        "s": "a socket",
        **dict.fromkeys("bc", "a device"),
    }
    return kinds.get(stat.filemode(mode)[0], "something that is no file")
