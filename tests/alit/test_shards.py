"""Shards: each image of an epoch once for any processes and workers; names; damaged and hostile tar files."""

from __future__ import annotations

import http.server
import itertools
import random
import tarfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from alit import CheckpointError
from alit.training import TrainingConfig, train
from alit.training.image_data import Batch, Preparation, Share
from alit.training.shards import ShardBatches, ShardStream
from alit.training.tars import MOST_SHARDS, Member, NoImages, expand, members
from tests.helpers.hostile import EXAMPLES, memory, mutated
from tests.helpers.image_files import saved, tar
from tests.helpers.models import model

pytestmark = pytest.mark.usefixtures("one_thread")


def png(level: int) -> bytes:
    return saved(Image.new("RGB", (20, 20), (level, level, level)), "PNG").getvalue()


#: Numbers of images in the shards below; the second image of one shard is damaged.
SIZES = (5, 3, 9, 1, 4, 12, 2)


@pytest.fixture
def shards(tmp_path: Path) -> str:
    """Pattern of seven shards of several sizes; each image has its own gray, and one is damaged."""
    level = itertools.count()
    for shard, size in enumerate(SIZES):
        members = {f"{shard}.{number}.png": png(next(level)) for number in range(size)}
        if shard == 2:
            members["2.1.png"] = b"broken"
        tar(tmp_path / f"x-{shard}.tar", members)
    return str(tmp_path / "x-{0..6}.tar")


GRAYS = sum(SIZES)
BROKEN = SIZES[0] + SIZES[1] + 1


class Marked(ShardStream):
    """Stream that gives epoch and gray level of each image instead of its pixels."""

    epoch = 0

    def _members(self, *args: Any) -> Iterator[Any]:
        for at, *rest in super()._members(*args):
            self.epoch = at.epoch
            yield at, *rest

    def _decoded(self, *args: Any) -> Tensor | None:
        image = super()._decoded(*args)
        return None if image is None else torch.tensor([self.epoch, int(image.flatten()[0])])


def stream(
    pattern: str,
    workers: int,
    state: Any = None,
    share: Share | None = None,
    kind: type[ShardStream] = ShardStream,
    **other: Any,
) -> ShardBatches:
    options: dict[str, Any] = {"seed": 0, "buffer": 4, "workers": workers, "state": state, **other}
    made = kind(pattern, share or Share(3), Preparation((16, 16), 0.8, True), **options)
    return ShardBatches(made, workers=workers, pin=False)


def levels(batches: list[Batch]) -> list[int]:
    return [int(x.flatten()[0]) for batch in batches for x in batch.images]


@pytest.mark.parametrize("workers", [0, 2])
def test_shards_go_on_where_they_stood(shards: str, workers: int) -> None:
    straight = list(itertools.islice(stream(shards, workers), 30))
    for stop in (1, 4, 11, 25):
        rest = list(
            itertools.islice(stream(shards, workers, [straight[stop - 1].state]), 30 - stop)
        )
        for a, b in zip(rest, straight[stop:], strict=True):
            assert torch.equal(a.images, b.images) and a.state == b.state


def test_every_epoch_has_all_images_in_an_order_of_its_own(shards: str) -> None:
    batches = list(itertools.islice(stream(shards, 0, share=Share(5)), 21))
    expected = [x for x in range(GRAYS) if x != BROKEN]
    seen = levels(batches)
    epochs = [seen[:35], seen[35:70], seen[70:]]
    assert all(sorted(epoch) == expected for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] and epochs[0] != expected
    assert {x.split(": ")[1] for batch in batches for x in batch.unreadable} == {"2.1.png"}


def run_for(
    pattern: str, processes: int, workers: int, state: Any, batches: int
) -> tuple[list[tuple[int, int]], list[Any]]:
    """(epoch, gray) of the images that ``processes`` processes deliver in ``batches`` batches each, and states."""
    seen, states = [], []
    for rank in range(processes):
        share = Share(2 * processes, 1, rank, processes)
        own = stream(pattern, workers, state, share, Marked)
        for _ in range(batches):
            seen += [(int(x[0]), int(x[1])) for x in next(own).images]
        states.append(own.state)
    return seen, states


