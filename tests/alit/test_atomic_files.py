"""Files are replaced whole, keep their mode, and may have any number of writers; non-files are left alone."""

from __future__ import annotations

import errno
import os
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from alit import atomic_files
from alit.atomic_files import alone, check_replaceable, reading, replacing


def write(path: Path, text: str = "new") -> None:
    with replacing(path) as file:
        file.write_text(text)


def interrupted(path: Path) -> None:
    path.write_text("half")
    raise KeyboardInterrupt


def link(path: Path) -> None:
    target = path.parent.parent / "precious"
    target.write_text("kept")
    path.symlink_to(target)


NO_FILES: dict[str, Callable[[Path], None]] = {
    "a link": link,
    "a dangling link": lambda path: path.symlink_to("nowhere"),
    "a pipe": os.mkfifo,
    "a folder": os.mkdir,
    "a device": lambda path: path.symlink_to("/dev/zero"),
}


@pytest.mark.parametrize("kind", NO_FILES)
def test_what_is_no_file_stays(kind: str, tmp_path: Path) -> None:
    """Neither a new file nor a lock replaces a non-file, and no call blocks on a pipe."""
    uses = {
        "x": lambda folder: write(folder / "x"),
        ".lock": lambda folder: alone(folder).__enter__(),
    }
    for name, use in uses.items():
        folder = tmp_path / f"folder{name}"
        folder.mkdir()
        NO_FILES[kind](folder / name)
        before = (folder / name).lstat()
        with pytest.raises(
            OSError, match=rf"{name}: expected a file or nothing there, found a \w+"
        ):
            use(folder)
        after = (folder / name).lstat()
        assert (after.st_ino, after.st_mode) == (before.st_ino, before.st_mode)
        assert os.listdir(folder) == [name]
    if kind == "a link":
        assert (tmp_path / "precious").read_text() == "kept"


@pytest.mark.parametrize("path", ["/dev/zero", "/dev/null", "pipe", ".", "link"])
def test_only_files_are_read(path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    os.mkfifo("pipe")
    Path("link").symlink_to("pipe")
    with pytest.raises(OSError, match=rf"{path}: expected a file, found a"), reading(path):
        pass
    with pytest.raises(FileNotFoundError, match="missing"), reading("missing"):
        pass


def test_a_lock_keeps_what_is_in_its_file(tmp_path: Path) -> None:
    (tmp_path / ".lock").write_text("kept")
    with alone(tmp_path), pytest.raises(BlockingIOError), alone(tmp_path):
        pass
    assert (tmp_path / ".lock").read_text() == "kept"


@pytest.mark.parametrize("mode", [0o600, 0o640, 0o644, 0o664, 0o755, 0o444])
def test_mode_and_owner_stay(mode: int, tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_text("old")
    path.chmod(mode)
    if os.geteuid() == 0:
        os.chown(path, 1234, 2345)
    before = path.stat()
    with replacing(path) as file:
        assert not file.stat().st_mode & ~(before.st_mode | 0o600), "readable to more meanwhile"
        file.write_text("new")
    after = path.stat()
    assert path.read_text() == "new" and after.st_ino != before.st_ino
    assert (after.st_mode, after.st_uid, after.st_gid) == (
        before.st_mode,
        before.st_uid,
        before.st_gid,
    )


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_a_new_file_has_the_mode_of_the_umask(
    umask: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A new file has the umask's mode; the umask is not set, since it belongs to all threads of the process."""
    old = os.umask(umask)
    try:
        with monkeypatch.context() as patch:
            patch.setattr(os, "umask", lambda _: pytest.fail("the umask was set"))
            write(tmp_path / "x")
        (tmp_path / "plain").touch()
    finally:
        os.umask(old)
    modes = {stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("x", "plain")}
    assert modes == {0o666 & ~umask}


def test_what_fails_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "there"
    path.write_text("old")
    with (
        pytest.raises(OSError, match=r"No space left on device: '.*there'") as raised,
        replacing(path),
    ):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert raised.value.errno == errno.ENOSPC
    with pytest.raises(KeyboardInterrupt), replacing(path) as file:
        interrupted(file)
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["there"]


@pytest.mark.parametrize(
    "name", ["x", ".hidden", "n" * 255, "ü" * 120, "[a-z]*?.png", "with space\n", "x.part"]
)
def test_any_name(name: str, tmp_path: Path) -> None:
    write(tmp_path / name)
    assert os.listdir(tmp_path) == [name]


@pytest.mark.parametrize("path", ["missing/x", "file/x"])
def test_no_such_folder(path: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(FileNotFoundError, match="no such folder"):
        check_replaceable(tmp_path / path)


WRITER = """
import sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[3])  # without torch, which takes seconds
from atomic_files import replacing
with replacing(Path(sys.argv[1])) as file:
    file.write_text("half")
    print(file.name, flush=True)
    time.sleep(float(sys.argv[2]))
"""


def start(path: Path, seconds: float) -> tuple[subprocess.Popen[str], str]:
    process = subprocess.Popen(
        [
            sys.executable,
            "-c",
            WRITER,
            str(path),
            str(seconds),
            str(Path(atomic_files.__file__).parent),
        ],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    return process, process.stdout.readline().strip()


def test_what_killed_writers_left_goes_and_what_others_write_stays(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    (tmp_path / ".model.safetensors.mine.part").write_text("of a user")
    writers = [start(path, 600) for _ in range(3)]
    try:
        (killed, first), (_, alive), (killed_too, third) = writers
        for process in (killed, killed_too):
            process.send_signal(signal.SIGKILL)
            process.wait()
        assert {first, alive, third} < set(os.listdir(tmp_path))
        write(path)
        assert path.read_text() == "new"
        assert set(os.listdir(tmp_path)) == {path.name, alive, ".model.safetensors.mine.part"}
    finally:
        for process, _ in writers:
            process.kill()
            process.communicate()
    write(path)
    assert set(os.listdir(tmp_path)) == {path.name, ".model.safetensors.mine.part"}


def test_several_writers_at_once(tmp_path: Path) -> None:
    """Readers always see the whole file of one writer; no temporary files are left."""
    path = tmp_path / "x"

    def work(character: str) -> None:
        for _ in range(25):
            write(path, character * 1000)

    with ThreadPoolExecutor(8) as pool:
        writers = [pool.submit(work, character) for character in "abcdefgh"]
        while not all(writer.done() for writer in writers):
            if path.exists():
                text = path.read_text()
                assert len(text) == 1000 and len(set(text)) == 1
            time.sleep(0.001)
    assert [writer.result() for writer in writers] == [None] * 8 and os.listdir(tmp_path) == ["x"]
    with replacing(path) as outer, replacing(path) as inner:
        inner.write_text("inner")
        outer.write_text("outer")
    assert path.read_text() == "outer" and os.listdir(tmp_path) == ["x"]


def test_without_locks_files_are_written_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_locks(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(atomic_files.fcntl, "flock", no_locks)
    write(tmp_path / "x")
    assert os.listdir(tmp_path) == ["x"]


def test_the_folder_is_on_the_disk_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[bool] = []
    real = os.fsync

    def fsync(file: object) -> None:
        number = file if isinstance(file, int) else file.fileno()  # type: ignore[attr-defined]
        synced.append(stat.S_ISDIR(os.fstat(number).st_mode))
        real(number)

    monkeypatch.setattr(os, "fsync", fsync)
    write(tmp_path / "x")
    assert synced == [False, True]
