"""Probe of a module: its results as it was and swapped, compared."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..nn.multihead_attention import MultiheadAttention
from .classes import restore, swap
from .family import Family

SIZES = {"b": 2, "h": 3, "w": 5, "n": 15, "t": 2}
#: Relative margin by which a probe's vectors are nearer to one code than to any other.
MARGIN = 1e-4
#: Error allowed, over the greatest magnitude of a result; or four times the eps of a narrow dtype.
TOLERANCE = 1e-4


def prove(module: nn.Module, family: Family) -> str:
    """Reason why a swapped copy of ``module`` differs from an unchanged one; empty if it does not.

    In training, evaluation and evaluation without gradients: all outputs, which of them require a gradient, gradients
    of the input and of every parameter, state after two calls, and how many random numbers were drawn. Inputs are
    vectors whose nearest code is certain, so that rounding decides nothing.
    """
    try:
        x = probe_input(module, family)
        for training, records in ((True, True), (False, True), (False, False)):
            outcomes = []
            for change in (restore, swap):
                candidate = _copy(module).train(training)
                change(candidate, family)
                outcomes.append(_outcome(candidate, x, records))
            why = _difference(*outcomes)
            if why:
                mode = "training" if training else "evaluation"
                return f"{why} in {mode}"
    except Exception as error:  # raised by their code or by copying: nothing is proved
        return f"the probe failed: {type(error).__name__}: {error}".splitlines()[0]
    return ""


def prove_attention(module: nn.MultiheadAttention) -> str:
    """Reason why outputs or gradients of random tokens differ by our kernels; empty if they do not."""
    try:
        weight: Any = module.out_proj.weight
        x = torch.randn(2, 5, module.embed_dim, generator=torch.Generator().manual_seed(0))
        x = x.to(weight.device, weight.dtype).requires_grad_()
        leaves = [x, *(p for p in module.parameters() if p.requires_grad)]
        results = []
        with torch.enable_grad(), torch.autocast(weight.device.type, enabled=False):
            for cls in (nn.MultiheadAttention, MultiheadAttention):
                candidate = cls.__new__(cls)
                candidate.__dict__ |= {**vars(module), "dropout": 0.0}  # same weights
                out, _ = candidate.forward(x, x, x, need_weights=False)
                results.append([out.detach(), *torch.autograd.grad(out.sum(), leaves)])
        return "" if all(map(agree, *results)) else "results differ"
    except Exception as error:
        return f"the probe failed: {type(error).__name__}: {error}".splitlines()[0]


def probe_input(module: nn.Module, family: Family) -> Tensor:
    """Vectors near random codes, each clearly nearer to one code than to any other, in the family's layout.

    Raises:
        ValueError: there are no such vectors, as where all codes are equal.
    """
    generator = torch.Generator().manual_seed(0)
    layout = family.layout(module)
    shape = [SIZES[axis] for axis in layout if axis != "c"]
    wanted = torch.Size(shape).numel()
    with torch.no_grad():
        codes = family.codes(module).detach()
        rows = family.rows(module, codes, 16 * wanted, generator)
        vectors = family.searched(module, rows).reshape(-1, codes.shape[1])
        if family.cosine(module):
            codes, vectors = (nn.functional.normalize(v, dim=-1) for v in (codes, vectors))
        if len(codes) > 1:
            parts = [_two_nearest(part, codes) for part in vectors.split(64)]
            first, second = torch.cat(parts).unbind(-1)
            certain = second > first * (1 + MARGIN) + 1e-6 * codes.abs().max()
            rows = rows[certain.view(len(rows), -1).all(1)]
    if len(rows) < wanted:
        raise ValueError("hardly a vector has one nearest code")
    return rows[:wanted].view(*shape, -1).movedim(-1, layout.index("c")).contiguous()


def _two_nearest(vectors: Tensor, codes: Tensor) -> Tensor:
    exact = "donot_use_mm_for_euclid_dist"
    return torch.cdist(vectors, codes, compute_mode=exact).topk(2, largest=False).values


def _outcome(module: nn.Module, x: Tensor, records: bool) -> dict[str, Any]:
    found: dict[str, Any] = {}
    devices = [x.device] if x.is_cuda else []
    with torch.random.fork_rng(devices), torch.set_grad_enabled(records):
        torch.manual_seed(0)
        for step in range(2):
            leaf = x.clone().requires_grad_(records)
            outputs = dict(_flat(module.forward(leaf), "output"))
            tensors = [v for v in outputs.values() if isinstance(v, Tensor) and v.requires_grad]
            found |= {f"{name} of call {step}": value for name, value in outputs.items()}
            if tensors:
                leaves = {"input": leaf, **dict(module.named_parameters())}
                leaves = {k: v for k, v in leaves.items() if v.requires_grad}
                total = sum((v.double() * _weights(v)).sum() for v in tensors)
                grads = torch.autograd.grad(total, list(leaves.values()), allow_unused=True)  # type: ignore[arg-type]
                found |= {f"gradient of {k}": g for k, g in zip(leaves, grads, strict=True)}
        found |= {f"state {k}": v.detach().clone() for k, v in module.named_buffers()}
        found |= {f"state {k}": v.detach().clone() for k, v in module.named_parameters()}
        for name, part in module.named_modules():
            simple = {k: v for k, v in vars(part).items() if isinstance(v, (int, float, str))}
            found[f"attributes of {name or type(module).__name__}"] = simple
        found["random numbers"] = torch.get_rng_state()
        if x.is_cuda:
            found["random numbers of the GPU"] = torch.cuda.get_rng_state(x.device)
    return found


def _weights(x: Tensor) -> Tensor:
    return torch.arange(1, x.numel() + 1, dtype=torch.float64, device=x.device).view(x.shape).cos()


def _flat(value: Any, name: str) -> Iterator[tuple[str, Any]]:
    """Leaves of nested containers by path, with the type of each container and the contiguity of each tensor."""
    if isinstance(value, dict):
        yield f"{name} (type)", type(value)
        for key, each in value.items():
            yield from _flat(each, f"{name}[{key!r}]")
    elif isinstance(value, (list, tuple)):
        yield f"{name} (type)", type(value)
        for i, each in enumerate(value):
            yield from _flat(each, f"{name}[{i}]")
    else:
        yield name, value
        if isinstance(value, Tensor):
            yield f"{name} (contiguous)", value.is_contiguous()


def _difference(found: dict[str, Any], expected: dict[str, Any]) -> str:
    if found.keys() != expected.keys():
        return "other outputs"
    for name, value in found.items():
        if not agree(value, expected[name]):
            return f"{name} differs"
    return ""


def agree(a: Any, b: Any) -> bool:
    """True if both are equal, floating point up to rounding; tensors also in shape, dtype, device, requires_grad."""
    if not (isinstance(a, Tensor) and isinstance(b, Tensor)):
        return type(a) is type(b) and bool(a == b)
    kinds = [(x.shape, x.dtype, x.device, x.requires_grad) for x in (a, b)]
    if kinds[0] != kinds[1]:
        return False
    if not a.is_floating_point():
        return torch.equal(a, b)
    eps = 4 * torch.finfo(a.dtype).eps
    a, b = a.detach().double(), b.detach().double()
    finite = b.isfinite()
    if not torch.equal(a.isfinite(), finite):
        return False
    a, b = a[finite], b[finite]
    return not b.numel() or bool((a - b).abs().max() <= max(TOLERANCE, eps) * b.abs().max())


def _copy(module: nn.Module) -> nn.Module:
    """Deep copy without hooks, nor what they hold. Its buffers are detached, since some repositories register as one
    a parameter, which cannot be written to, or what ``module.to(device)`` returned for it, which cannot be copied.
    """
    hooks = [v for k, v in vars(module).items() if k.endswith("_hooks") and isinstance(v, dict)]
    known: dict[int, Any] = {id(each): type(each)() for each in hooks}
    known |= {id(buffer): buffer.detach().clone() for buffer in module.buffers()}
    return copy.deepcopy(module, known)
