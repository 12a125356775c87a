"""What a tokenizer does with photographs that come with scikit-image: a page (``show``), or training (``live``)."""

from .photographs import PHOTOGRAPHS, photographs

__all__ = ["PHOTOGRAPHS", "photographs"]
