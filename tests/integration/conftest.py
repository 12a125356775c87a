"""Collect these tests only if ALIT_INTEGRATION is set, as by ``make integration``, which installs the packages."""

from __future__ import annotations

import importlib.util
import os

import torch

ASKED_FOR = bool(os.environ.get("ALIT_INTEGRATION"))
collect_ignore_glob = [] if ASKED_FOR else ["test_*.py"]


def _declare_operators() -> torch.library.Library | None:
    """Make torchvision, which timm and transformers import, loadable with another build of torch than its own.

    Its compiled library is for one build of torch (that for CUDA on the index) and silently does not load with others;
    but it then registers fake kernels of two operators, which have to be declared. No model here calls them.
    Returns the library that declares them; None if that is not needed.
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


#: Keeps the declarations alive.
LIBRARY = _declare_operators() if ASKED_FOR else None
