"""New images: a transformer over token sequences, whose samples end where they want to (``alit generate``)."""

from .config import GeneratorConfig
from .model import Generator
from .sampling import Samples, sample

__all__ = ["Generator", "GeneratorConfig", "Samples", "sample"]
