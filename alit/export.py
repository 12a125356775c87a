"""Export of programs that run without alit: files of ``torch.export``, ONNX, AOTInductor."""

from __future__ import annotations

import importlib
import json
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from importlib import metadata
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.export import ExportedProgram

from .atomic_files import check_replaceable, replacing
from .checks import check_choice, check_number
from .console import reported
from .programs import Part, decoder, encoder, exported, step_of
from .tokenizer import AdaptiveTokenizer

#: Largest difference of a pixel from the model's, pixels in [0, 1].
PIXELS_WITHIN = 1e-4
MANIFEST = "manifest.json"


def write(
    model: AdaptiveTokenizer, folder: Path, format: str, lengths: Sequence[int]
) -> dict[str, float]:
    """Write an encoder for each length, the decoder, and a manifest.

    Every program is loaded again and tested before any is put in place; the manifest comes last.

    Args:
        model: on the CPU, in evaluation mode.
        folder: made where it is missing.
        format: one of ``FORMATS``.
        lengths: of the encoders.

    Returns:
        Largest difference of each file's results from the model's, by file name (0 for indices).

    Raises:
        ValueError: an unknown format, a length out of range, a model of which no program can be made, a program whose
            results differ from the model's.
        OSError: what cannot be written.
        ModuleNotFoundError: a package that the format needs.
    """
    check_choice("format", format, tuple(FORMATS))
    lengths = sorted(set(lengths))
    check_exportable(model, lengths)
    chosen = FORMATS[format]
    chosen.check()
    differences: dict[str, float] = {}
    folder.mkdir(parents=True, exist_ok=True)
    with (
        replacing(folder / MANIFEST) as manifest,
        TemporaryDirectory() as scratch,
        torch.no_grad(),
        warnings.catch_warnings(),
    ):
        # torch 2.13 copies its own tree specifications in a way that it deprecates.
        warnings.filterwarnings("ignore", r"`isinstance\(treespec", FutureWarning)
        files = {f"encoder-{length}": f"encoder-{length}{chosen.suffix}" for length in lengths}
        files["decoder"] = f"decoder{chosen.suffix}"
        for file in files.values():
            check_replaceable(folder / file)
        makers = [*(partial(encoder, model, length) for length in lengths), partial(decoder, model)]
        for make in reported(makers, "making programs", len(makers), "programs"):
            part = make()
            written = Path(scratch, files[part.name])
            chosen.save(exported(part), written, part)
            differences[written.name] = difference(chosen.load(written), part)
        for file in differences:
            with replacing(folder / file) as target:
                target.write_bytes(Path(scratch, file).read_bytes())
        about = described(model, format, lengths, files)
        manifest.write_text(json.dumps(about, indent=2) + "\n")
    return differences


def check_exportable(model: AdaptiveTokenizer, lengths: Sequence[int]) -> None:
    """Check that programs can be made of a model: it draws nothing at random, has sizes that do not depend on the
    image, gives indices, and has such lengths; raises ``ValueError`` that names the option.
    """
    config, quirks = model.config, model.config.quirks
    if config.bottleneck != "quantized" or quirks.unquantized_tokens:
        option = "quirks.unquantized_tokens" if quirks.unquantized_tokens else "bottleneck"
        raise ValueError(f"{option}: a program gives indices, this model gives continuous tokens")
    if config.halting == "drop":
        raise ValueError("halting: 'drop' makes sizes depend on the image, which no program can")
    for option, draws in (
        ("random_halting_in_evaluation", config.halting != "off"),
        ("random_posterior_in_evaluation", config.base.kind == "vae"),
    ):
        if draws and getattr(quirks, option):
            raise ValueError(f"quirks.{option}: this model draws at random, which no program does")
    if not lengths:
        raise ValueError("lengths: expected at least one, got none")
    for length in lengths:
        check_number("lengths", length, int, 1, config.max_tokens)


