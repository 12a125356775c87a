"""torch's ``scaled_dot_product_attention``, by our kernels where these compute the same.

A call whose meaning cannot be told from shapes, strides and options alone goes to torch as it came.
"""

from __future__ import annotations

import functools
import math
import sys
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention as _torch_attention
from torch.overrides import TorchFunctionMode

from ._library import available
from ._plain import is_plain, watched
from .attention import attention, stops_causal
from .attention.configurations import MAX_HEAD_DIM
from .attention.op import limit
from .attention.stops import stops_of

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
#: Minimum entries of a mask that is read for stops, as many as 256 queries have with 256 keys: below, torch takes no
#: longer with the mask than our kernel without.
LEAST_READ = 2**16


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Attention as by ``torch.nn.functional.scaled_dot_product_attention``: its signature, its layout, its meaning.

    Heads stand before tokens here, (B, H, N, D), and after them in :func:`alit_kernels.attention`. Our kernel runs
    where

    - there is no dropout, and no mask but a boolean one that is the same for all queries and heads: of size 1 there, or
      expanded, so that the stride is 0. ``is_causal`` is taken, where there is an implementation that knows stops
      (:func:`alit_kernels.attention`): not on a CPU without our compiled core;
    - or, on a CPU alone, the mask is the same for all of the batch and all heads (of size 1 there, or expanded), has at
      least 2^16 entries for queries and keys, and lets every query see a prefix of the keys: it is boolean, or 0 and
      -inf and wants no gradient. It is read for that, in every call anew; on a GPU the host would have to wait for it;
    - ``query``, ``key`` and ``value`` are dense, of one dtype (float32, bfloat16 or float16) and device, with equal
      batch dimensions and channels; on a GPU at most 512 of these, 256 where a block has less than 129 KiB of shared
      memory (compute capability 8.6, 8.9, 12.0);
    - neither a transform of ``torch.func``, forward-mode differentiation, a tracer nor a dispatch mode (FLOP counters,
      fake tensors) is at work, and ``torch.nn.attention.sdpa_kernel`` leaves flash attention on.

    All other calls are torch's.

    Args:
        query: (..., H, N, D), or (B, N, D), or (N, D).
        key, value: (..., H, M, D); with ``enable_gqa`` of a number of heads that divides that of ``query``.
        attn_mask: as torch takes it; True where a key takes part.
        dropout_p, is_causal, scale, enable_gqa: as torch takes them.

    Returns:
        The shape and dtype of ``query``, like torch's; a query without any key gives zeros.
    """
    found = _attend(
        query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
    )
    if found is not None:
        return found
    return _torch_attention(
        query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
    )


class fused_sdpa(TorchFunctionMode):
    """Context manager: this thread's calls of torch's ``scaled_dot_product_attention`` go to ours.

    It reaches them through any name or reference, within ``torch.compile`` too. It does not reach calls

    - of other threads, such as those of ``DataParallel``;
    - that ``torch.utils.checkpoint`` makes again in a backward: enter the context within the function that it is given;
    - within ``torch.nn.functional.multi_head_attention_forward``, one function to torch's modes, by which
      ``nn.MultiheadAttention`` computes: :func:`alit_kernels.accelerate` replaces these modules;
    - in C++: scripted modules and exported programs.

    Every function of torch that is called in the context passes a mode, which costs microseconds on the host
    (``python -m benchmarks.studies.sdpa_context``), and ``nn.TransformerEncoderLayer`` and ``nn.MultiheadAttention``
    leave their fast paths, as under any mode.
    """

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func is _torch_attention:
            found = _attend(*args, **kwargs) if kwargs else _attend(*args)
            if found is not None:
                return found
        return func(*args, **kwargs) if kwargs else func(*args)


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor | None:
    """Result by our kernel; None where the call is torch's."""
    mask: Tensor | None = None
    stops: Tensor | None = None
    if dropout_p or (is_causal and attn_mask is not None):
        return None
    of_keys = True
    if attn_mask is not None:
        if not is_plain(attn_mask):
            return None
        of_keys = _of_keys_alone(attn_mask, query.ndim)
        if not of_keys and not worth_reading(attn_mask, query.dtype):
            return None
    if not _same_problem(query, key, value, scale, enable_gqa):
        return None
    if (is_causal or not of_keys) and not knows_stops(query.device.type):
        return None
    if is_causal:
        stops = stops_causal(query.shape[-2], device=query.device)
    elif attn_mask is not None:
        if of_keys:
            mask = _key_mask(attn_mask, query, key)
        else:
            stops = _stops(attn_mask, query, key)
        if mask is None and stops is None:
            return None
    tensors: tuple[Tensor, ...] = (query, key, value)
    if query.ndim < 4:  # one head
        tensors = tuple(x.unsqueeze(-3) for x in tensors)
    # Like torch's, the result lies in memory as the queries do: of contiguous ones each head is a batch entry, and
    # heads that share keys are more queries of these.
    apart = query.is_contiguous()
    heads, shared = (x.shape[-3] for x in tensors[:2])
    if heads > shared and apart:
        shape = *tensors[0].shape[:-3], shared, heads // shared * query.shape[-2], query.shape[-1]
        tensors = tensors[0].view(shape), *tensors[1:]
        stops = None if stops is None else stops.repeat(heads // shared)
    elif heads > shared:
        keys = (x.repeat_interleave(heads // shared, -3) for x in tensors[1:])
        tensors = tensors[0], *keys
    if apart and mask is not None:
        mask = mask[:, None].expand(-1, shared, -1).flatten(0, 1)
    q, k, v = (_rows(x, apart) for x in tensors)
    out: Any = attention(q, k, v, key_mask=mask, key_stop=stops, scale=scale)
    return out.transpose(1, 2).reshape(query.shape)


def _same_problem(query: Any, key: Any, value: Any, scale: Any, enable_gqa: bool) -> bool:
    """True if our kernel computes this call, masks aside."""
    if not is_plain(query, key, value):
        return False
    shape, of_keys = query.shape, key.shape
    ndim, dtype, device = len(shape), query.dtype, query.device
    if value.shape != of_keys or len(of_keys) != ndim or ndim < 2 or of_keys[-1] != shape[-1]:
        return False
    if not dtype == key.dtype == value.dtype or not device == key.device == value.device:
        return False
    if dtype not in _DTYPES or shape[-1] > widest_head(device.type, device.index):
        return False
    if scale is not None and not (type(scale) in (int, float) and math.isfinite(scale)):
        return False
    if enable_gqa and ndim > 3:
        heads, shared = shape[-3], of_keys[-3]
        same = shape[:-3] == of_keys[:-3] and heads >= shared > 0 and heads % shared == 0
    else:
        same = not enable_gqa and shape[:-2] == of_keys[:-2]
    return same and torch._C._get_flash_sdp_enabled() and not watched()


def widest_head(device_type: str, index: int | None) -> int:
    """Most channels of a head with which a kernel of ours runs on this device; -1 where none does."""
    if device_type == "cpu":
        return sys.maxsize
    return _widest(index) if device_type == "cuda" and not available("triton", "cuda") else -1


@functools.cache
def _widest(index: int | None) -> int:
    """Most channels of a head on a GPU, as far as the kernels and its shared memory go."""
    device = torch.device("cuda") if index is None else torch.device("cuda", index)
    return next(width for width in (MAX_HEAD_DIM, 256) if not limit(width, device))


def knows_stops(device_type: str) -> bool:
    """True if a kernel of ours that runs on this device type takes stops."""
    return device_type != "cpu" or not available("cpp", "cpu")


# As torch.compiler.assume_constant_result does, without its import of the compiler.
widest_head._dynamo_marked_constant = True  # type: ignore[attr-defined]
knows_stops._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _of_keys_alone(mask: Tensor, dims: int) -> bool:
    """True if a boolean mask is the same for all queries, and for all heads where ``dims`` is 4 or more."""
    if mask.dtype != torch.bool or mask.ndim < 2 or not mask.numel():
        return False
    sizes, strides = mask.shape, mask.stride()
    if sizes[-2] != 1 and strides[-2]:
        return False
    return dims < 4 or mask.ndim < 3 or sizes[-3] == 1 or strides[-3] == 0


def worth_reading(mask: Tensor, dtype: torch.dtype) -> bool:
    """True if a mask of queries of ``dtype`` may be one of stops, and is of a size at which it pays to look."""
    if mask.dtype != torch.bool and (mask.dtype != dtype or mask.requires_grad):
        return False
    if mask.numel() < LEAST_READ or not mask.is_cpu or torch.compiler.is_compiling():
        return False
    sizes = mask.shape
    if len(sizes) < 2 or sizes[-2] * sizes[-1] < LEAST_READ:
        return False
    whole = zip(sizes[:-2], mask.stride(), strict=False)
    return all(size == 1 or stride == 0 for size, stride in whole)


def _stops(mask: Tensor, query: Tensor, key: Tensor) -> Tensor | None:
    """Stops (N,) of a mask that is the same for all but queries and keys; None where it does not fit, or has none."""
    whole = (*query.shape[:-1], key.shape[-2])
    if mask.ndim > len(whole) or mask.shape[-2:] != whole[-2:]:
        return None
    pairs = zip(mask.shape[::-1], whole[::-1], strict=False)
    if any(have not in (1, want) for have, want in pairs):
        return None
    return stops_of(mask[(0,) * (mask.ndim - 2)])


def _key_mask(mask: Tensor, query: Tensor, key: Tensor) -> Tensor | None:
    """Key mask (B, M) of a mask that is the same for all queries and heads; None where it does not fit."""
    shared = 2 if query.ndim > 3 else 1  # heads and queries, or queries alone
    batch, keys = query.shape[: -1 - shared], key.shape[-2]
    whole = (*batch, *query.shape[-1 - shared : -1], keys)
    if mask.device != query.device or mask.ndim > len(whole):
        return None
    pairs = zip(mask.shape[::-1], whole[::-1], strict=False)
    if any(have not in (1, want) for have, want in pairs):
        return None
    for _ in range(min(shared, mask.ndim - 1)):
        mask = mask.select(-2, 0)
    return mask.expand(*batch, keys).reshape(math.prod(batch), keys)


def _rows(x: Tensor, apart: bool) -> Tensor:
    """Rows (..., H, N, D) as (B, N, H, D), or as (B H, N, 1, D) where ``apart``."""
    *batch, heads, rows, width = x.shape
    shape = (math.prod(batch) * heads, 1) if apart else (math.prod(batch), heads)
    return x.reshape(*shape, rows, width).transpose(1, 2)
