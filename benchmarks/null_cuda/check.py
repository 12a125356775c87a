"""What can be held over the null CUDA beside times: ``make host`` runs it first.

- The launcher gives the driver what Triton gives it, byte for byte, in every launch of every op.
- Plans call the extension's CUDA kernels as Python does.
- A training step is captured into a CUDA graph, and a step that waits for the device is refused.
- Rollouts, halting and both stages run on the GPU's branches. (Encoding asks for lengths, which nothing computes.)
"""

from __future__ import annotations

import argparse
import ctypes
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from . import driver


def launches_are_tritons() -> str:
    """Every launch three times: by Triton, by the launcher as it learns it, by the launcher as it knows it."""
    from alit_kernels import _plans, _triton

    from .cases import cases

    launcher, seen = _triton._launcher(), set()
    assert launcher is not _triton.through_triton, "the launcher is not in use"

    def compared(kernel: Any, grid: tuple[int, ...], **arguments: Any) -> Any:
        compiled = _triton.through_triton(kernel, grid, **arguments)
        sizes = parameter_bytes(compiled.asm["ptx"])
        expected = taken(sizes, lambda: _triton.through_triton(kernel, grid, **arguments))
        launcher(kernel, grid, **arguments)
        hits = launcher.counts()[0]
        found = taken(sizes, lambda: launcher(kernel, grid, **arguments))
        assert launcher.counts()[0] == hits + 1, f"{kernel.__name__} was not launched again"
        assert found == expected, f"{kernel.__name__}: {found}, by Triton {expected}"
        seen.add(kernel.__name__)
        return compiled

    def unplanned(function: Callable[..., Any], values: Any, _: object) -> tuple[Any, None]:
        return function(*values), None

    with (
        mock.patch.object(_triton, "_launcher", return_value=compared),
        mock.patch.object(_plans, "watched", unplanned),
    ):
        for case in cases():
            x = case.leaf().requires_grad_(case.learns)
            y = case.ours(x)
            if case.learns:
                y.backward(torch.ones_like(y))
    return f"{len(seen)} kernels are launched as Triton launches them"


def plans_call_the_extension_as_python_does() -> str:
    """Where Python passed a number, plans pass the same one; where it passed a tensor, an address."""
    import alit_kernels as ak
    from alit_kernels import _plans
    from alit_kernels._core import extension

    prepare, seen, kept = _plans._prepared_call, set(), []
    entry_point = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_int64))

    def prepared(name: str, arguments: tuple[Any, ...], device: int, *rest: Any) -> Any:
        stream = torch.cuda.current_stream(device).cuda_stream
        expected = [stream, device, 0, *arguments]
        is_tensor = [isinstance(x, torch.Tensor) for x in expected]
        numbers = [0 if tensor else x for x, tensor in zip(expected, is_tensor, strict=True)]

        def taken(given: Any) -> int:  # 0: as expected
            found = given[: len(numbers)]
            seen.add(name)
            return any(
                value == 0 if tensor else value != number
                for value, number, tensor in zip(found, numbers, is_tensor, strict=True)
            )

        kept.append(entry_point(taken))
        address = ctypes.cast(kept[-1], ctypes.c_void_p).value
        *kernel, _, sizes, threads, shared, values, addresses = prepare(
            name, arguments, device, *rest
        )
        return *kernel, address, sizes, threads, shared, values, addresses

    x, rows = (torch.zeros(n, 5, 8, device="cuda", requires_grad=True) for n in (3, 15))
    lengths, keep = torch.zeros(3, device="cuda").int(), torch.ones(15, device="cuda") > 0
    with mock.patch.object(_plans, "_prepared_call", prepared):
        for _ in range(2):
            offsets = ak.cumulative_offsets(lengths)
            for y in (
                ak.pack(x, lengths, capacity=9)[0],
                ak.unpack(rows, offsets, max_length=4, fill=2.0),
                ak.compact(rows, offsets, keep, capacity=9)[0],
                ak.append(rows, offsets, x, capacity=30)[0],
                ak.tail_mask(x, lengths, rows[0, 0]),
            ):
                y.backward(torch.ones_like(y))
    assert seen == {name.removeprefix("alit_cuda_") for name in extension().unpacked}
    return f"plans call {len(seen)} functions of the extension as Python calls them"


