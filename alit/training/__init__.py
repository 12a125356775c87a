"""Training loops."""

from .stage1 import Stage1Options, train_stage1

__all__ = ["Stage1Options", "train_stage1"]
