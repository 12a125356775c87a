"""Output of commands on stdout and stderr: JSON documents, nothing with --quiet, progress."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from alit import console, display, model_file
from alit.cli import COMMANDS, GROUPS, app
from alit.console import errors, report, reported
from alit.evaluation import Networks
from alit.images import save_image, to_image
from alit.training import models
from tests.helpers import coder
from tests.helpers.commands import run
from tests.helpers.forks import fork
from tests.helpers.models import images, model
from tests.helpers.published import published
from tests.helpers.tokens import TOKENIZER, generator

pytestmark = pytest.mark.usefixtures("one_thread")

#: One call of each command that writes files. Calls of the same command write to different places.
CALLS = {
    "encode": "encode photos -o out.alit --tokens 3",
    "encode to a budget": "encode photos -o out.alit --budget 6",
    "decode": "decode in.alit -o out",
    "reconstruct": "reconstruct photos -o out --tokens 3",
    "demo": "demo -o out",
    "demo, live": "demo --train --seconds 1 --image-size 32 -o out",
    "train": "train --stage 1 --size nano --base dct --data photos --output out --image-size 32 --steps 2"
    " --batch-size 2 --set workers=0 --set tensorboard=false",
    "train, lengths": "train --stage length --start-from weights/nano.safetensors --data photos --output out"
    " --steps 5 --batch-size 2 --set workers=0 --set tensorboard=false",
    "evaluate": "evaluate nano --data photos --calibration",
    "analyze": "analyze nano --data photos -o out --max-l1 0.3",
    "probe": "probe nano --data classes --lengths 3,6",
    "generate": "generate g.safetensors --model tokenizer.safetensors -n 3 -o out",
    "compact": "compact weights/nano.safetensors out.safetensors",
    "convert": "convert official.pth out.safetensors --heads 2",
    "export": "export nano -o out --lengths 3",
}
#: Activities that each call reports.
DOING = {
    "encode": ["encoding"],
    "encode to a budget": ["measuring", "encoding"],
    "decode": ["decoding"],
    "reconstruct": ["reconstructing"],
    "demo": ["encoding and decoding", "drawing"],
    "demo, live": ["starting", "training", "encoding and decoding"],
    "train": ["starting", "training"],
    "train, lengths": ["starting", "recording errors", "fitting the length head"],
    "evaluate": ["evaluating", "finding limits", "trying criteria"],
    "analyze": ["reading data", "measuring errors", "measuring errors, mirrored"],
    "probe": ["reading", "fitting classifiers"],
    "generate": ["generating", "decoding"],
    "compact": [],
    "convert": ["reading official.pth", "writing out.safetensors"],
    "export": ["making programs"],
}
#: Keys of each command's JSON document.
KEYS = {
    "encode": "file images tokens each unmet skipped",
    "decode": "folder images",
    "reconstruct": "folder images skipped",
    "demo": "seconds",
    "train": "model steps skipped",
    "evaluate": "model lengths calibration left_out skipped",
    "analyze": "page verdicts model complexity skipped",
    "probe": "model lengths chance skipped",
    "generate": "folder tokens_file sheet images",
    "compact": "file bytes",
    "convert": "file size base max_tokens",
    "export": "folder format files",
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Working folder: a square model "nano", photos, files of each kind; no classifier is installed."""
    (tmp_path / "weights").mkdir()
    monkeypatch.setattr(model_file, "SHIPPED", tmp_path / "weights")
    monkeypatch.chdir(tmp_path)
    model(image_size=(16, 16)).save_pretrained("weights/nano.safetensors")
    missing = Networks(left_out=("class agreement: not installed",))
    monkeypatch.setattr("alit.evaluation.learned.classifier", lambda *_: missing)
    for number, image in enumerate(images(8)):
        for place in ("photos", f"classes/{number % 2}"):
            Path(place).mkdir(parents=True, exist_ok=True)
            save_image(to_image(image).resize((40, 40)), Path(place, f"{number}.png"))
    return tmp_path


