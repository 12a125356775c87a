"""Analysis: what the number of tokens, the errors and the attention of a model follow."""

from .analyze import Analysis, analyze
from .complexity import THRESHOLDS, Complexity
from .familiarity import Familiarity
from .inputs import Pictures, read_pictures, read_scores, read_segments
from .rollouts import errors
from .specialization import Specialization
from .statistics import Interval, spearman

__all__ = [
    "THRESHOLDS",
    "Analysis",
    "Complexity",
    "Familiarity",
    "Interval",
    "Pictures",
    "Specialization",
    "analyze",
    "errors",
    "read_pictures",
    "read_scores",
    "read_segments",
    "spearman",
]
