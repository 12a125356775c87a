"""Analysis of a model: what its token counts, errors and attention maps correlate with."""

from .analyze import Analysis, analyze
from .complexity import THRESHOLDS, Complexity
from .familiarity import Familiarity
from .inputs import ImageSet, read_images, read_scores, read_segments
from .rollouts import errors
from .specialization import Specialization
from .statistics import Interval, spearman

__all__ = [
    "THRESHOLDS",
    "Analysis",
    "Complexity",
    "Familiarity",
    "ImageSet",
    "Interval",
    "Specialization",
    "analyze",
    "errors",
    "read_images",
    "read_scores",
    "read_segments",
    "spearman",
]