def _prepare(name: str) -> None:
    """Write the files that a call of :data:`CALLS` reads."""
    if name == "decode":
        assert run("encode", "photos", "-o", "in.alit", "--tokens", 3).exit_code == 0
    if name == "convert":
        published(Path("official.pth"), "vqgan", "quantized")
    if name == "generate":
        model(**TOKENIZER).save_pretrained("tokenizer.safetensors")
        generator(()).save_pretrained("g.safetensors")


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """List of (activity, done, total) of all progress reports; progress lines are disabled."""
    found: list[tuple[Any, ...]] = []
    shown = display.Display.report

    def note(self: display.Display, *arguments: Any) -> None:
        found.append(arguments[:3])
        shown(self, *arguments)

    monkeypatch.setattr(display.Display, "report", note)
    monkeypatch.setattr(display, "EVERY", math.inf)
    return found


def test_help_is_grouped() -> None:
    """The help lists every command under its group's heading only."""
    lines = run("--help").output.splitlines()
    headings = [re.fullmatch(r"╭─ ([\w ]+) ─+╮", line) for line in lines]
    places = {found[1]: place for place, found in enumerate(headings) if found}
    assert list(places) == ["Options", *GROUPS]
    ends = [*list(places.values())[2:], len(lines)]
    for (group, texts), end in zip(GROUPS.items(), ends, strict=True):
        section = lines[places[group] : end]
        first = [found[1] for line in section if (found := re.match(r"│ (\w+) ", line))]
        assert first == list(texts)
    assert len(COMMANDS) == sum(map(len, GROUPS.values())) == 14


def test_images_of_the_command_line() -> None:
    """Images in the README of the command line are small, self-contained, and show the present commands."""
    folder = Path(__file__).parents[2] / "docs" / "images"
    for name in ("help", "encode", "evaluate"):
        text = (folder / f"{name}.svg").read_text(encoding="utf-8")
        assert len(text.encode()) < 60_000
        assert set(re.findall(r"https?://[^\s\"]+", text)) == {"http://www.w3.org/2000/svg"}
        assert "@import" not in text and "href" not in text and ElementTree.fromstring(text)
    shown = (folder / "help.svg").read_text(encoding="utf-8").replace("&#160;", " ")
    for name in (*GROUPS, *COMMANDS):
        assert re.search(rf">\s*(.{{1,4}} )?{name}\b", shown), name


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_can_be_quiet_and_speak_to_programs(name: str) -> None:
    """Every command has --json, except ``serve``, and --quiet, except ``serve`` and ``info``."""
    said = run(name, "--help").output
    assert ("--json" in said) == (name != "serve")
    assert ("--quiet" in said) == (name not in ("serve", "info"))


@pytest.mark.parametrize("name", CALLS)
def test_one_document_and_nothing_else(
    name: str, folder: Path, told: list[tuple[Any, ...]]
) -> None:
    """--json prints one document on stdout, and omissions on stderr; every reported activity ends, none is drawn."""
    _prepare(name)
    told.clear()
    done = run(*CALLS[name].split(), "--json")
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    first = CALLS[name].split()[0]
    assert set(KEYS[first].split()) <= set(found)
    for line in done.stderr.splitlines():
        assert line.startswith("left out ") or "nano tokenizer" in line or "steps, code" in line
    whats = list(dict.fromkeys(what for what, _, _ in told))
    assert [what for what in whats if what in DOING[name]] == DOING[name], whats
    for what in DOING[name]:
        _, most, total = max((x for x in told if x[0] == what), key=lambda x: x[1])
        if total is not None and "seconds" not in CALLS[name] and "train" not in name:
            assert most == total > 0, what


@pytest.mark.parametrize("name", CALLS)
def test_nothing_at_all(name: str, folder: Path, told: list[tuple[Any, ...]]) -> None:
    """--quiet prints nothing while files are still written."""
    _prepare(name)
    told.clear()
    done = run(*CALLS[name].split(), "--quiet")
    assert done.exit_code == 0 and done.output == "", done.output
    assert not told
    made = sorted(path.name for path in Path().glob("out*"))
    assert bool(made) == (name not in ("evaluate", "probe"))


