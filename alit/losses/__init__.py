"""Training losses."""

from .stage1 import IterationLoss, Stage1Loss, stage1_loss

__all__ = ["IterationLoss", "Stage1Loss", "stage1_loss"]
