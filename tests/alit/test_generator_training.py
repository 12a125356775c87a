"""Training of generators on token files: learning, resumption, refused input; ``alit generate``."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from alit import TokenSequence
from alit.generation import Generator, sample
from alit.images import to_image
from alit.training import Interrupted, TrainingConfig, train
from tests.helpers.commands import refused, run
from tests.helpers.models import model
from tests.helpers.runs import config, differing, log_of, state_of, stopping, weights_of
from tests.helpers.tokens import OPTIONS, TOKENIZER, generator, sequences, write

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Working folder with a tokenizer and a token file for each of two classes, of four and of two images."""
    monkeypatch.chdir(tmp_path)
    model(**TOKENIZER).save_pretrained("tokenizer.safetensors")
    write(Path("tokens/rose.alit"), sequences(4), names=["a", "b", "c", ""])
    write(Path("tokens/tulip/1.alit"), sequences(2, seed=1), names=["d", "e"])
    return tmp_path


def described(**fields: Any) -> TrainingConfig:
    """Configuration of a short generator run."""
    values: dict[str, Any] = {
        **{"stage": "generator", "data": "tokens", "tokenizer": "tokenizer.safetensors"},
        **{"labels": "files", "generator": OPTIONS},
    }
    return config(**{**values, **fields})


@pytest.mark.parametrize("causal", [True, False])
def test_learns_six_sequences(causal: bool, here: Path) -> None:
    """A generator memorizes six sequences: their tokens, ends, classes and frequencies."""
    options = {**OPTIONS, "causal": causal}
    fields: dict[str, Any] = {"batch_size": 6, "ema": 0.9, "learning_rate": 5e-3}
    steps = 250 if causal else 350
    trained = train(described(generator=options, steps=steps, **fields)).model
    assert isinstance(trained, Generator) and trained.config.classes == ("rose", "tulip")
    data = {"rose": sequences(4), "tulip": sequences(2, seed=1)}
    for label, tokens in enumerate(data.values()):
        assert trained.lengths[label].nonzero()[:, 0].tolist() == sorted(
            set(tokens.lengths.tolist())
        )
    known = {
        (name, tuple(part.tolist()))
        for name, tokens in data.items()
        for part in tokens.rows.split(tokens.lengths.tolist())
    }
    samples = sample(trained, 200)
    found = Counter(
        (trained.config.classes[label], tuple(part.tolist()))
        for label, part in zip(
            samples.labels, samples.tokens.rows.split(samples.tokens.lengths.tolist()), strict=True
        )
    )
    right = sum(found[each] for each in known)
    assert right >= 190, f"{right} of 200"
    # A sixth of all draws is 33; counts differ from that by 5 or more in a fourth of the cases.
    assert all(15 <= found[each] <= 55 for each in known), found


@pytest.mark.parametrize("causal", [True, False])
def test_resume_bit_for_bit(causal: bool, here: Path) -> None:
    """3 steps, a stop and 3 more give the checkpoint, log and model of 6 steps, bit for bit."""
    fields: dict[str, Any] = {"checkpoint_every": 3, "accumulate": 2}
    fields["generator"] = {**OPTIONS, "causal": causal}
    straight, stopped = here / "straight", here / "stopped"
    train(described(output=str(straight), **fields))
    with pytest.raises(Interrupted, match="SIGTERM after step 3; resume goes on from there"):
        train(described(output=str(stopped), **fields), on_log=stopping(3))
    os.rename(
        "tokenizer.safetensors", "elsewhere.safetensors"
    )  # a resumed run does not need its tokenizer
    result = train(described(output=str(stopped), **fields), resume=True)
    assert result.steps == 6 and isinstance(result.model, Generator)
    state = state_of(straight)
    assert differing(state, state_of(stopped)) == [] and "model/lengths" in state
    assert log_of(straight) == log_of(stopped) and len(log_of(straight)) == 6
    assert differing(weights_of(straight), weights_of(stopped)) == []
    again = Generator.from_pretrained(stopped / "model.safetensors")
    assert differing(result.model.state_dict(), again.state_dict()) == []