@pytest.mark.parametrize(
    "plan",
    [
        [(1, 0, 5), (2, 0, 4), (1, 0, 0)],
        [(2, 0, 3), (1, 0, 4), (3, 0, 0)],
        [(2, 2, 3), (3, 1, 3), (1, 2, 0)],
        [(1, 2, 7), (1, 1, 2), (1, 0, 1), (2, 2, 1), (1, 0, 0)],
        [(3, 2, 9), (2, 0, 1), (3, 2, 2), (2, 1, 0)],
        [(1, 0, 17), (2, 0, 1), (1, 0, 0)],  # an epoch ends within the batches
        [(7, 0, 6), (1, 0, 1), (6, 0, 9), (1, 0, 0)],  # some readers are epochs behind the others
        [(2, 1, 0), (1, 0, 0)],  # nothing is read before the change
    ],
    ids=str,
)
def test_other_processes_and_workers_see_each_image_once(
    shards: str, plan: list[tuple[int, int, int]]
) -> None:
    """Each image of an epoch is seen once when the numbers of processes and workers change."""
    seen: Counter[tuple[int, int]] = Counter()
    state: Any = None
    for processes, workers, batches in plan:
        found, state = run_for(shards, processes, workers, state, batches or 70)
        seen.update(found)
    everything = {x for x in range(GRAYS) if x != BROKEN}
    last = min(position[0] for own in state for position in own["positions"])
    assert last >= 2
    for epoch in range(last):
        assert {x for e, x in seen if e == epoch} == everything
        assert {n for (e, _), n in seen.items() if e == epoch} == {1}
    assert all(count == 1 for count in seen.values())


def test_what_a_division_needs_is_kept_small(shards: str) -> None:
    """The state stays small over many changes of the number of processes."""
    state: Any = None
    for turn in range(12):
        _, state = run_for(shards, 1 + turn % 2, 0, state, 9)
    assert len(state[0]["before"]) <= 4


def test_states_that_do_not_fit(shards: str) -> None:
    good = stream(shards, 0).state
    for wrong, message in (
        ({"next": 0, "workers": [[0, 0]]}, "not understood"),
        (None, "not understood"),
        ([], "not understood"),
        ({**good, "positions": []}, "not understood"),
        ({**good, "positions": [[0, 0, 0, -1]]}, "not understood"),
        ({**good, "positions": [[0, 0, True, 1]]}, "not understood"),
        ({**good, "positions": [[0, 0, 0]]}, "not understood"),
        ({**good, "before": [[[0, 0, 0, "1"]]]}, "not understood"),
        ({**good, "before": [[]]}, "not understood"),
        ({**good, "before": 7}, "not understood"),
        ({**good, "next": float("inf")}, "not understood"),
        ({**good, "seed": 1}, "the run began with seed 1, got 0"),
        ({**good, "shards": 8}, "the run began with shards 8, got 7"),
        ({**good, "shuffle_buffer": 5}, "the run began with shuffle_buffer 5, got 4"),
    ):
        with pytest.raises(CheckpointError, match=message):
            stream(shards, 0, [wrong])
    with pytest.raises(ValueError, match="batch_size: expected a multiple of accumulate x proc"):
        Share(4, 1, 0, 3)


# Names.


