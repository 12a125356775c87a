"""Family of quantizers: the signs by which it is recognized, and its forward by our ops."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .._checks import autocast_dtype
from .._plain import is_plain, watched

#: (module, the forward that its class had, arguments of the call) -> what that forward returns.
Forward = Callable[..., Any]


def near_codes(module: Any, codes: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Random codes (count, D), moved by a fifth of their spread."""
    chosen = torch.randint(len(codes), (count,), generator=generator).to(codes.device)
    noise = torch.randn(count, codes.shape[1], generator=generator).to(codes)
    return codes[chosen] + 0.2 * codes.std() * noise


def between_codes(
    module: Any, codes: Tensor, count: int, generator: torch.Generator, *, scale: float
) -> Tensor:
    """Vectors (count, D) as by :func:`near_codes`, but every other one between two codes, nearly as far from both: its
    squared distances differ by 0.5 to 300 times ``scale``, so that another temperature of that scale shows.
    """
    rows = near_codes(module, codes, count, generator)
    if len(codes) < 2:
        return rows
    half = rows[::2]
    first = codes[torch.randint(len(codes), (len(half),), generator=generator).to(codes.device)]
    distance = torch.cdist(first, codes)
    distance[distance == 0] = torch.inf
    towards = codes[distance.argmin(1)] - first
    spread = torch.rand(len(half), 1, generator=generator).to(codes)
    apart = 0.5 * scale * 600**spread / (2 * towards.square().sum(1, keepdim=True))
    rows[::2] = first + towards * (0.5 - apart).clamp(min=0.05)
    return rows


@dataclass(frozen=True)
class Family:
    """One kind of quantizer; ``docs/your-tokenizer.md`` says what works with it and what does not.

    Attributes:
        name: name in reports and in the documentation.
        classes: qualified names of its classes.
        package: where these are; empty for a class that repositories copy from each other.
        when: (module) -> True for the instances of these that belong to the family.
        attributes: what an instance has, separated by blanks; after a dot, what a part has.
        parts: path of a submodule, empty for the module itself -> its forward in our way.
        refused: (module) -> why it computes something else; empty if it does not.
        layout: (module) -> axes of the input, "c" being channels.
        codes: (module) -> its codebook, (K, D).
        cosine: (module) -> whether vectors and codes are normalized before the search.
        rows: (module, codes, count, generator) -> inputs, (count, channels).
        searched: (module, inputs) -> the vectors that are searched, (count, D).
    """

    name: str
    classes: str
    attributes: str
    parts: Mapping[str, Forward]
    package: str = ""
    when: Callable[[Any], bool] = lambda module: True
    refused: Callable[[Any], str] = lambda module: ""
    layout: Callable[[Any], str] = lambda module: "bchw"
    codes: Callable[[Any], Tensor] = lambda module: module.embedding.weight
    cosine: Callable[[Any], bool] = lambda module: False
    rows: Callable[..., Tensor] = near_codes
    searched: Callable[[Any, Tensor], Tensor] = lambda module, rows: rows

    def knows(self, module: nn.Module) -> bool:
        """True if a module is of this family, by the name of its class and its attributes."""
        cls = type(module)
        return (
            cls.__qualname__ in self.classes.split()
            and f"{cls.__module__}.".startswith(f"{self.package}." if self.package else "")
            and all(_has(module, name) for name in self.attributes.split())
            and self.when(module)
        )

    def obstacle(self, module: Any) -> str:
        """Reason why a module is not probed; empty if it is."""
        embedding = getattr(module, "embedding", None)
        if isinstance(embedding, nn.Module):
            plain = type(embedding) is nn.Embedding and embedding.max_norm is None
            if (
                not plain
                or embedding.sparse
                or embedding.scale_grad_by_freq
                or embedding.padding_idx is not None
            ):
                return "its embedding is no plain nn.Embedding"
        codes = self.codes(module)
        if not is_plain(*module.parameters(), *module.buffers()):
            return "its parameters or buffers are no plain tensors"
        if codes.is_meta:
            return "it is on the meta device, where nothing can be compared"
        if codes.dtype != torch.float32:
            return f"its codebook is of {str(codes.dtype).removeprefix('torch.')}"
        return self.refused(module)


def _has(module: Any, path: str) -> bool:
    name, _, rest = path.partition(".")
    return hasattr(module, name) and (not rest or _has(getattr(module, name), rest))


def takes(z: Any, codes: Tensor, *, casts: bool = False) -> bool:
    """True if our ops compute on ``z`` what eager code does: float32, nothing that watches operators, not empty.

    ``casts``: the family's code casts to float32 and leaves autocast on a GPU.
    """
    if not is_plain(z, codes) or codes.dtype != torch.float32 or not z.numel() or watched():
        return False
    if casts:
        floating = z.dtype in (torch.float32, torch.bfloat16, torch.float16)
        return floating and (z.is_cuda or autocast_dtype(z.device.type) is None)
    return z.dtype == torch.float32 and autocast_dtype(z.device.type) is None
