"""One launch of every main kernel, at benchmark shapes, between profiler marks: what ``ncu`` looks at."""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch

import alit_kernels as ak
from alit_kernels.attention import cases as attention_cases
from alit_kernels.soft_codebook import cases as soft_cases
from alit_kernels.vector_quantize import cases as codebook_cases

from .contest import DEVICE


def launches(small: bool) -> dict[str, Callable[[], object]]:
    """Name -> forward and backward of one op."""
    dtype = torch.bfloat16 if DEVICE == "cuda" else torch.float32
    attention = (
        attention_cases.Case((33, 7), 2, 64) if small else attention_cases.BENCHMARK_CASES[-1]
    )
    codes = codebook_cases.Case(64, 32, 12) if small else codebook_cases.BENCHMARK_CASES[0]
    wide = codebook_cases.Case(64, 32, 24) if small else codebook_cases.BENCHMARK_CASES[-1]
    soft = soft_cases.Case(32, 16, 8) if small else soft_cases.BENCHMARK_CASES[0]
    q, k, v, offsets, *_ = attention_cases.make(attention, dtype=dtype, device=DEVICE)
    z, codebook, _ = codebook_cases.make(codes, device=DEVICE)
    wide_z, wide_codebook, _ = codebook_cases.make(wide, device=DEVICE)
    logits, base, target = soft_cases.make(soft, device=DEVICE)
    lengths = offsets.diff()
    for leaf in (q, k, v, z, codebook, logits, base):
        leaf.requires_grad_()

    def varlen_attention() -> object:
        out = ak.varlen_attention(q, k, v, offsets, max_length=max(attention.lengths))
        assert isinstance(out, torch.Tensor)
        return torch.autograd.grad(out, (q, k, v), torch.ones_like(out))

    def vector_quantize() -> object:
        return torch.autograd.grad(ak.vector_quantize(z, codebook).loss, (z, codebook))

    def soft_codebook() -> object:
        result = ak.soft_codebook(logits, base, target)
        return torch.autograd.grad(result.code.sum() + result.nll.sum(), (logits, base))

    def ragged() -> object:
        padded = ak.unpack(q.detach(), offsets, max_length=max(attention.lengths))
        return ak.pack(padded, lengths, capacity=len(q))

    return {
        "varlen_attention": varlen_attention,
        "vector_quantize": vector_quantize,
        "nearest_codeword": lambda: ak.nearest_codeword(wide_z, wide_codebook),
        "soft_codebook": soft_codebook,
        "ragged": ragged,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.harness.kernels", description=__doc__
    )
    parser.add_argument("--rehearsal", action="store_true", help="small shapes")
    for name, launch in launches(parser.parse_args().rehearsal).items():
        launch()  # compiles
        if DEVICE == "cuda":
            torch.cuda.synchronize()
            torch.cuda.profiler.start()
            launch()
            torch.cuda.synchronize()
            torch.cuda.profiler.stop()
        print(name)


if __name__ == "__main__":
    main()
