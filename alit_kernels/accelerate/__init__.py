"""Swap of attention modules and quantizers in other people's models for ours, in one call."""

from .find import accelerate
from .report import Left, Report, Swapped

__all__ = ["Left", "Report", "Swapped", "accelerate"]
