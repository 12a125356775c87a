"""Adaptive-length image tokenization: an image in as few tokens as it needs."""

from alit_kernels import __version__ as __version__

from .alit_format import FormatError, ModelIdentity
from .base_config import DCTConfig, KLVAEConfig, VQGANConfig
from .checks import CheckpointError
from .combination import AllOf, AnyOf
from .config import AdaptiveTokenizerConfig, Quirks, TransformerConfig
from .criteria import (
    CodeError,
    ErrorCriterion,
    FixedLength,
    MaxL1,
    MinSSIM,
    RelativeL1,
    TokenAccuracy,
)
from .criterion import Criterion
from .encoding import Progress
from .features import Features
from .iteration import Iteration
from .losses import Stage1Loss, stage1_loss
from .prediction import Budget, Predicted
from .rollout import Rollout
from .sequence import TokenSequence
from .tokenizer import AdaptiveTokenizer

__all__ = [
    "AdaptiveTokenizer",
    "AdaptiveTokenizerConfig",
    "AllOf",
    "AnyOf",
    "Budget",
    "CheckpointError",
    "CodeError",
    "Criterion",
    "DCTConfig",
    "ErrorCriterion",
    "Features",
    "FixedLength",
    "FormatError",
    "Iteration",
    "KLVAEConfig",
    "MaxL1",
    "MinSSIM",
    "ModelIdentity",
    "Predicted",
    "Progress",
    "Quirks",
    "RelativeL1",
    "Rollout",
    "Stage1Loss",
    "TokenAccuracy",
    "TokenSequence",
    "TransformerConfig",
    "VQGANConfig",
    "stage1_loss",
]