def test_documents_and_errors_in_spite_of_quiet(folder: Path) -> None:
    done = run("encode", "photos", "-o", "x.alit", "--tokens", 3, "--quiet", "--json")
    assert json.loads(done.stdout)["images"] == 8 and done.stderr == ""
    Path("photos/9.png").write_text("no image")
    done = run("encode", "photos", "-o", "x.alit", "--tokens", 3, "--quiet", "--json")
    document = json.loads(done.stdout)
    assert done.exit_code == 1 and document["images"] == 8 and "9.png" in document["skipped"][0]
    assert done.stderr.startswith("error: 1 of 9 files skipped:")
    done = run("encode", "nowhere", "-o", "x.alit", "--quiet")
    assert done.stdout == "" and done.stderr == "error: nowhere: no such file or folder\n"
    done = run("encode", "nowhere", "-o", "x.alit", "--json")
    assert done.stdout == "" and "nowhere" in done.stderr
    assert run("info", "x.alit").stdout.startswith("x.alit: 8 images"), (
        "what was asked is forgotten"
    )


def test_numbers_that_json_does_not_have(capsys: pytest.CaptureFixture[str]) -> None:
    """Infinity and NaN, such as the PSNR of equal images, become null; undecodable names are escaped."""
    with console.console.command():
        console.console.speak(as_json=True)
        console.console.result({"a": [float("inf"), (float("nan"), 1.5)], "b": "\udcff ä"})
    said = capsys.readouterr()
    assert (
        json.loads(said.out) == {"a": [None, [None, 1.5]], "b": "\udcff ä"} and said.out.isascii()
    )


