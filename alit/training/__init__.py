"""Training: stage 1 (base tokens) and 2 (pixels), one process or many, resumable bit for bit."""

from .config import TrainingConfig
from .log import NotFinite
from .signals import Interrupted
from .trainer import Result, train

__all__ = ["Interrupted", "NotFinite", "Result", "TrainingConfig", "train"]
