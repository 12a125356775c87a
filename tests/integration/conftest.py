"""``make integration`` installs other people's packages and sets ALIT_INTEGRATION; else nothing here is collected."""

from __future__ import annotations

import importlib.util
import os

import torch

ASKED_FOR = bool(os.environ.get("ALIT_INTEGRATION"))
collect_ignore_glob = [] if ASKED_FOR else ["test_*.py"]


def _declare_operators() -> torch.library.Library | None:
    """Lets torchvision, which timm and transformers import, load beside another build of torch than its own.

    Its compiled library is for one build (the index has that for CUDA) and does not load beside others, which it passes
    over in silence, but for two operators that it then describes to the compiler and that have to be declared. None of
    the models here calls one.
    """
    if importlib.util.find_spec("torchvision") is None:
        return None
    try:
        import torchvision  # noqa: F401
    except RuntimeError as error:
        if "torchvision::nms does not exist" not in str(error):
            raise
    else:
        return None
    library = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return library


#: Declares as long as it lives.
LIBRARY = _declare_operators() if ASKED_FOR else None
