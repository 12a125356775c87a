"""Training data of generators: ``.alit`` files, and the classes of their images."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..alit_format import ModelIdentity, Reader
from ..atomic_files import reading
from ..console import printable
from ..generation import GeneratorConfig

#: Most bytes of a table of labels.
LARGEST_TABLE = 2**28
#: Value of ``labels`` by which the path of a token file gives the class.
PLACES = "files"


class TokenFiles:
    """Token sequences of ``.alit`` files, in memory: 4 bytes per token.

    Args:
        data: a file, or a folder; of that, all such files in it and in folders within, by name.
        labels: None: no classes. "files": the class of an image is the first part of its file's path within ``data``,
            without ``.alit``: "rose" for ``rose.alit`` and for ``rose/2.alit``. Else a CSV file with a name of an
            image, as the token files have it, and its class in each row.
        identity: of the tokenizer that must have written them.
        longest: tokens that an image may have.

    Attributes:
        lengths: (N,) int64.
        classes: of each image; empty without ``labels``.

    Raises:
        OSError: no file, or one that cannot be read.
        ValueError: no ``.alit`` file, a damaged one, or one of another tokenizer; no image; images of another size than
            the tokenizer's own, without tokens or with too many; an image without a class.
    """

    def __init__(
        self, data: str | None, labels: str | None, identity: ModelIdentity, longest: int
    ) -> None:
        if data is None:
            raise ValueError(
                "data: expected a file of tokens (.alit) or a folder of them, got none"
            )
        self.classes: list[str] = []
        lengths: list[np.ndarray] = []
        indices: list[np.ndarray] = []
        place, files = Path(data), _files(Path(data))
        table = None if labels in (None, PLACES) else _table(Path(str(labels)))
        for path in files:
            with reading(path) as file:
                try:
                    reader = Reader(file)
                    reader.expect(identity)
                    lengths.append(_lengths(reader, longest))
                    indices.append(reader.indices(0, reader.token_count).astype(np.int32))
                    names = reader.images(0, reader.image_count).names
                except ValueError as error:
                    raise ValueError(f"data: {printable(path)}: {error}") from error
            if labels == PLACES:
                within = path.relative_to(place) if path != place else Path(path.name)
                self.classes += [within.parts[0].removesuffix(".alit")] * len(names)
            elif table is not None:
                self.classes += [
                    _label(table, name, number, path) for number, name in enumerate(names)
                ]
        self.lengths = np.concatenate(lengths)
        if not len(self.lengths):
            raise ValueError(f"data: expected images, got none in {printable(data)}")
        self.indices = torch.from_numpy(np.concatenate(indices))
        self.starts = np.concatenate([[0], self.lengths.cumsum()])


class TokenRows:
    """Images of token files as rows for training, (1 + ``longest``,) each: the class, the tokens, then -1.

    Attributes:
        labels: of each image, an index into ``classes``; 0 where there are none.

    Raises:
        ValueError: a class that is not among ``classes``, or no classes where there are some.
    """

    left_out: Sequence[str] = ()

    def __init__(self, files: TokenFiles, classes: Sequence[str], longest: int) -> None:
        known = {name: label for label, name in enumerate(classes)}
        self.files, self.longest = files, longest
        if missing := sorted({x for x in files.classes if x not in known}):
            raise ValueError(
                f"labels: expected classes of the generator, got {printable(missing[0])!r}"
            )
        if classes and not files.classes:
            raise ValueError("labels: expected them, since the generator has classes; got none")
        self.labels = [known[x] for x in files.classes] or [0] * len(files.lengths)

    @classmethod
    def read(cls, data: str | None, labels: str | None, config: GeneratorConfig) -> TokenRows:
        """Read the rows for a generator; arguments and exceptions as for :class:`TokenFiles`."""
        files = TokenFiles(data, labels, config.identity, config.max_tokens)
        return cls(files, config.classes, config.max_tokens)

    def __len__(self) -> int:
        return len(self.labels)

    def name(self, index: int) -> str:
        return f"image {index}"

    def load(self, index: int, random: np.random.Generator) -> Tensor:
        """Row of an image, (1 + longest,) int64; ``random`` is not used."""
        row = torch.full((1 + self.longest,), -1, dtype=torch.int64)
        start, length = int(self.files.starts[index]), int(self.files.lengths[index])
        row[0] = self.labels[index]
        row[1 : 1 + length] = self.files.indices[start : start + length]
        return row


def _files(place: Path) -> list[Path]:
    if not place.is_dir():
        return [place]
    files = sorted(x for x in place.rglob("*.alit") if not x.name.startswith("."))
    if not files:
        raise ValueError(f"data: expected .alit files, got none in {printable(place)}")
    return files


def _lengths(reader: Reader, longest: int) -> np.ndarray:
    """Lengths of all images; raises ``ValueError`` unless they have tokens, not too many, and the tokenizer's size."""
    count, own = reader.image_count, reader.identity.image_size
    others = (reader.sizes(0, count) != own).any(1)
    if others.any():
        number = int(others.argmax())
        height, width = reader.sizes(number, 1)[0]
        raise ValueError(
            f"expected images of {own[0]}x{own[1]}, got {height}x{width} in image {number}; alit encode --fit crop"
            " makes them so"
        )
    lengths = reader.lengths(0, count)
    if count and not 1 <= lengths.min() <= lengths.max() <= longest:
        raise ValueError(
            f"expected 1 to {longest} tokens an image, got {lengths.min()} to {lengths.max()}"
        )
    return lengths


def _table(path: Path) -> dict[str, str]:
    """Classes by the names of images, from a CSV file."""
    with reading(path) as file:
        content = file.read(LARGEST_TABLE + 1)
    try:
        if len(content) > LARGEST_TABLE:
            raise ValueError(f"expected at most {LARGEST_TABLE} bytes")
        rows = list(csv.reader(io.StringIO(content.decode(), newline="")))
    except (UnicodeDecodeError, csv.Error, ValueError) as error:
        raise ValueError(f"labels: {printable(path)}: not a CSV file ({error})") from error
    table: dict[str, str] = {}
    for number, row in enumerate(rows, 1):
        where = f"labels: {printable(path)}, row {number}"
        if len(row) != 2 or not all(row):
            raise ValueError(f"{where}: expected a name and a class, got {len(row)} values")
        if table.setdefault(row[0], row[1]) != row[1]:
            raise ValueError(f"{where}: {printable(row[0])} has two classes")
    return table


def _label(table: dict[str, str], name: str, number: int, path: Path) -> str:
    if name not in table:
        named = repr(printable(name)) if name else "without a name"
        raise ValueError(
            f"labels: expected a class for every image, got none for image {number} of {printable(path)} ({named})"
        )
    return table[name]
