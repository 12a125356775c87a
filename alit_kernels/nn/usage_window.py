"""Usage of a codebook by the last vectors."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .._checks import check_count, check_same
from ..codebook_statistics.op import check_index
from ..vector_quantize import VectorQuantized
from .codebook import CodebookUsage, codebook_usage, taking_part


class UsageWindow(nn.Module):
    """Window of the last ``size`` codes of a codebook: its usage as LlamaGen shows it; nothing waits for the device.

    Args:
        num_codes: K.
        size: vectors that are remembered.

    State: the buffer ``recent`` (size,) int32, the codes of the last vectors, the newest last, -1 where there was none
    yet. It is in no state dict. It is of this process alone (DDP broadcasts the buffers of what it wraps).
    """

    recent: Tensor

    def __init__(self, num_codes: int, size: int = 65536) -> None:
        check_count("num_codes", num_codes, minimum=1)
        check_count("size", size, minimum=1)
        super().__init__()
        self.num_codes = num_codes
        self.register_buffer("recent", torch.full((size,), -1, dtype=torch.int32), persistent=False)

    @torch.no_grad()
    def update(self, index: Tensor | VectorQuantized, mask: Tensor | None = None) -> None:
        """Add the codes of vectors, in their order.

        Args:
            index: (...), or what a quantizer returned, whose mask counts.
            mask: (...) bool, True where a vector takes part.

        Raises:
            TypeError, ValueError: wrong dtype, shape or device; on the CPU also an index out of range.
        """
        index, mask = taking_part(index, mask)
        check_same("device", recent=self.recent, index=index)
        if index.is_cpu and not torch.compiler.is_compiling():
            check_index("index", index, self.num_codes, mask)
        codes = index.flatten().int()
        if mask is not None:
            codes = torch.where(mask.flatten(), codes, -1)
        recent = torch.cat([self.recent, codes])
        if mask is not None:  # what takes part goes behind the rest, in its order
            recent = recent[(recent >= 0).to(torch.int8).argsort(stable=True)]
        self.recent.copy_(recent[-self.recent.numel() :])

    @torch.no_grad()
    def usage(self) -> CodebookUsage:
        """Count, fraction and perplexity over the window."""
        return codebook_usage(self.recent.clamp(min=0), self.recent >= 0, self.num_codes)
