"""Models loaded from the Hugging Face Hub over HTTP, with a local substitute for it."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch

from alit import AdaptiveTokenizer, CheckpointError
from alit.hub import is_name
from tests.helpers.commands import refused, run
from tests.helpers.hostile import full_disk
from tests.helpers.hub_server import Hub, Refusal, forget, saved
from tests.helpers.models import model

FILE = "model.safetensors"


def cached(folder: Path) -> list[str]:
    """Names of complete files in the Hub's cache: models by name, and blobs. (Some versions keep .incomplete files.)"""
    found = (folder / "home").rglob("*")
    files = [x for x in found if (x.is_file() or x.is_symlink()) and x.suffix != ".incomplete"]
    return [x.name for x in files if x.name == FILE or x.parent.name == "blobs"]


def test_names() -> None:
    good = ["a/b", "me/model-0.5", "my_org/Nano.2-dct", "x.y/z", "a/" + "b" * 96]
    bad = [
        "nano",
        "a/b/c",
        "/b",
        "a/",
        "../b",
        "./b",
        "~/b",
        "a/.b",
        "-a/b",
        "a/b-",
        "a--b/c",
        "a/b..c",
        "a b/c",
    ]
    bad += [
        "run/model.safetensors",
        "a/b.git",
        "run/model.pt",
        "a/é",
        "a/" + "b" * 97,
        "a/b\n",
        "C:/b",
        "a\\b",
        "",
    ]
    assert all(map(is_name, good)) and not any(map(is_name, bad))
    assert not is_name(Path("a/b")) and not is_name(None)


def test_load(hub: Hub, content: bytes, tmp_path: Path) -> None:
    """Only the model file is requested, once; later loads work without the Hub."""
    hub.add("me/model", content)
    hub.files["me/model", "main"] |= {"config.json": b"{}", "modeling.py": b"raise SystemExit"}
    loaded = AdaptiveTokenizer.from_pretrained("me/model")
    assert loaded.identity() == model().identity() and not loaded.training
    path = f"/me/model/resolve/main/{FILE}"
    assert hub.asked == [f"HEAD {path}", f"GET {path}"] and hub.tokens == {None}
    hub.refusals["me/model"] = Refusal(503)
    assert AdaptiveTokenizer.from_pretrained("me/model").identity() == loaded.identity()
    assert hub.asked[2:] == [f"HEAD {path}"]
    assert len(cached(tmp_path)) == 2


def test_revision(hub: Hub, content: bytes) -> None:
    hub.add("me/model", content)
    hub.add("me/model", saved(model(seed=1)), "try/2")
    of = AdaptiveTokenizer.from_pretrained
    assert of("me/model", revision="try/2").identity() == model(seed=1).identity()
    assert of("me/model").identity() == model().identity()
    for name in ("nano", "nano.safetensors", "a/b/c", Path("me/model")):
        with pytest.raises(
            ValueError, match=r"revision: expected owner/name on the Hub with it, got"
        ):
            of(name, revision="main")


def test_what_is_here_comes_first(here: Path, hub: Hub, content: bytes) -> None:
    """A local file comes first, then shipped weights, then the Hub; a ``Path`` is never requested from the Hub."""
    for name in ("me/model", "me/shipped"):
        hub.add(name, content)
    (here / "me").mkdir()
    model(seed=1).save_pretrained(here / "me" / "model")
    (here / "weights" / "me").mkdir()
    model(seed=2).save_pretrained(here / "weights" / "me" / "shipped.safetensors")
    for name, seed in (("me/model", 1), ("me/shipped", 2)):
        loaded = AdaptiveTokenizer.from_pretrained(name)
        assert loaded.identity() == model(seed=seed).identity()
    hub.add("me/other", content)
    with pytest.raises(FileNotFoundError, match="me/other: no such file, nor the name of shipped"):
        AdaptiveTokenizer.from_pretrained(Path("me/other"))
    assert not hub.asked


def test_commands(here: Path, hub: Hub, content: bytes) -> None:
    hub.add("me/model", content)
    assert run("compact", "me/model", "small.safetensors").exit_code == 0
    assert AdaptiveTokenizer.from_pretrained("small.safetensors").config == model().config
    refused(run("encode", "x.png", "-o", "x.alit", "--model", "me/other"), "me/other: neither a f")


@pytest.mark.parametrize(
    ("refusal", "kind", "message"),
    [
        (
            None,
            FileNotFoundError,
            "neither a file nor a repository on the Hub, or a private one, which takes a token",
        ),
        (
            Refusal(401, "RepoNotFound"),
            FileNotFoundError,
            "neither a file nor a repository on the Hub, or a private",
        ),
        (
            Refusal(403, "GatedRepo"),
            PermissionError,
            "access is granted on the page of the repository, to those who",
        ),
        (
            Refusal(401, "", "Invalid credentials in Authorization header"),
            PermissionError,
            "the Hub answered 401 Inva",
        ),
        (
            Refusal(403, "", "Not with this token"),
            PermissionError,
            "the Hub answered 403 Not with this token; it takes",
        ),
        (
            Refusal(404, "RevisionNotFound"),
            FileNotFoundError,
            "the repository has no revision 'v2'",
        ),
        (
            Refusal(404, "EntryNotFound"),
            FileNotFoundError,
            "no model.safetensors in the repository at revision 'v2'",
        ),
        (
            Refusal(503),
            OSError,
            "the Hub answered 503, and model.safetensors is not in .*models--me--model",
        ),
    ],
)
def test_refusals(
    refusal: Refusal | None, kind: type[OSError], message: str, hub: Hub, tmp_path: Path
) -> None:
    if refusal is not None:
        hub.refusals["me/model"] = refusal
    with pytest.raises(OSError, match=rf"^me/model: {message}") as caught:
        AdaptiveTokenizer.from_pretrained("me/model", revision="v2")
    assert type(caught.value) is kind and "\n" not in str(caught.value)
    assert cached(tmp_path) == []


