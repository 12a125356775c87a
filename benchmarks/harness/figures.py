"""Sections of the pages in docs/, in Markdown, made from results of ``benchmarks.studies``."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import torch

from alit_kernels._machine_code import Result
from alit_kernels.aot import read_results
from alit_kernels.attention.configurations import tile

from .outcome import table
from .timing import RESULTS

#: Attention's kernels: matrix products in a step of the main loop, and tensor-core operations per cycle by chip.
PRODUCTS = {"forward": 2, "backward_queries": 3, "backward_keys": 4}
RATES = {80: 2048, 90: 4096, 100: 8192}


def study(name: str) -> tuple[Any, str]:
    """Results in ``NAME.json``, and a line that names their machine and links to the file from a page in docs/."""
    content = json.loads((RESULTS / f"{name}.json").read_text())
    machine = content["machine"]
    instructions = f" ({machine['instructions']})" if "instructions" in machine else ""
    threads = f"{machine['threads']} thread" + "s" * (machine["threads"] != 1)
    line = (
        f"{machine['cpu']}{instructions}, {threads}, torch {machine['torch']}, {machine['date']};"
        f" [file](../benchmarks/results/{name}.json)."
    )
    return content["results"], line


def sdpa_context() -> str:
    found, line = study("sdpa_context")
    rows = [
        [
            name,
            f"{x['alone'] / 1e3:.1f}",
            f"{x['within'] / 1e3:.1f}",
            f"{x['alone'] / x['within']:.2f}",
        ]
        for name, x in found.items()
        if "tokens" in name
    ]
    head = ("", "torch's, ms", "within `fused_sdpa`, ms", "times as fast")
    return f"{table(head, 'lrrr', rows)}\n\n{line}"


def sdpa_overhead() -> str:
    """Sentence on the host time that ``fused_sdpa`` adds to calls that it passes on."""
    found, line = study("sdpa_context")
    passed = [x for name, x in found.items() if "tokens" not in name]
    others = [x for name, x in found.items() if name.startswith("another function")]
    passed = [x for x in passed if x not in others]

    def span(rows: Sequence[dict[str, float]], name: str) -> str:
        return f"{min(x[name] for x in rows):.1f} to {max(x[name] for x in rows):.1f}"

    return (
        f"On the host a call that is passed on costs {span(passed, 'added')} us more within the context, of which"
        f" {span(passed, 'of ours')} us are ours and the rest is what any such context of torch's costs; any other"
        f" function of torch {span(others, 'added')} us (medians; {line[:-1]})."
    )


def stops() -> str:
    found, line = study("stops")
    rows = []
    for name, x in found.items():
        if "stops" in x["forward"]:
            shares = [f"{x[k]['stops'] / x[k]['all pairs']:.2f}" for k in ("forward", "step")]
            masks = [f"{x[k]['torch, mask'] / x[k]['stops']:.2f}" for k in ("forward", "step")]
            rows.append([name, *shares, *masks])
    head = (
        "",
        "of all pairs: forward",
        "and backward",
        "torch's with a mask: forward",
        "and backward",
    )
    return f"{table(head, 'lrrrr', rows)}\n\n{line}"


def wide_heads() -> str:
    found, line = study("stops")
    rows = []
    for name, x in found.items():
        if "bmm" in x["forward"]:
            rows.append([name, *(f"{x[k]['bmm'] / x[k]['ours']:.2f}" for k in ("forward", "step"))])
    head = ("", "products written out, over ours: forward", "and backward")
    return f"{table(head, 'lrr', rows)}\n\n{line}"


def padding() -> str:
    found, line = study("padding")
    names = {"latents": "32 to 256 latents", "latents and image": "289 to 513 tokens"}
    rows, waste = [], []
    for kind, label in names.items():
        case = found[kind]
        waste.append(f"{case['padded / true work']:.2f}")
        for way in case["1 threads"]:
            base = "packed, separate" if way.endswith("separate") else "packed"
            cells = []
            for threads in ("1 threads", "2 threads"):
                seconds, ours = case[threads][way], case[threads][base]
                cells.append(f"{seconds:.3f}" + ("" if way == base else f" ({seconds / ours:.2f})"))
            shown = way.replace("packed", "packed (ours)") if way == base else way
            first = label if way == "packed" else ""
            rows.append([first, shown, *cells, f"{case['peak_megabytes'][way]:.0f}"])
    text = table(("", "", "1 thread", "2 threads", "peak MB"), "llrrr", rows)
    return f"{text}\n\nPadding makes {' and '.join(waste)} times the work at these lengths. {line}"


def instruction_sets() -> str:
    found, line = study("instruction_sets")
    (run,) = found["runs"]
    rows = []
    for x in run["search"]:
        faiss = f"{x['faiss ms']:.3g} ms, {x['faiss GFLOP/s']}"
        rows.append(
            [
                *(x["shape"], str(x["threads"]), f"{x['avx512 ms']:.3g} ms, {x['avx512 GFLOP/s']}"),
                *(str(x["avx2 GFLOP/s"]), str(x["baseline GFLOP/s"]), faiss),
                *(f"{x['eager ms']:.0f} ms", f"{x['ours MB']} / {x['eager MB']:.0f} MB"),
            ]
        )
    head = ("N x K x D", "threads", "ours, GFLOP/s", "AVX2, GFLOP/s", "baseline, GFLOP/s")
    head += ("FAISS `IndexFlatL2`, GFLOP/s", "eager", "memory, ours / eager")
    return f"{table(head, 'l' + 'r' * 7, rows)}\n\n{line.replace('1 thread, ', '')}"


def quantizer_step() -> str:
    found, line = study("instruction_sets")
    (run,) = found["runs"]
    rows = []
    for x in run["step"]:
        peers = (
            f"{x[f'{k} ms']:.0f} ms ({x[f'{k} / ours']:.0f} times)" for k in ("one-hot", "gather")
        )
        memory = f"{x['ours MB']} / {x['one-hot MB']:.0f} MB"
        rows.append([str(x["threads"]), f"{x['ours ms']:.3g} ms", *peers, memory])
    head = ("threads", "ours", "eager, one-hot", "eager, gather", "peak memory, ours / eager")
    return f"{table(head, 'rrrrr', rows)}\n\n{line.replace('1 thread, ', '')}"


def entropy_loss() -> str:
    found, line = study("entropy_loss")
    vectors, codes, channels = found["shape"].split(" x ")
    memory = {name: f"{value:.0f}" for name, value in found["peak MB"].items()}
    return (
        f"A training step of LlamaGen's quantizer with this loss, forward and backward, {vectors} vectors, {codes}"
        f" codes of {channels} channels, before and after `accelerate`: {found['times faster']} times as fast, with"
        f" {memory['accelerated']} MB at the peak instead of {memory['eager']} (medians in turns). {line}"
    )


def adaptive() -> str:
    """Table of the time per image of adaptive encoding against the published rule, and a line on ``encode_stream``."""
    found, line = study("adaptive-encode")
    names = {
        "lengths given": "lengths given", "CodeError": "code errors decide", "pixel L1": "pixel errors decide",
        "official": "the published rule, which runs and decodes every iteration for all",
    }  # fmt: skip
    seconds = found["wall"]["seconds_per_image"]
    rows = [
        [text, f"{seconds[name]:.2f} s", f"{seconds['official'] / seconds[name]:.2f}"]
        for name, text in names.items()
    ]
    mean = sum(found["lengths"]) / len(found["lengths"])
    stream, stream_line = study("adaptive-stream")
    ratio = stream["wall"]["times_faster_than_batches"]["stream"]
    return (
        f"{found['photos']} photographs in {mean:.0f} tokens on average, model `{found['size']}`, time for one image:"
        f"\n\n{table(('', 'time', 'times as fast as the published rule'), 'lrr', rows)}\n\n{line}\n\n"
        f"`encode_stream` bounds the memory; it was {ratio} times as fast as batches there. {stream_line}"
    )


def command_line() -> str:
    found, line = study("command_line")
    rows = [
        [f"`{x['command']}`", f"{x['seconds']:.1f} s", f"{x['slowest']:.1f} s"]
        for x in found["rows"]
    ]
    return f"{table(('command', 'median', 'slowest'), 'lrr', rows)}\n\n{line}"


def generation_packed() -> str:
    found, line = study("generation_packed")
    return (
        f"{found['samples']} samples of {found['mean_tokens']:.0f} tokens on average, the longest {found['longest']},"
        f" {found['in_flight']} at a time. Both draw the same tokens. Padded batches took"
        f" {found['padded_over_packed']['wall']:.2f} times as long as packed sampling, median of"
        f" {len(found['seconds']['wall']['packed'])} rounds (at least {found['lowest_ratio']['wall']:.2f}). {line}"
    )


def generation_causal() -> str:
    found, line = study("generation-causal")
    sharp, judge = found["sharp"], found["judge"]
    wrong = max(v for name, v in judge.items() if not name.startswith("reconstructions"))
    return (
        f"{found['images']} drawn shapes, of three kinds, three colors and two backgrounds, in"
        f" {found['mean_tokens']:.0f} tokens on average, {found['training_seconds'] / 60:.0f} minutes of training. A"
        f" judge takes {judge['reconstructions']:.1%} of their reconstructions for shapes, and at most {wrong:.1%} of"
        f" what it should refuse. Of {found['samples']} samples as the generator says, {found['plain']['valid']:.1%}"
        f" are shapes, and with `temperature={sharp['temperature']}, top_p={sharp['top_p']}`, chosen by that share,"
        f" {sharp['valid']:.1%}; {sharp['valid_and_of_the_class']:.1%} are shapes of the kind that was asked for, and"
        f" {sharp['different']} of the {found['samples']} differ. Their lengths differ from the data's by"
        f" {sharp['length_distance']:.1%} (total variation; parts of the data from each other by"
        f" {found['length_distance_of_halves']:.1%}). {line}"
    )


def generation_masked() -> str:
    found, line = study("generation-masked")
    sharp = found["sharp"]
    return (
        f"The masked kind learns more slowly: of {found['samples']} samples after {found['steps']} steps and"
        f" {found['training_seconds'] / 60:.0f} minutes {found['plain']['valid']:.1%} are shapes, and with"
        f" `temperature={sharp['temperature']}, steps={sharp['steps']}`, chosen by that share, {sharp['valid']:.1%};"
        f" {sharp['valid_and_of_the_class']:.1%} are of the kind that was asked for, and {sharp['different']} differ."
        f" Lengths differ from the data's by {sharp['length_distance']:.1%}. {line}"
    )


def cycles() -> str:
    (now, _), (before, _) = study("cycles"), study("cycles-before")
    rows = []
    for name, call in now["calls"].items():
        # Earlier counts of the search assumed a share of vectors in doubt, which is part of their name.
        alike = [x for x in before["calls"] if x == name or x.startswith(f"{name}, ")]
        old = max((before["calls"][x] for x in alike), key=lambda x: x["all"], default=None)
        counts = ["" if x is None else _count(x["all"]) for x in (old, call)]
        rows.append([name, call["unit"].removeprefix("cycles of a "), *counts])
    found = now["rows"]["(8192, 1024, 256, 0.0, 'normal', False)"]
    return (
        f"{table(('call, sm_90', 'cycles of', 'before', 'now'), 'llrr', rows)}\n\n"
        f'"Before" is [the count](../benchmarks/results/cycles-before.json) of the kernels as they were. In the search'
        f" of 8192 vectors among 1024 codes of 256 channels {found['two']} vectors compare two codes today,"
        f" {found['many']} more than two or in float64, and {found['doubt']} of these scan cells of the codebook;"
        f" [the result](../benchmarks/results/cycles.json) has these numbers, which a search in Triton's"
        " interpreter counts."
    )


def _count(value: float) -> str:
    return f"{value:,.0f}" if value >= 10 else f"{value:.2f}"


def host() -> str:
    """Tables of host times and launches of calls, and of a training step of ``base``, measured with the null CUDA."""
    content = json.loads((RESULTS / "host.json").read_text())
    rows = []
    for name, call in content["calls"].items():
        cells = [name, call["peer"]]
        for kind in ("forward", "forward and backward"):
            both = [call[kind][x] for x in ("ours", "theirs") if x in call.get(kind, {})]
            cells.append(" / ".join(f"{x['us']:.1f}" for x in both))
            cells.append(" / ".join(str(x["launches"]) for x in both))
        rows.append(cells)
    head = ("call", "beside", "forward, us", "launches", "and backward, us", "launches")
    step = [
        [name, f"{x['ms']:.0f} ms", f"{x['launches']:,}", str(x["waits"])]
        for name, x in content["step"].items()
    ]
    steps = table(("training step of `base`", "host", "launches", "waits"), "lrrr", step)
    machine = content["machine"]
    line = (
        f"{machine['cpu']}, torch {machine['torch']}, Triton {content['triton']}, {machine['date']}"
    )
    return (
        f"Ours / what users of torch would write:\n\n{table(head, 'llrrrr', rows)}\n\n{steps}\n\n"
        f"{line}; [file](../benchmarks/results/host.json)."
    )


def machine_code() -> str:
    """Table of the cycles of one step of the main loop of attention's kernels, packed, bfloat16, by chip."""
    (path,) = RESULTS.glob("aot-triton-*.json")
    rows = []
    for build in read_results(path):
        kernel = build.kernel.rpartition(".")[2].removesuffix("_kernel")
        channels = {"d=64 bf16": 64, "d=128 bf16": 128}.get(build.label)
        if (
            ".attention." in build.kernel
            and channels
            and build.arch in RATES
            and kernel in PRODUCTS
        ):
            place = list(PRODUCTS).index(kernel), build.arch, channels
            rows.append((place, _step(kernel, channels, build)))
    head = (
        "kernel",
        "chip",
        "step",
        "registers",
        "resident warps",
        "issue",
        "exponentials",
        "memory",
    )
    text = table((*head, "alu", "products", "bound"), "lllrrrrrrrl", [x for _, x in sorted(rows)])
    return f"{text}\n\nMade of [the file of all builds](../benchmarks/results/{path.name})."


def _step(kernel: str, channels: int, build: Result) -> list[str]:
    launch, cycles = tile(kernel, channels, torch.bfloat16, build.arch), build.hot_loop_cycles
    operations = 2 * PRODUCTS[kernel] * launch.rows * launch.columns * channels
    products = operations // RATES[build.arch]
    # A scheduler may run two warps of a program; the cycles are counted for one warp.
    warps = round(products / cycles["matrix"]) if cycles.get("matrix") else 1
    own = {name: warps * cycles.get(name, 0) for name in ("issue", "special", "memory", "alu")}
    busiest = max([*own.items(), ("products", products)], key=lambda pair: pair[1])[0]
    return [
        f"{kernel.replace('_', ' ')}, D = {channels}",
        *(f"sm_{build.arch}", f"{launch.rows} x {launch.columns}", str(build.registers)),
        *(f"{64 * build.occupancy:.0f}", *map(str, own.values()), str(products)),
        {"special": "exponentials"}.get(busiest, busiest),
    ]
