"""Configuration of a generator: the tokens that it models, and its size."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from ..alit_format import ModelIdentity
from ..base_config import MAX_SIZE, Codes, Size
from ..checks import MAX_JSON, Checked, Range, build, check_choice, parse, shown
from ..tokenizer import AdaptiveTokenizer

#: Fields that a user chooses; the others follow from tokenizer and data.
OPTIONS = ("causal", "width", "layers", "heads")


@dataclass(frozen=True)
class GeneratorConfig(Checked):
    """Configuration of a generator.

    Attributes:
        fingerprint: of the tokenizer whose tokens it models, in 32 hexadecimal digits.
        codebook_size: of that tokenizer.
        image_size: height and width of its images in pixels.
        max_tokens: most tokens of an image.
        codebook_span: positions that share a codebook: those of an iteration, or all.
        classes: their names; empty if it is unconditional.
        causal: True: tokens one after another, and an end; False: all at once, masked tokens are filled in.
        width, layers, heads: of the transformer.

    Raises:
        ValueError: a field of another type or out of range.
    """

    fingerprint: str
    codebook_size: Codes
    image_size: Annotated[tuple[int, ...], Range(1, MAX_SIZE)]
    max_tokens: Size
    codebook_span: Size
    classes: tuple[str, ...] = ()
    causal: bool = True
    width: Size = 256
    layers: Annotated[int, Range(1, 128)] = 6
    heads: Size = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.fingerprint, str) or not re.fullmatch(
            "[0-9a-f]{32}", self.fingerprint
        ):
            raise ValueError(
                f"fingerprint: expected 32 hexadecimal digits, got {shown(self.fingerprint)}"
            )
        if len(self.image_size) != 2:
            raise ValueError(f"image_size: expected height and width, got {self.image_size}")
        if self.width % self.heads:
            raise ValueError(f"heads: expected a divisor of width {self.width}, got {self.heads}")
        if len(set(self.classes)) < len(self.classes) or "" in self.classes:
            raise ValueError(f"classes: expected different names, got {shown(self.classes)}")
        if len(self.to_json()) > MAX_JSON:
            raise ValueError(f"classes: expected names of at most {MAX_JSON} characters in all")

    @classmethod
    def of(cls, tokenizer: AdaptiveTokenizer, options: Mapping[str, Any]) -> GeneratorConfig:
        """Configuration of an unconditional generator of a tokenizer's tokens.

        Args:
            options: any of ``causal``, ``width``, ``layers`` and ``heads``.

        Raises:
            ValueError: an unknown option, a value that it does not take; a tokenizer without a codebook.
        """
        config = tokenizer.config
        if config.bottleneck != "quantized" or config.quirks.unquantized_tokens:
            raise ValueError(
                f"tokenizer: expected one that gives indices, got a {config.bottleneck} one"
            )
        for name in options:
            check_choice("generator", name, OPTIONS)
        identity = tokenizer.identity()
        each = config.codebooks == "each"
        fields = {
            "fingerprint": identity.fingerprint.hex(),
            "codebook_size": identity.codebook_size,
            "image_size": identity.image_size,
            "max_tokens": config.max_tokens,
            "codebook_span": config.latents_per_iteration if each else config.max_tokens,
        }
        return build(cls, {**fields, **options})

    @property
    def codebooks(self) -> int:
        return -(-self.max_tokens // self.codebook_span)

    @property
    def identity(self) -> ModelIdentity:
        """Identity of the tokenizer."""
        height, width = self.image_size
        return ModelIdentity(bytes.fromhex(self.fingerprint), self.codebook_size, (height, width))

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> GeneratorConfig:
        """Inverse of :meth:`to_json`; raises ``ValueError`` as :meth:`alit.AdaptiveTokenizerConfig.from_json`."""
        return build(cls, parse(text))