SIZES = {"64": 8, "32": 4, "16": 2, "8": 1}


def parameter_bytes(ptx: str) -> list[int]:
    entry = ptx[ptx.index(".entry") :]
    lines = [x for x in entry[: entry.index(")")].splitlines() if ".param" in x]
    return [SIZES[line.split(".param", 1)[1].split()[0].lstrip(".usbf")] for line in lines]


def taken(sizes: list[int], launch: Callable[[], object]) -> list[int]:
    """What the driver was given: function, grid, threads, shared memory, stream, parameters."""
    library = driver.library()
    library.null_cuda_record_parameters(len(sizes))
    launch()
    latest = library.null_cuda_latest()
    library.null_cuda_record_parameters(0)
    parameters = [latest[7 + i] & ((1 << 8 * size) - 1) for i, size in enumerate(sizes)]
    return [*(latest[i] for i in range(7)), *parameters]


def a_step_is_captured() -> str:
    from benchmarks.suites.test_stage1_step import Case, contender

    case = Case("tiny", 2, torch.bfloat16)
    step = contender("ours, captured", *case.prepared(False))
    with case.autocast():
        step()
        before = driver.launches()
        step()
    return f"a captured step of tiny is replayed in {driver.launches() - before} launches"


def a_step_that_waits_is_refused() -> str:
    from alit.training.cuda_graph import GradientGraph

    layer = torch.nn.Linear(4, 4).cuda()

    def waits(x: torch.Tensor) -> dict[str, torch.Tensor]:
        loss = layer(x).sum()
        loss.backward()
        return {"loss": loss.detach() * loss.item()}

    try:
        GradientGraph(layer, waits, torch.zeros(2, 4, device="cuda"))
    except (RuntimeError, torch.AcceleratorError) as error:
        return f"a step that waits is refused: {str(error).splitlines()[0]}"
    raise AssertionError("a step that waits was captured")


def other_paths_run() -> str:
    from alit import AdaptiveTokenizer, TransformerConfig
    from alit.training import NotFinite, TrainingConfig, train

    images = torch.zeros(2, 3, 64, 64)
    size = {"image_size": (64, 64), "latents_per_iteration": 4, "iterations": 2}
    small = dict.fromkeys(("encoder", "decoder"), TransformerConfig(64, 2, 2))
    options = {"size": "nano", "base": "dct", "image_size": 64, "iterations": 2}
    for halting in ("off", "drop"):
        model = AdaptiveTokenizer.from_size("nano", base="dct", halting=halting, **size, **small)
        model = model.cuda().eval()
        with torch.no_grad():
            for _ in model.rollout(images.cuda()):
                pass
    for stage in ("1", "2"):
        config = TrainingConfig(
            **{"stage": stage, "steps": 2, "batch_size": 2, "device": "cuda", "model": options},
            **{"tensorboard": False, "perceptual": "off", "output": None},
        )
        with suppress(
            NotFinite
        ):  # values that nothing has computed; found when the last step has been taken
            train(config, images=images)
    return "rollouts, with halting that drops tokens too, and both stages run"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.null_cuda.check")
    parser.add_argument("--core", type=Path, help="alit_kernels._C for the null CUDA")
    driver.prepare(parser.parse_args().core)
    for check in (
        launches_are_tritons,
        plans_call_the_extension_as_python_does,
        a_step_is_captured,
        a_step_that_waits_is_refused,
        other_paths_run,
    ):
        print(check(), flush=True)
    if missing := driver.unknown():
        raise SystemExit(f"the null CUDA has no body for {', '.join(missing)}, which was called")


if __name__ == "__main__":
    main()
