"""Evaluation: reconstruction quality at each length, linear probes of tokens, and the baselines they have to beat."""

from .calibration import Calibration, calibrate, usual_limits
from .evaluate import evaluate
from .labeled import Labeled, labeled
from .learned import Networks, classifier, networks
from .metrics import thumbnail, thumbnail_side, tokens_needed
from .probe import LengthAccuracy, Probe, probe
from .results import Evaluation, LengthQuality, Quality
from .simple import Drawing, drawings

__all__ = [
    "Calibration",
    "Drawing",
    "Evaluation",
    "Labeled",
    "LengthAccuracy",
    "LengthQuality",
    "Networks",
    "Probe",
    "Quality",
    "calibrate",
    "classifier",
    "drawings",
    "evaluate",
    "labeled",
    "networks",
    "probe",
    "thumbnail",
    "thumbnail_side",
    "tokens_needed",
    "usual_limits",
]