def test_labels_from_a_table(here: Path) -> None:
    write(Path("tokens/rose.alit"), sequences(3), names=["a", "b", "c"])
    Path("labels.csv").write_text("a,x\nb,y\nc,x\nd,y\ne,y\nunused,z\n")
    trained = train(described(labels="labels.csv", steps=1)).model
    assert isinstance(trained, Generator) and trained.config.classes == ("x", "y")
    first, second = sequences(3).lengths.tolist(), sequences(2, seed=1).lengths.tolist()
    counts = [Counter([first[0], first[2]]), Counter([first[1], *second])]
    for row, expected in zip(trained.lengths, counts, strict=True):
        assert {n: int(x) for n, x in enumerate(row) if x} == expected


def test_goes_on_from_a_generator_and_shows_samples(here: Path) -> None:
    trained = train(described(output="run", steps=1)).model
    fields: dict[str, Any] = {"start_from": "run/model.safetensors", "generator": {}, "steps": 0}
    again = train(described(**fields)).model
    assert differing(trained.state_dict(), again.state_dict()) == []
    pytest.importorskip("tensorboard")
    train(described(output="shown", steps=1, image_every=1, tensorboard=True))
    assert any(Path("shown/tensorboard").iterdir())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"data": None}, "data: expected a file of tokens"),
        ({"data": "empty"}, "data: expected .alit files, got none in empty"),
        ({"data": "other.alit"}, "data: other.alit: written by another model: expected"),
        ({"data": "codes.alit"}, "with 32 codes at 16x24, got .* with 16 codes"),
        (
            {"data": "wide.alit"},
            "expected images of 16x24, got 16x28 in image 0; alit encode --fit",
        ),
        ({"data": "none.alit"}, "expected 1 to 12 tokens an image, got 0 to 2"),
        ({"data": "tokenizer.safetensors"}, "tokenizer.safetensors: not an .alit file"),
        ({"labels": "few.csv"}, "every image, got none for image 2 of tokens/rose.alit .'c'"),
        ({"labels": "unnamed.csv"}, "image 3 of tokens/rose.alit .without a name"),
        ({"labels": "two.csv"}, "labels: two.csv, row 2: a has two classes"),
        ({"labels": "odd.csv"}, "odd.csv, row 1: expected a name and a class, got 3 values"),
        ({"labels": "tokenizer.safetensors"}, "labels: tokenizer.safetensors: not a CSV file"),
        ({"generator": {"widht": 3}}, "generator: expected one of causal, .*did you mean 'width'"),
        ({"generator": {"width": 0}}, "width: expected an integer in"),
        ({"generator": {"width": 33}}, "heads: expected a divisor of width 33"),
        ({"batch_size": 8}, "data: expected at least a batch of 8 images, got 6"),
        ({"compile": True}, "compile: expected False in stage generator"),
        ({"activation_checkpointing": True}, "activation_checkpointing: expected False in stage"),
        ({"start_from": "g.safetensors"}, "generator: expected no options with start_from"),
        (
            {"start_from": "g.safetensors", "generator": {}, "tokenizer": "two.safetensors"},
            "start_from: expected a generator of the tokenizer two.safetensors, got one of another",
        ),
        (
            {"start_from": "g.safetensors", "generator": {}},
            "labels: expected classes of the generator, got 'rose'",
        ),
        ({"tokenizer": "continuous.safetensors"}, "tokenizer: expected one that gives indices"),
    ],
)
def test_data_and_options_that_do_not_fit(fields: dict[str, Any], message: str, here: Path) -> None:
    Path("empty").mkdir()
    two = model(seed=1, **TOKENIZER)
    two.save_pretrained("two.safetensors")
    model(bottleneck="continuous").save_pretrained("continuous.safetensors")
    Path("other.alit").write_bytes(sequences(2).to_bytes(two.identity()))
    few = model(**{**TOKENIZER, "codebook_size": 16})
    codes = TokenSequence(torch.tensor([2]), torch.tensor([3, 4]))
    Path("codes.alit").write_bytes(codes.to_bytes(few.identity()))
    write(
        Path("wide.alit"),
        TokenSequence(codes.lengths, codes.indices, sizes=torch.tensor([[16, 28]])),
    )
    write(Path("none.alit"), TokenSequence(torch.tensor([0, 2]), codes.indices))
    Path("few.csv").write_text("a,x\nb,y\n")
    Path("unnamed.csv").write_text("a,x\nb,y\nc,x\n")
    Path("two.csv").write_text("a,x\na,y\n")
    Path("odd.csv").write_text("a,x,3\n")
    generator(("lily",)).save_pretrained("g.safetensors")
    with pytest.raises((ValueError, OSError), match=message):
        train(described(**fields))


