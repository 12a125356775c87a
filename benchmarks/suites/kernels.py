"""Run one call of ours in each of five contests between profiler marks, for ``ncu``."""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch

from ..harness.contest import DEVICE, Contest
from . import test_attention, test_codebooks, test_ragged, test_soft_codebook

#: Name -> function that makes its contest; True: small.
CONTESTS: dict[str, Callable[[bool], Contest]] = {
    "varlen_attention": lambda small: test_attention.contest(
        (33, 7) if small else test_attention.MIXED, step=True
    ),
    "nearest_codeword": lambda small: test_codebooks.search(
        test_codebooks.QUICK if small else test_codebooks.SEARCHES[2]
    ),
    "codebook_statistics": lambda small: test_codebooks.statistics(
        test_codebooks.QUICK if small else test_codebooks.SEARCHES[0]
    ),
    "soft_codebook": lambda small: test_soft_codebook.contest(
        test_soft_codebook.QUICK if small else test_soft_codebook.CASE
    ),
    "unpack": lambda small: test_ragged.contest("unpack", test_ragged.lengths_of(small)),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.suites.kernels", description=__doc__
    )
    parser.add_argument("--rehearsal", action="store_true", help="small shapes")
    small = parser.parse_args().rehearsal
    for name, contest in CONTESTS.items():
        launch = contest(small).prepare["ours"]()
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