def test_the_repository_has_other_files(hub: Hub, content: bytes) -> None:
    hub.files["me/model", "main"] = {"pytorch_model.bin": content}
    with pytest.raises(
        FileNotFoundError, match=r"me/model: no model.safetensors in the repository at rev"
    ):
        AdaptiveTokenizer.from_pretrained("me/model")
    with pytest.raises(FileNotFoundError, match=r"me/model: the repository has no revision 'v3'$"):
        AdaptiveTokenizer.from_pretrained("me/model", revision="v3")


def test_offline(hub: Hub, content: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a server, or with HF_HUB_OFFLINE, cached models load and others raise ConnectionError."""
    hub.add("me/model", content)
    AdaptiveTokenizer.from_pretrained("me/model")
    asked, place = len(hub.asked), rf"and {FILE} is not in {tmp_path}/home/hub/models--me--other$"
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    forget()
    assert AdaptiveTokenizer.from_pretrained("me/model").identity() == model().identity()
    with pytest.raises(ConnectionError, match=rf"^me/other: HF_HUB_OFFLINE is set, {place}"):
        AdaptiveTokenizer.from_pretrained("me/other")
    with pytest.raises(ConnectionError, match=r"^me/model: HF_HUB_OFFLINE is set$"):
        model().push_to_hub("me/model")
    assert len(hub.asked) == asked
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    forget()
    failed = r"the connection to the Hub failed \(.*refused\)"
    with pytest.raises(ConnectionError, match=rf"^me/other: {failed}, {place}"):
        AdaptiveTokenizer.from_pretrained("me/other")
    with pytest.raises(ConnectionError, match=rf"^me/model: {failed}$"):
        model().push_to_hub("me/model")


def test_a_connection_that_ends_early(hub: Hub, content: bytes, tmp_path: Path) -> None:
    hub.add("me/model", content)
    hub.half = True
    with pytest.raises(
        ConnectionError, match=r"me/model: the connection to the Hub failed \(.*\)$"
    ):
        AdaptiveTokenizer.from_pretrained("me/model")
    assert cached(tmp_path) == []
    hub.half = False
    assert AdaptiveTokenizer.from_pretrained("me/model").identity() == model().identity()


def test_full_disk(hub: Hub, content: bytes, tmp_path: Path) -> None:
    """A full disk raises the system's OSError and leaves nothing in the cache."""
    hub.add("me/model", content)
    with full_disk(20000), pytest.raises(OSError, match="File too large"):
        AdaptiveTokenizer.from_pretrained("me/model")
    assert cached(tmp_path) == []


@pytest.mark.parametrize("size", [0, 100, -1])
def test_a_file_cut_off_in_the_cache(size: int, hub: Hub, content: bytes, tmp_path: Path) -> None:
    """A truncated file in the cache raises CheckpointError and is removed, and fetched by the next load."""
    hub.add("me/model", content)
    AdaptiveTokenizer.from_pretrained("me/model")
    (blob,) = (tmp_path / "home/hub/models--me--model/blobs").iterdir()
    blob.write_bytes(content[:size])
    with pytest.raises(CheckpointError, match=r"me/model: .*truncated.* no longer in the cache"):
        AdaptiveTokenizer.from_pretrained("me/model")
    assert cached(tmp_path) == []
    assert AdaptiveTokenizer.from_pretrained("me/model").identity() == model().identity()


def test_what_is_no_model_of_ours(hub: Hub, content: bytes, tmp_path: Path) -> None:
    """A foreign safetensors file stays in the cache, which other programs share; other files are removed."""
    hub.add("me/other", safetensors.torch.save({"x": torch.zeros(3)}, {"format": "pt"}))
    hub.add("me/pickle", b"\x80\x04" * 100)
    with pytest.raises(CheckpointError, match="expected format 'alit-1' in the metadata, got 'pt'"):
        AdaptiveTokenizer.from_pretrained("me/other")
    with pytest.raises(CheckpointError, match=r"me/pickle: .*not a safetensors file, or truncated"):
        AdaptiveTokenizer.from_pretrained("me/pickle")
    assert len(cached(tmp_path)) == 2


def test_links_out_of_the_cache_are_left_alone(hub: Hub, content: bytes, tmp_path: Path) -> None:
    hub.add("me/model", content)
    AdaptiveTokenizer.from_pretrained("me/model")
    (blob,) = (tmp_path / "home/hub/models--me--model/blobs").iterdir()
    blob.unlink()
    (tmp_path / "own").write_bytes(b"half")
    blob.symlink_to(tmp_path / "own")
    with pytest.raises(CheckpointError, match="no longer in the cache"):
        AdaptiveTokenizer.from_pretrained("me/model")
    assert cached(tmp_path) == [] and (tmp_path / "own").read_bytes() == b"half"


def test_without_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    needed = r"models on the Hugging Face Hub need huggingface_hub: pip install 'alit\[hub\]'"
    with pytest.raises(FileNotFoundError, match=f"^me/model: no such file; {needed}$"):
        AdaptiveTokenizer.from_pretrained("me/model")
    refused(run("compact", "me/model", "x.safetensors"), "error: me/model: no such file; models on")
    with pytest.raises(ModuleNotFoundError, match=f"^{needed}$"):
        model().push_to_hub("me/model")