def test_images_and_models_of_other_stages_are_refused(here: Path) -> None:
    with pytest.raises(ValueError, match="images: expected None in stage generator"):
        train(described(), images=torch.zeros(8, 3, 16, 24))
    with pytest.raises(ValueError, match="stage generator expects a Generator, got AdaptiveTok"):
        train(described(), model=model(**TOKENIZER))


MODEL = ("--model", "tokenizer.safetensors")


@pytest.mark.parametrize("classes", [(), ("rose", "tulip")])
def test_generate(classes: tuple[str, ...], here: Path) -> None:
    g = generator(classes)
    g.save_pretrained("g.safetensors")
    options = ("--temperature", 0.9, "--top-k", 20, "--top-p", 0.95, "--seed", 4, *MODEL)
    options += ("--class", "tulip") if classes else ()
    done = run("generate", "g.safetensors", "-n", 11, "-o", "out/deep", *options)
    assert done.exit_code == 0, done.output
    expected = sample(
        g, 11, of=classes[1] if classes else None, seed=4, temperature=0.9, top_k=20, top_p=0.95
    ).tokens
    found = TokenSequence.from_bytes(Path("out/deep/generated.alit").read_bytes())
    assert torch.equal(found.lengths, expected.lengths) and torch.equal(found.rows, expected.rows)
    stem = "tulip-" if classes else ""
    names = [f"{stem}{number:05}.png" for number in range(11)]
    assert sorted(os.listdir("out/deep")) == sorted([*names, "generated.alit", "sheet.png"])
    for name, pixels in zip(names, model(**TOKENIZER).decode(expected), strict=True):
        with Image.open(Path("out/deep", name)) as image:
            assert image.tobytes() == to_image(pixels).tobytes()
    with Image.open("out/deep/sheet.png") as sheet:
        assert sheet.width > 8 * 176 and 2 * 176 < sheet.height < 3 * 176
    decoded = run("decode", "out/deep/generated.alit", "-o", "again", *MODEL)
    assert decoded.exit_code == 0 and sorted(os.listdir("again")) == names
    again = ("generate", "g.safetensors", "-n", 1, "-o", "out/deep", *MODEL)
    refused(run(*again), "output: out/deep/generated.alit is there already; choose another")
    assert run(*again, "--overwrite").exit_code == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("none.safetensors", "none.safetensors: no such file"),
        (
            "tokenizer.safetensors",
            "expected format 'alit-generator-1' in the metadata, got 'alit-1'",
        ),
        ("g.safetensors --class lily", "class: expected one of rose, tulip, got 'lily'"),
        ("g.safetensors --temperature 0", "temperature: expected a number in"),
        ("g.safetensors --top-k 0", "top_k: expected an integer in"),
        ("g.safetensors --top-p 2", "top_p: expected a number in (0, 1], got 2"),
        (
            "g.safetensors --model other.safetensors",
            "model: expected the tokenizer of the generator",
        ),
        ("g.safetensors --device gpu", "got 'gpu'"),
    ],
)
def test_generate_refuses(arguments: str, message: str, here: Path) -> None:
    generator(("rose", "tulip")).save_pretrained("g.safetensors")
    model(seed=1, **TOKENIZER).save_pretrained("other.safetensors")
    model_given = MODEL if "--model" not in arguments else ()
    refused(run("generate", *arguments.split(), "-o", "out", *model_given), message)
    assert not Path("out").exists() or not os.listdir("out")
