"""Evaluation: reconstruction quality of each length, and what it has to beat."""

from .calibration import Calibration, calibrate, usual_limits
from .evaluate import evaluate
from .learned import Networks, classifier, networks
from .metrics import thumbnail, thumbnail_side
from .results import Evaluation, LengthQuality, Quality
from .simple import Drawing, drawings

__all__ = [
    "Calibration",
    "Drawing",
    "Evaluation",
    "LengthQuality",
    "Networks",
    "Quality",
    "calibrate",
    "classifier",
    "drawings",
    "evaluate",
    "networks",
    "thumbnail",
    "thumbnail_side",
    "usual_limits",
]