def difference(function: Callable[[Tensor], Tensor], part: Part) -> float:
    """Largest absolute difference of a program's results from the model's.

    Raises:
        ValueError: another shape, another index, or a pixel that differs by more than ``PIXELS_WITHIN``.
    """
    largest = 0.0
    for given, expected in part.pairs:
        found = function(given)
        if (found.shape, found.dtype) != (expected.shape, expected.dtype):
            raise ValueError(
                f"{part.name}: expected {expected.dtype} {tuple(expected.shape)} as of the model,"
                f" got {found.dtype} {tuple(found.shape)}"
            )
        apart = float((found - expected).abs().max())
        within = PIXELS_WITHIN if expected.is_floating_point() else 0
        if not apart <= within:  # NaN neither
            raise ValueError(
                f"{part.name}: {part.gives} differ from the model's by up to {apart:.3g}, expected at most {within:g}"
            )
        largest = max(largest, apart)
    return largest


def described(
    model: AdaptiveTokenizer, format: str, lengths: Sequence[int], files: dict[str, str]
) -> dict[str, Any]:
    """Content of the manifest, for JSON."""
    identity = model.identity()
    packages = "alit", "torch", *FORMATS[format].packages
    return {
        "format": format,
        "model": identity.fingerprint.hex(),
        "image_size": list(identity.image_size),
        "codebook_size": identity.codebook_size,
        "bits_per_token": identity.bits,
        "encoders": {str(length): files[f"encoder-{length}"] for length in lengths},
        "decoder": files["decoder"],
        "decoder_lengths": {"step": step_of(model), "most": model.config.max_tokens},
        "versions": {package: metadata.version(package) for package in packages},
    }


class Format(NamedTuple):
    """File format of programs.

    Attributes:
        packages: packages that writing needs beside torch.
        compiles: whether writing needs a C++ compiler.
        save, load: functions that write and read a file; ``load`` returns a function of one tensor.
    """

    suffix: str
    save: Callable[[ExportedProgram, Path, Part], Any]
    load: Callable[[Path], Callable[[Tensor], Tensor]]
    packages: tuple[str, ...] = ()
    compiles: bool = False

    def check(self) -> None:
        """Raise ``ModuleNotFoundError`` if a package is missing, ``ValueError`` if the compiler is."""
        for package in self.packages:
            importlib.import_module(package)
        if self.compiles:
            _check_compiler()


def _check_compiler() -> None:
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler as error:
        raise ValueError(
            "format: aoti needs a C++ compiler, and none was found; install g++, or name one in CXX"
        ) from error


def _save_onnx(program: ExportedProgram, path: Path, part: Part) -> None:
    torch.onnx.export(
        program,
        f=path,
        dynamo=True,
        external_data=False,
        verbose=False,
        input_names=[part.takes],
        output_names=[part.gives],
    )


def _load_onnx(path: Path) -> Callable[[Tensor], Tensor]:
    runtime: Any = importlib.import_module("onnxruntime")
    session = runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    (taken,) = session.get_inputs()
    return lambda x: torch.from_numpy(session.run(None, {taken.name: x.numpy()})[0])


def _save_aoti(program: ExportedProgram, path: Path, _: Part) -> None:
    from torch._inductor import aoti_compile_and_package

    aoti_compile_and_package(program, package_path=str(path))


def _load_aoti(path: Path) -> Callable[[Tensor], Tensor]:
    from torch._inductor import aoti_load_package

    return aoti_load_package(str(path))


FORMATS = {
    "pt2": Format(
        ".pt2",
        lambda program, path, _: torch.export.save(program, path),
        lambda path: torch.export.load(path).module(),
    ),
    "onnx": Format(".onnx", _save_onnx, _load_onnx, packages=("onnx", "onnxscript", "onnxruntime")),
    "aoti": Format(".aoti.pt2", _save_aoti, _load_aoti, compiles=True),
}
