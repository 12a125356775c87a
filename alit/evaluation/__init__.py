"""Evaluation: reconstruction quality of each length, and what it has to beat."""

from .evaluate import Evaluation, LengthQuality, Quality, evaluate
from .learned import Networks, networks
from .metrics import thumbnail, thumbnail_side

__all__ = [
    "Evaluation",
    "LengthQuality",
    "Networks",
    "Quality",
    "evaluate",
    "networks",
    "thumbnail",
    "thumbnail_side",
]
