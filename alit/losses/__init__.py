"""Training losses."""

from ..pixel_errors import structural_similarity
from .features import FeatureDistance
from .gan import PatchDiscriminator, adaptive_weight, hinge_loss
from .perceptual import Perceptual
from .stage1 import IterationLoss, Stage1Loss, stage1_loss
from .stage2 import Reconstruction, Weights, discriminator_loss, pixel_loss

__all__ = [
    "FeatureDistance",
    "IterationLoss",
    "PatchDiscriminator",
    "Perceptual",
    "Reconstruction",
    "Stage1Loss",
    "Weights",
    "adaptive_weight",
    "discriminator_loss",
    "hinge_loss",
    "pixel_loss",
    "stage1_loss",
    "structural_similarity",
]
