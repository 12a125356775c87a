"""Image generation: a transformer over token sequences that also decides their length (``alit generate``)."""

from .config import GeneratorConfig
from .model import Generator
from .sampling import Samples, sample

__all__ = ["Generator", "GeneratorConfig", "Samples", "sample"]