def test_names_of_a_pattern(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for pattern, expected in (
        ("x.tar", "x.tar"),
        ("x-{0..3}.tar", "x-0.tar x-1.tar x-2.tar x-3.tar"),
        ("x-{098..101}.tar", "x-098.tar x-099.tar x-100.tar x-101.tar"),
        ("{3..1}", "3 2 1"),
        ("{-1..1}", "-1 0 1"),
        ("{a,b}{1..2}.tar", "a1.tar a2.tar b1.tar b2.tar"),
        ("{a,b{1..2}}.tar", "a.tar b1.tar b2.tar"),
        ("{x{1,2}y,}z", "x1yz x2yz z"),
        ("{x}", "{x}"),
        ("{x{1,2}}", "{x1} {x2}"),
        ("{", "{"),
        ("a}b{c", "a}b{c"),
        ("{}", "{}"),
    ):
        assert expand(pattern) == expected.split(), pattern
    monkeypatch.chdir(tmp_path)
    Path("x{0..3}.tar").touch()
    assert expand("x{0..3}.tar") == ["x{0..3}.tar"]


@pytest.mark.parametrize(
    "pattern",
    [
        "x-{0..99999999}.tar",
        "x-{0..999999999999999999}.tar",
        "{0..999}{0..999}{0..999}.tar",
        "{{0..99999},{0..99999}}.tar",
        "{a,{0..99999999}}",
        "{a,b}" * 16,
        "{a,b}" * 17,
        "{" * 5000,
        "{a,b}" * 1000,
        "x" * 20_000,
    ],
    ids=lambda pattern: pattern[:40],
)
def test_patterns_of_too_many_names(pattern: str) -> None:
    start = time.monotonic()
    with memory() as used:
        if pattern == "{a,b}" * 16:
            assert len(expand(pattern)) == 2**16
        else:
            with pytest.raises(ValueError, match="data: expected at most"):
                expand(pattern)
    assert used.taken < 50 << 20 and time.monotonic() - start < 5
    assert len(expand(f"{{1..{MOST_SHARDS}}}")) == MOST_SHARDS


NAMES = ("pipe:touch executed; cat x.tar", "file:x.tar", "-.tar", "gs:x.tar", "~.tar", "$HOME.tar")


@pytest.mark.parametrize("name", NAMES)
def test_a_name_is_a_file(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A name of a shard that looks like a command or address is a file's name, with addresses allowed too."""
    monkeypatch.chdir(tmp_path)
    for addresses in (False, True):
        with pytest.raises(FileNotFoundError, match="no such shard"):
            stream(name, 0, addresses=addresses)
    tar(Path("x.tar"), {"x.png": png(0)})
    tar(Path(name), {f"{n}.png": png(7) for n in range(3)})
    for addresses in (False, True):
        assert levels([next(stream(name, 0, addresses=addresses))]) == [7, 7, 7]
    assert not Path("executed").exists()


@pytest.mark.parametrize("scheme", ["http", "https", "ftp", "s3", "file", "pipe", "data"])
def test_addresses_are_for_those_who_ask(scheme: str) -> None:
    name = f"{scheme}://127.0.0.1:9/x.tar"
    with pytest.raises(ValueError, match="is an address; expected files, or --allow-addresses"):
        stream(name, 0)
    if not scheme.startswith("http"):
        with pytest.raises(ValueError, match="expected http:// or https://"):
            stream(name, 0, addresses=True)


def test_shards_at_an_address(shards: str, tmp_path: Path) -> None:
    quiet = partial(http.server.SimpleHTTPRequestHandler, directory=str(tmp_path))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), quiet) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        pattern = f"http://127.0.0.1:{server.server_port}/x-{{0..6}}.tar"
        near, far = stream(shards, 0), stream(pattern, 0, addresses=True)
        for a, b in itertools.islice(zip(near, far, strict=True), 15):
            assert torch.equal(a.images, b.images) and a.state == b.state
        server.shutdown()


def test_no_field_allows_addresses(tmp_path: Path) -> None:
    assert not [name for name in TrainingConfig().asdict() if "address" in name]
    config = TrainingConfig(
        data="http://127.0.0.1:9/x.tar", steps=1, batch_size=1, workers=0, device="cpu"
    )
    with pytest.raises(ValueError, match="is an address"):
        train(config, model=model())


# Content of shards.


def read_all(path: Path, start: int = 0) -> tuple[list[Member], list[str]]:
    skipped: list[str] = []
    return list(members(str(path), start, skipped, addresses=False)), skipped


def test_members(tmp_path: Path) -> None:
    members = {
        **{"IMG.2024.0.jpg": b"0", "IMG.2024.1.JPG": b"1", "IMG.2024.1.json": b"{}"},
        **{"a.b/c.WebP": b"2", "a.b/c.txt": b"t", "d.cls": b"7", "d.jpeg": b"3", "d.png": b"+"},
        **{"lonely.txt": b"t", "more/lonely.txt": b"t", "README": b"r", "./e.png": b"4"},
        **{"./f.txt": b"t", "./g.jpg": b"5", "./g.txt": b"t", "x/g.jpg": b"6", ".h": b"h"},
        **{"._e.png": b"Mac OS X", "x/._g.jpg": b"Mac OS X"},
    }
    found, skipped = read_all(tar(tmp_path / "x.tar", members))
    assert [x.content for x in found] == [b"%d" % number for number in range(7)]
    assert found[1].name == "IMG.2024.1.JPG"
    assert len(skipped) == 1 and "(3 .txt, 1 without a suffix)" in skipped[0]
    assert read_all(tmp_path / "x.tar", 3)[0] == found[3:]
    with tarfile.open(tmp_path / "y.tar", "w") as file:
        file.add(tmp_path / "x.tar", "x.png")
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE):
            info = tarfile.TarInfo(f"{kind!r}.png")
            info.type, info.linkname = kind, "/etc/passwd"
            file.addfile(info)
    found, skipped = read_all(tmp_path / "y.tar")
    assert [x.name for x in found] == ["x.png"] and "4 links or special files" in skipped[0]