def test_lines_now_and_then(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without a terminal on stderr, progress is a line every half minute with speed and time left."""
    clock = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    with console.console.command():
        for number in range(0, 101, 10):
            report("encoding", number, 100, "images")
            clock[0] += 7
        report("waiting")
        clock[0] += 31
        report("waiting", tell="for nothing")
    said = capsys.readouterr()
    assert said.out == "" and said.err.splitlines() == [
        "encoding: 50/100 images, 1.4 images/s, 0:00:35 left",
        "encoding: 100/100 images, 1.4 images/s, 0:01:10",
        "waiting: 0:00:31, for nothing",
    ]


def test_an_estimate_after_the_first_batch(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Speed and time left count only work of this run: a resumed run begins in the middle."""
    clock = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    with console.console.command():
        report("training", 40, 100, "steps")
        clock[0] += 40
        report("training", 60, 100, "steps", "loss 0.1")
    assert capsys.readouterr().err == (
        "training: 60/100 steps, 0.5 steps/s, 0:01:20 left, loss 0.1\n"
    )


def test_a_share_of_what_is_not_counted() -> None:
    with console.console.command():
        now = console.console.display
        assert now is not None
        report("training", 0.1234, 1.0)
        assert now.place() == "training, 12 %"
        report("training", 0.1, 1.0)
        assert now.place() == "training, 10 %", "less than before begins anew"
        now.clear()
        assert now.place() == ""


def test_reports_go_nowhere_without_a_command(told: list[tuple[Any, ...]]) -> None:
    """``reported`` passes items on; it reports counts only within a command."""
    assert list(reported("abc", "reading", 3)) == ["a", "b", "c"] and not told
    with console.console.command():
        assert list(reported(["a", "bc"], "reading", 3, size=len)) == ["a", "bc"]
    assert told == [("reading", 0, 3), ("reading", 1, 3), ("reading", 3, 3)]


def test_the_start_of_a_run_is_shown(
    folder: Path, told: list[tuple[Any, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The initialization of a run as a transform coder, which takes minutes, is reported."""
    monkeypatch.setattr(models, "INITIAL_SAMPLE", 40)
    for number, image in enumerate(coder.smooth_images(20)):
        save_image(to_image(image), Path("photos", f"many-{number}.png"))
    shape = {"size": "nano", **coder.OPTIONS}
    for name in ("base", "encoder", "decoder"):
        shape[name] = dataclasses.asdict(shape[name])
    options = {"model": shape, "initialization": "transform_coder", "steps": 0, "batch_size": 2}
    options |= {"device": "cpu", "precision": "float32", "tensorboard": False, "workers": 0}
    Path("c.yaml").write_text(json.dumps(options))
    done = run("train", "c.yaml", "--data", "photos", "--output", "out")
    assert done.exit_code == 0, done.output
    most = {what: (done, total) for what, done, total in told}
    assert list(most) == [
        "starting",
        "reading crops",
        "fitting codebooks (k-means)",
        "fitting the last layer",
    ]
    assert most["reading crops"] == (40, 40)
    assert most["fitting codebooks (k-means)"] == (3, 4)
    done_images, total_images = most["fitting the last layer"]
    assert done_images == total_images > 40


@pytest.mark.parametrize(
    ("raised", "said"),
    [
        (KeyboardInterrupt(), "interrupted: encoding, 0/8 images\n"),
        (KeyboardInterrupt("stopped after step 3"), "interrupted: stopped after step 3\n"),
    ],
    ids=range(2),
)
def test_interrupted(
    raised: BaseException, said: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An interrupted command prints one line and exits with status 130."""

    def interrupted(*_: Any, **__: Any) -> Iterator[Any]:
        raise raised

    monkeypatch.setattr("alit.tokenizer.AdaptiveTokenizer.encode_stream", interrupted)
    done = run("encode", "photos", "-o", "x.alit", "--quiet")
    assert done.exit_code == 130 and (done.stdout, done.stderr) == (
        "",
        "interrupted\n" if not raised.args else said,
    )
    done = run("encode", "photos", "-o", "x.alit", "--json")
    assert done.exit_code == 130 and (done.stdout, done.stderr) == ("", said)
    assert not Path("x.alit").exists()


def test_interrupted_outside_of_a_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(Exception, match="130"), errors():
        raise KeyboardInterrupt
    assert capsys.readouterr().err == "interrupted\n"


def _in_a_terminal(document: str, *arguments: str) -> None:
    """Run a command in the terminal of this process, with stdout in the file ``document``."""
    os.environ.update(TERM="xterm-256color", COLUMNS="100")
    signal.signal(
        signal.SIGINT, signal.default_int_handler
    )  # SIGINT is ignored in tests that run in the background
    os.dup2(os.open(document, os.O_WRONLY | os.O_CREAT), 1)
    for number, stream in enumerate(("stdout", "stderr"), 1):  # reopen the new descriptors
        setattr(sys, stream, open(number, "w", closefd=False))  # noqa: SIM115
    sys.argv = ["alit", *arguments]
    app()


def _seen(until: Callable[[str], bool], master: int, seconds: float = 60) -> str:
    """Text read from a terminal until ``until(text)`` is true, with all that is available at that moment."""
    said, end, ended = "", time.monotonic() + seconds, False
    while time.monotonic() < end:
        ended = ended or until(said)
        try:
            said += os.read(master, 65536).decode(errors="replace")
        except BlockingIOError:
            if ended:
                break
            time.sleep(0.02)
        except OSError:  # closed by the writer
            break
    return said


@pytest.fixture
def terminal() -> Iterator[tuple[int, Path]]:
    master, slave = os.openpty()
    os.set_blocking(master, False)
    try:
        yield master, Path(os.ttyname(slave))
    finally:
        os.close(master)
        os.close(slave)


def test_progress_is_drawn_in_a_terminal(folder: Path, terminal: tuple[int, Path]) -> None:
    """Progress is drawn in the terminal and removed; the document in a file holds none of it."""
    master, name = terminal
    weights = str(folder / "weights/nano.safetensors")
    arguments = ("encode", str(folder / "photos"), "-o", str(folder / "x.alit"), "--model", weights)
    process = fork(name, _in_a_terminal, str(folder / "out.json"), *arguments, "--json")
    said = _seen(lambda _: not process.is_alive(), master)
    process.join(60)
    assert process.exitcode == 0, said
    assert re.search(r"encoding .*━.* \d/8 images", said), said
    assert said.rstrip().endswith("\x1b[2K"), "the line is cleared"
    assert json.loads((folder / "out.json").read_text())["images"] == 8


def test_ctrl_c_in_a_terminal(folder: Path, terminal: tuple[int, Path]) -> None:
    master, name = terminal
    weights, many = str(folder / "weights/nano.safetensors"), [str(folder / "photos")] * 5000
    arguments = ("encode", *many, "-o", str(folder / "x.alit"), "--model", weights)
    process = fork(name, _in_a_terminal, str(folder / "out"), *arguments)
    said = _seen(lambda text: "images/s" in text, master)
    assert process.is_alive(), said
    os.kill(process.pid, signal.SIGINT)
    said = _seen(lambda _: not process.is_alive(), master)
    process.join(60)
    assert process.exitcode == 130, said
    assert re.search(r"interrupted: encoding, \d+/40000 images", said) and "Traceback" not in said
    assert not (folder / "x.alit").exists() and (folder / "out").read_text() == ""
