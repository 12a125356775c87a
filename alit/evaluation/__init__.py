"""Evaluation: reconstruction quality of each length, and what it has to beat."""

from .evaluate import Evaluation, LengthQuality, Quality, evaluate
from .thumbnail import thumbnail, thumbnail_side

__all__ = ["Evaluation", "LengthQuality", "Quality", "evaluate", "thumbnail", "thumbnail_side"]
