"""Files that come with the package, by name."""

from __future__ import annotations

from pathlib import Path

from .checks import nearest


def find(given: str | Path, folder: Path, suffix: str, what: str) -> Path:
    """Path of a file, given as a path, or as a name: a file's path in ``folder`` without ``suffix``.

    Raises:
        FileNotFoundError: neither; the message lists the names and suggests the nearest.
    """
    path, name = Path(given), str(given)
    if path.is_file():
        return path
    files = sorted(folder.rglob(f"*{suffix}"))
    names = [file.relative_to(folder).as_posix().removesuffix(suffix) for file in files]
    if name in names:
        return folder / f"{name}{suffix}"
    if path.exists():
        return path  # no file; reading it raises an error that says so
    raise FileNotFoundError(
        f"{given}: no such file, nor the name of {what} ({', '.join(names)}){nearest(name, names)}"
    )