def test_names_that_are_no_text(tmp_path: Path) -> None:
    path = tar(tmp_path / "x.tar", {"a\udcff\n\x1b[2J.png": b"0", "b.t\udcff\x1bxt": b""})
    found, skipped = read_all(path)
    assert all(x.isprintable() and x.isascii() for x in (found[0].name, skipped[0]))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_shard_without_images(workers: int, tmp_path: Path) -> None:
    path = tar(tmp_path / "x.tar", {"a.txt": b"", "b.txt": b"", "c.tif": b""})
    with pytest.raises(NoImages, match=r"x\.tar: no image .* in it, but 2 \.txt, 1 \.tif"):
        read_all(path)
    config = TrainingConfig(
        data=str(path), steps=1, batch_size=1, workers=workers, device="cpu", tensorboard=False
    )
    with pytest.raises(ValueError, match=r"^data: .*x\.tar: no image .*2 \.txt, 1 \.tif"):
        train(config, model=model())
    tar(path, {})
    with pytest.raises(ValueError, match=r"^data: .*x\.tar: no image .* but nothing"):
        train(config, model=model())


def test_a_run_says_what_it_skipped(shards: str, tmp_path: Path) -> None:
    tar(tmp_path / "x-0.tar", {"a.png": png(1), "b.txt": b""})
    (tmp_path / "x-1.tar").write_bytes((tmp_path / "x-5.tar").read_bytes()[:3000])
    (tmp_path / "x-3.tar").write_bytes(b"x" * 2000)
    fields = {"steps": 30, "batch_size": 4, "learning_rate": 1e-3, "workers": 2, "device": "cpu"}
    result = train(TrainingConfig(data=shards, **fields), model=model())
    assert len(result.unreadable) == len(set(result.unreadable)) == 4
    said = "\n".join(result.unreadable)
    assert "x-0.tar: members without an image (1 .txt)" in said
    assert "x-1.tar: damaged after 3 images (unexpected end of data)" in said
    assert "x-2.tar: 2.1.png: " in said and "x-3.tar: damaged after 0 images" in said


def test_shards_that_do_not_fit(shards: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="expected a shard for each of 1 x 8 readers, got 7"):
        stream(shards, 8)
    with pytest.raises(OSError, match=r"no-0\.tar: no such shard"):
        stream(str(tmp_path / "no-{0..1}.tar"), 0)
    (tmp_path / "y.tar").write_bytes(b"x" * 2000)
    batch = next(stream(str(tmp_path / "y.tar"), 0))
    assert batch.images.numel() == 0 and len(batch.unreadable) >= 1


def test_damaged_tar_files_give_the_images_before(tmp_path: Path) -> None:
    """A damaged tar file gives the images before the damage and a reason, soon and in little memory."""
    chance, path, damaged = random.Random(0), tmp_path / "x.tar", 0
    whole = tar(path, {f"{'d' * 150}/{n}.png": png(n) for n in range(6)}).read_bytes()
    start = time.monotonic()
    with memory() as used:
        for _ in range(EXAMPLES):
            path.write_bytes(mutated(whole, chance))
            with suppress(NoImages):
                damaged += bool(read_all(path)[1])
    assert damaged > EXAMPLES / 4
    assert used.taken < 100 << 20 and time.monotonic() - start < 10 + EXAMPLES / 50


@pytest.mark.parametrize("size", [-512, -1024, 1 << 33, 1 << 60, (1 << 28) + 1])
@pytest.mark.parametrize("kind", [tarfile.REGTYPE, b"x", b"g", b"L", b"K", b"S"])
def test_sizes_in_headers_are_no_promise(kind: bytes, size: int, tmp_path: Path) -> None:
    """Huge sizes in headers, of images or of extended headers, take no memory."""
    header = bytearray(tarfile.TarInfo("a.png").tobuf(tarfile.GNU_FORMAT))
    header[124:136] = (size % 256**12).to_bytes(12, "big")
    header[124] |= 0x80
    header[156:157] = kind
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    path = tmp_path / "x.tar"
    path.write_bytes(bytes(header) + bytes(1 << 16))
    found: list[Member] = []
    with memory() as used, suppress(NoImages):
        found, skipped = read_all(path)
        assert skipped
    assert not found and used.taken < 50 << 20


def test_headers_of_headers_of_headers(tmp_path: Path) -> None:
    path, info = tmp_path / "x.tar", tarfile.TarInfo("a")
    info.type = b"x"
    path.write_bytes(info.tobuf() * 20_000)
    with memory() as used:
        assert "damaged after 0 images" in read_all(path)[1][0]
    assert used.taken < 50 << 20
