"""Case run by continuous integration: a step of vector-quantize-pytorch's quantizer before and after ``accelerate``."""

from __future__ import annotations

import copy

import torch
from vector_quantize_pytorch import VectorQuantize

import alit_kernels as ak
from tests.helpers.swapped import compare, counted, step


def test_before_and_after() -> None:
    torch.manual_seed(0)
    theirs = VectorQuantize(dim=16, codebook_size=64)
    theirs._codebook.embed.normal_()
    theirs._codebook.embed_avg.copy_(theirs._codebook.embed)
    ours = copy.deepcopy(theirs)
    assert len(ak.accelerate(ours, strict=True).swapped) == 1
    x = torch.randn(4, 32, 16)
    for training in (True, False):
        with counted() as calls:
            found = step(ours.train(training), x)
        assert calls
        compare(found, step(theirs.train(training), x))
        compare(list(ours.state_dict().values()), list(theirs.state_dict().values()))
