"""Token files of the small model, and generators of its tokens."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from alit import TokenSequence
from alit.generation import Generator, GeneratorConfig
from tests.helpers.models import model

#: Options of the small model: a codebook for each iteration of 3 tokens.
TOKENIZER: dict[str, Any] = {"codebooks": "each", "recurrence": "residual"}
OPTIONS: dict[str, Any] = {"width": 32, "layers": 2, "heads": 2}


def generator(classes: tuple[str, ...] = (), **options: Any) -> Generator:
    """Generator with random weights large enough to matter, whose training lengths were 3 to 12."""
    config = GeneratorConfig.of(model(**TOKENIZER), {**OPTIONS, **options})
    torch.manual_seed(3)
    found = Generator(replace(config, classes=classes)).eval()
    with torch.no_grad():
        for parameter in found.parameters():
            if parameter.ndim >= 2:
                parameter.normal_(std=0.3)
        found.lengths[:, 3:] = torch.arange(1.0, 11.0)
    return found


def sequences(count: int, seed: int = 0) -> TokenSequence:
    """``count`` sequences of 1 to 12 random tokens."""
    random = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 13, (count,), generator=random)
    return TokenSequence(lengths, torch.randint(32, (int(lengths.sum()),), generator=random))


def write(path: Path, tokens: TokenSequence, **about: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(tokens.to_bytes(model(**TOKENIZER).identity(), **about))
