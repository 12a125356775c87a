"""alit export: programs give the model's results for any number of images, without alit installed."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch import _inductor as inductor

from alit import AdaptiveTokenizer, FixedLength, TokenSequence, TransformerConfig, programs
from alit import export as exporting
from alit.base_config import BaseConfig
from alit.config import Quirks
from alit.programs import BATCHES, Encoder, encoder
from tests.helpers import models
from tests.helpers.commands import refused, run, text

#: Loads each program and runs it on all of its inputs, in a process that cannot import alit.
RUN = """
import sys
import numpy as np
sys.modules["alit"] = sys.modules["alit_kernels"] = None

def program_of(path):
    if path.endswith(".onnx"):
        import onnxruntime
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        (name,) = [x.name for x in session.get_inputs()]
        return lambda x: session.run(None, {name: x})[0]
    import torch
    if path.endswith(".aoti.pt2"):
        import torch._inductor
        program = torch._inductor.aoti_load_package(path)
    else:
        program = torch.export.load(path).module()
    return lambda x: program(torch.from_numpy(x)).detach().numpy()

programs, results = {}, {}
for key, x in np.load("inputs.npz").items():
    path = key.partition(" ")[0]
    if path not in programs:
        programs[path] = program_of(path)
    results[key] = programs[path](x)
np.savez("results.npz", **results)
"""
RESIDUAL: dict[str, Any] = {
    **{"recurrence": "residual", "codebooks": "each", "any_length": True, "pixel_filter": 4}
}


def model(base: str | BaseConfig = "dct", **options: Any) -> AdaptiveTokenizer:
    """Small model with two iterations of three tokens and one layer, so that programs are made quickly."""
    small = TransformerConfig(32, 1, 2)
    return models.model(base, iterations=2, encoder=small, decoder=small, **options)


def images(m: AdaptiveTokenizer, count: int) -> Tensor:
    random = torch.Generator().manual_seed(10 + count)
    return torch.rand(count, 3, *m.config.image_size, generator=random)


def decoded(m: AdaptiveTokenizer, indices: Tensor) -> Tensor:
    count, length = indices.shape
    found = m.decode(TokenSequence(torch.full((count,), length), indices.flatten()))
    assert isinstance(found, Tensor)
    return found


@pytest.fixture
def made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let tests of all formats share a model's exported programs, each of which takes seconds to make."""

    def exported(part: programs.Part) -> Any:
        m: Any = part.module.model
        key = m.identity().fingerprint, part.name
        if key not in PROGRAMS:
            PROGRAMS[key] = programs.exported(part)
        return PROGRAMS[key]

    monkeypatch.setattr(exporting, "exported", exported)


#: Exported programs by model fingerprint and name of the part.
PROGRAMS: dict[tuple[bytes, str], Any] = {}


def written(m: AdaptiveTokenizer, folder: Path, format: str, lengths: list[int]) -> dict[str, Any]:
    """Run ``alit export`` and return the manifest that it writes."""
    m.save_pretrained(folder / "m.safetensors")
    numbers = ",".join(map(str, lengths))
    options = ("--format", format, "--lengths", numbers)
    done = run("export", folder / "m.safetensors", "-o", folder / "out", *options)
    assert done.exit_code == 0, done.output
    assert text(done).count("indices equal the model's") == len(lengths)
    assert text(done).count("of the model's") == 1
    manifest: dict[str, Any] = json.loads((folder / "out" / "manifest.json").read_text())
    names = [*manifest["encoders"].values(), manifest["decoder"]]
    assert sorted(os.listdir(folder / "out")) == sorted([*names, "manifest.json"])
    assert list(map(int, manifest["encoders"])) == lengths
    return manifest


