"""Zip files that ``torch.save`` writes, read without trust in them.

No code is ever executed: what a file names is checked against an allow-list of tensors, plain containers and
``argparse.Namespace``, before torch's restricted unpickler reads it. No size that a file states is believed: entries
lie in it uncompressed, each once, tensors within their entries.
"""

from __future__ import annotations

import argparse
import pickletools
import struct
import zipfile
from pathlib import Path
from typing import Any, BinaryIO

import torch

from .atomic_files import reading
from .checks import CheckpointError, printable, some

#: Most instructions of a pickle, bytes of a zip file's directory, values of a tuple: several times those of any
#: published checkpoint. They bound what reading takes beside the tensors.
MAX_INSTRUCTIONS = 2**19
MAX_DIRECTORY = 2**23
MAX_TUPLE = 1000
_MARK = object()
KINDS = ("Float", "Double", "Half", "BFloat16", "Long", "Int", "Short", "Char", "Byte", "Bool")
ALLOWED = {
    *("argparse Namespace", "collections OrderedDict", "__builtin__ set", "builtins set"),
    *("torch._utils _rebuild_tensor_v2", "torch._utils _rebuild_parameter", "torch Size"),
    *("torch device", "torch.storage UntypedStorage", *(f"torch {kind}Storage" for kind in KINDS)),
    *(f"torch {name}" for name, value in vars(torch).items() if isinstance(value, torch.dtype)),
}


def load(path: str | Path) -> Any:
    """Content of a file; tensors stay in it, mapped to memory. Beside them reading takes less than 100 MB.

    Raises:
        CheckpointError: no such file, a damaged one, or one that holds anything but tensors, plain containers and
            ``argparse.Namespace``, which is named.
        OSError: no file, or one that cannot be read.
    """
    with reading(path) as file:
        try:
            _check_archive(file)
            with torch.serialization.safe_globals([argparse.Namespace]):
                # Mapped, so that a storage is a part of the file, whatever size the pickle states.
                return torch.load(str(path), map_location="cpu", weights_only=True, mmap=True)
        except CheckpointError as error:
            raise CheckpointError(f"{path}: {error}") from error
        except Exception as error:  # Damaged instructions make the unpickler raise anything.
            raise CheckpointError(
                f"{path}: not a torch checkpoint, truncated or damaged ({_reason(error)})"
            ) from error


def _reason(error: Exception) -> str:
    """Type and message of an error in one line, without torch's advice on how to load the file all the same."""
    said = str(error).strip().rpartition("WeightsUnpickler error: ")[2].splitlines()
    return f"{type(error).__name__}: {said[0][:200]}" if said else type(error).__name__


def _check_archive(file: BinaryIO) -> None:
    """Check that nothing in a zip file takes more memory than the file has bytes, or names what is not allowed.

    Raises:
        CheckpointError: something does, or the file is damaged; whatever ``zipfile`` raises.
    """
    if (begin := file.read(4)) != b"PK\x03\x04":
        raise CheckpointError(
            f"expected a zip file, as torch.save writes since torch 1.6, got one that begins with {begin!r}"
        )
    size = file.seek(0, 2)
    if (directory := _directory_size(file)) > min(MAX_DIRECTORY, size):
        raise CheckpointError(
            f"expected a directory of at most {MAX_DIRECTORY} bytes, got {directory}"
        )
    with zipfile.ZipFile(file) as archive:
        entries = archive.infolist()
        for entry in entries:
            if entry.compress_type != zipfile.ZIP_STORED or entry.file_size != entry.compress_size:
                raise CheckpointError(f"{printable(entry.filename)}: expected it uncompressed")
        if (stated := sum(entry.file_size for entry in entries)) > size:
            raise CheckpointError(f"expected entries of at most {size} bytes in all, got {stated}")
        if len({entry.filename.lower() for entry in entries}) < len(entries):
            raise CheckpointError("expected each entry once")
        pickles = [x for x in entries if x.filename.lower().endswith("/data.pkl")]
        if len(pickles) != 1:
            raise CheckpointError(f"expected one data.pkl, got {len(pickles)}")
        if (damaged := archive.testzip()) is not None:
            raise CheckpointError(f"damaged: the checksum of {printable(damaged)} does not match")
        _check_pickle(archive.read(pickles[0]))


def _directory_size(file: BinaryIO) -> int:
    """Bytes of the directory of a zip file, from its last record; its layout is that of PKWARE's APPNOTE 4.3."""
    file.seek(-42, 2)
    locator, _, place, _ = struct.unpack("<4sLQL", file.read(20))
    signature, *_, size, _, comment = struct.unpack("<4s4H2LH", file.read(22))
    if signature != b"PK\x05\x06" or comment:
        raise CheckpointError("truncated, or something lies behind its end")
    if locator == b"PK\x06\x07":
        file.seek(place)
        size = struct.unpack("<4sQ2H2L4Q", file.read(56))[8]
    return size


def _check_pickle(pickled: bytes) -> None:
    """Check that a pickle names nothing but what is allowed, and that its tuples, written out, stay small.

    Tuples may hold one another many times over, and take forever to hash as keys; so the unpickler's stack is simulated
    here, with the size of each value (1 for all but tuples) in its place.
    """
    named: set[str] = set()
    stack: list[Any] = []
    memo: dict[Any, int] = {}
    for count, (step, argument, _) in enumerate(pickletools.genops(pickled)):
        if count > MAX_INSTRUCTIONS:
            raise CheckpointError(f"expected at most {MAX_INSTRUCTIONS} instructions in data.pkl")
        if step.name == "PROTO" and argument != 2:
            raise CheckpointError(f"expected pickle protocol 2, torch.save's own, got {argument}")
        if step.name in ("GLOBAL", "INST"):
            named.add(str(argument))
        taken = []
        for kind in reversed(step.stack_before):
            if kind is pickletools.stackslice:
                while (size := stack.pop()) is not _MARK:
                    taken.append(size)
            elif kind is not pickletools.markobject:
                taken.append(stack.pop())
        size = (
            1 + sum(taken) if "TUPLE" in step.name else memo[argument] if "GET" in step.name else 1
        )
        if size > MAX_TUPLE:
            raise CheckpointError(f"expected tuples of at most {MAX_TUPLE} values in data.pkl")
        stack += [_MARK if kind is pickletools.markobject else size for kind in step.stack_after]
        if "PUT" in step.name:
            memo[argument] = stack[-1]
    if refused := sorted(named - ALLOWED):
        raise CheckpointError(
            f"refused: it holds {some(x.replace(' ', '.') for x in refused)}; allowed are tensors, plain containers "
            "and argparse.Namespace alone"
        )