def check(folder: Path, format: str, *exports: tuple[AdaptiveTokenizer, list[int]]) -> None:
    """Export models by the command; check that the files, run in a process without alit, give the models' results."""
    pairs: dict[str, tuple[Tensor, Tensor]] = {}
    for number, (m, lengths) in enumerate(exports):
        place = Path(str(number))
        (folder / place).mkdir()
        manifest = written(m, folder / place, format, lengths)
        for length, name in zip(lengths, manifest["encoders"].values(), strict=True):
            for count in (1, 2, 5):
                expected = m.encode(given := images(m, count), FixedLength(length)).indices
                assert expected is not None
                key = f"{place / 'out' / name} {count}"
                pairs[key] = given, expected.view(count, length)
        steps = manifest["decoder_lengths"]
        of_decoder = range(steps["step"], steps["most"] + 1, steps["step"])
        for count, length in zip((1, 2, 5, 1, 2, 5), of_decoder, strict=False):
            given = torch.randint(m.config.codebook_size, (count, length))
            key = f"{place / 'out' / manifest['decoder']} {count} {length}"
            pairs[key] = given, decoded(m, given)
    np.savez(folder / "inputs.npz", **{key: x.numpy() for key, (x, _) in pairs.items()})
    subprocess.run([sys.executable, "-c", RUN], cwd=folder, check=True)
    results = np.load(folder / "results.npz")
    assert results.keys() == pairs.keys()
    for key, (_, expected) in pairs.items():
        found = torch.from_numpy(results[key])
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)  # of integers: equal


def residual() -> AdaptiveTokenizer:
    return model(**RESIDUAL)


def published() -> AdaptiveTokenizer:
    """Small model whose decoder is exported at the lengths of iterations."""
    base: Any = dataclasses.replace(models.BASES["vqgan"], multipliers=(1, 1))
    return model(base, image_size=(8, 12), halting="mask")


@pytest.mark.usefixtures("made_once")
def test_pt2(tmp_path: Path) -> None:
    check(tmp_path, "pt2", (residual(), [5]), (published(), [6]))


@pytest.mark.usefixtures("made_once")
def test_onnx(tmp_path: Path) -> None:
    for package in exporting.FORMATS["onnx"].packages:
        pytest.importorskip(package, reason="needs the extra: pip install 'alit[export]'")
    check(tmp_path, "onnx", (residual(), [5]), (published(), [6]))


@pytest.mark.usefixtures("made_once")
def test_aoti(tmp_path: Path) -> None:
    """AOTInductor packages give the model's results; compiled without vectors and optimization to save time."""
    try:
        exporting.FORMATS["aoti"].check()
    except ValueError as error:
        pytest.skip(str(error))
    quickly = {
        "cpp.vec_isa_ok": False,
        "aot_inductor.precompile_headers": False,
        "aot_inductor.compile_wrapper_opt_level": "O0",
    }
    with inductor.config.patch(quickly):
        check(tmp_path, "aoti", (residual(), [5]))


def test_aoti_without_a_compiler(tmp_path: Path) -> None:
    model().save_pretrained(tmp_path / "m.safetensors")
    with inductor.config.patch({"cpp.cxx": ("no-such-compiler",)}):
        options = ("-o", tmp_path / "out", "--format", "aoti")
        done = run("export", tmp_path / "m.safetensors", *options)
    refused(done, "format: aoti needs a C++ compiler, and none was found; install g++, or name one")
    assert not (tmp_path / "out").exists()


def test_the_search_of_a_program_is_that_of_the_op() -> None:
    z, codebook = torch.randn(5000, 6), torch.randn(32, 6)
    codebook[7] = codebook[5]  # of equal ones the first
    for metric in ("euclidean", "cosine"):
        found = programs._nearest_codeword(z, codebook, metric)
        assert torch.equal(
            found, torch.ops.alit_kernels.nearest_codeword(z, codebook, metric, "ieee", "reference")
        )


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[Any], Any]], None]:
    """Function that fakes the format "pt2": empty files, modules as programs, outputs changed by its argument."""

    def replace(changed: Callable[[Any], Any]) -> None:
        modules = []

        def save(program: Any, path: Path, _: Any) -> None:
            path.touch()
            modules.append(program)

        fake = exporting.Format(".pt2", save, lambda _: lambda x: changed(modules[-1](x)))
        monkeypatch.setattr(exporting, "exported", lambda part: part.module)
        monkeypatch.setitem(exporting.FORMATS, "pt2", fake)

    return replace


def test_a_program_that_says_something_else_is_not_kept(quick: Any, tmp_path: Path) -> None:
    m, out = model(), tmp_path / "out"
    for changed, message in (
        (lambda x: x + 1, "encoder-6: indices differ from the model's by up to 1, expected at"),
        (lambda x: x[:1], "encoder-6: expected torch.int64 (3, 6) as of the model, got"),
        (lambda x: x if x.dtype == torch.int64 else x + 2e-4, "decoder: images differ"),
        (lambda x: x if x.dtype == torch.int64 else x * torch.nan, "by up to nan"),
    ):
        quick(changed)
        with pytest.raises(ValueError, match=message.replace("(", r"\(").replace(")", r"\)")):
            exporting.write(m, out, "pt2", [6])
        assert not os.listdir(out)
    quick(lambda x: x)
    assert exporting.write(m, out, "pt2", [6, 2, 6]).keys() == {
        "encoder-2.pt2",
        "encoder-6.pt2",
        "decoder.pt2",
    }


def test_manifest(quick: Any, tmp_path: Path) -> None:
    quick(lambda x: x)
    m = model(any_length=True)
    exporting.write(m, tmp_path, "pt2", [2])
    said = json.loads((tmp_path / "manifest.json").read_text())
    versions = said.pop("versions")
    assert versions.keys() == {"alit", "torch"}
    assert said == {
        "format": "pt2",
        "model": m.identity().fingerprint.hex(),
        "image_size": [16, 24],
        "codebook_size": 32,
        "bits_per_token": 5,
        "encoders": {"2": "encoder-2.pt2"},
        "decoder": "decoder.pt2",
        "decoder_lengths": {"step": 1, "most": 6},
    }


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--format pt3", "format: expected one of pt2, onnx, aoti, got 'pt3'; did you mean 'pt2'?"),
        ("--lengths 0", "lengths: expected an integer in [1, 6], got 0"),
        ("--lengths 6,7", "lengths: expected an integer in [1, 6], got 7"),
        ("--lengths 3;6", "lengths: expected numbers such as 32,64,256, got '3;6'"),
    ],
)
def test_wrong_options(arguments: str, message: str, tmp_path: Path) -> None:
    model().save_pretrained(tmp_path / "m.safetensors")
    options = ("-o", tmp_path / "out", *arguments.split())
    refused(run("export", tmp_path / "m.safetensors", *options), message)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"halting": "drop"}, "halting"),
        ({"bottleneck": "continuous"}, "bottleneck"),
        ({"quirks": Quirks(unquantized_tokens=True)}, "quirks.unquantized_tokens"),
        (
            {"quirks": Quirks(random_halting_in_evaluation=True), "halting": "mask"},
            "quirks.random_halting_in_evaluation",
        ),
        (
            {"quirks": Quirks(random_posterior_in_evaluation=True), "base": "vae"},
            "quirks.random_posterior_in_evaluation",
        ),
    ],
)
def test_what_has_no_program_is_refused_by_its_option(options: Any, name: str) -> None:
    with pytest.raises(ValueError, match=f"^{name}: "):
        exporting.check_exportable(model(**options), [6])
    other = {**options, "base": "dct", "halting": "off", "bottleneck": "quantized"}
    other["quirks"] = dataclasses.replace(other.get("quirks", Quirks()), unquantized_tokens=False)
    exporting.check_exportable(model(**other), [6])  # draws that are never made


@pytest.mark.parametrize("package", ["onnx", "onnxscript", "onnxruntime"])
def test_missing_extra(package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model().save_pretrained(tmp_path / "m.safetensors")
    for each in ("onnx", "onnxscript", "onnxruntime"):  # whichever of the others are installed
        monkeypatch.setitem(sys.modules, each, None if each == package else sys)
    done = run("export", tmp_path / "m.safetensors", "-o", tmp_path / "out", "--format", "onnx")
    refused(done, f"error: this needs {package}: pip install 'alit[export]'")
    assert not (tmp_path / "out").exists()


def test_folder_that_is_none(tmp_path: Path) -> None:
    model().save_pretrained(tmp_path / "m.safetensors")
    (tmp_path / "file").touch()
    for output, message in (("file", "file exists"), ("file/out", "not a directory")):
        refused(run("export", tmp_path / "m.safetensors", "-o", tmp_path / output), message)


@pytest.mark.skipif(
    not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write anywhere"
)
def test_unwritable_folder(tmp_path: Path) -> None:
    """An unwritable output folder is reported before any program is made."""
    model().save_pretrained(tmp_path / "m.safetensors")
    (tmp_path / "out").mkdir(mode=0o500)
    done = run("export", tmp_path / "m.safetensors", "-o", tmp_path / "out")
    refused(done, "manifest.json: permission denied")


def test_modules_are_the_model() -> None:
    """The modules given to the exporter compute the model's results."""
    m = model(**RESIDUAL)
    with torch.no_grad():
        part = encoder(m, 5)
        assert [len(x) for x, _ in part.pairs] == list(BATCHES)
        for given, expected in part.pairs:
            assert torch.equal(Encoder(m, 5)(given), expected)
