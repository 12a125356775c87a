"""Invalid arguments raise TypeError or ValueError that names one of them, from every public function.

``ALIT_FUZZ_EXAMPLES`` sets the number of calls of each function.
"""

from __future__ import annotations

import inspect
import random
import re
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.distributed.tensor
from torch import Tensor

import alit_kernels as ak
from alit_kernels.nn import GroupedVQ, ResidualVQ, UsageWindow, VectorQuantizer
from tests.helpers.hostile import EXAMPLES

Arguments = dict[str, Any]
OFFSETS, LENGTHS = torch.tensor([0, 2, 5], dtype=torch.int32), torch.tensor([2, 3])


def quantizer(**options: Any) -> VectorQuantizer:
    return VectorQuantizer(5, 4, ema_decay=0.9, dead_code_threshold=0.1, **options)


def calls() -> dict[str, tuple[Callable[..., Any], Arguments]]:
    """Name -> public function, and valid arguments."""
    rows, dense, packed = torch.randn(6, 4), torch.randn(2, 3, 2, 8), torch.randn(5, 2, 8)
    z, codebook, keep = torch.randn(6, 4), torch.randn(5, 4), torch.rand(6) > 0.5
    index, target = torch.tensor([0, 1, 2, 3, 4, 0]), torch.tensor([0, 1, 2, 3, 4, 0])
    qkv = {"q": dense, "k": dense + 1, "v": dense + 2}
    qkv_packed = {"q": packed, "k": packed + 1, "v": packed + 2, "offsets": OFFSETS}
    auto, search = {"implementation": "auto"}, {"metric": "cosine", "precision": "ieee"}
    attending = {"scale": 0.3, "return_lse": True}
    blocks = {"queries": range(1, 3), "keys": range(2), "max_length": 3, "scale": 0.3}
    ops: dict[str, Arguments] = {
        "attention": {
            **{**qkv, "key_mask": torch.ones(2, 3) > 0, "key_stop": torch.ones(3).int()},
            **attending,
        },
        "add_layer_norm": {
            **{"x": z, "branch": z + 1, "branch_bias": z[0], "weight": z[1], "bias": z[2]},
            **{"eps": 1e-5, "dtype": torch.float32},
        },
        "varlen_attention": {
            **qkv_packed,
            **{"key_offsets": OFFSETS.clone(), "max_length": 3, "max_key_length": 3},
            **{"key_mask": torch.ones(5) > 0, "key_stop": torch.ones(5).int(), **attending},
        },
        "attention_map": {
            **{"q": packed, "k": packed + 1, "lse": torch.randn(2, 5), "offsets": OFFSETS, **blocks}
        },
        "cumulative_offsets": {"lengths": LENGTHS},
        "pack": {"padded": torch.randn(2, 3, 4), "lengths": LENGTHS, "capacity": 6},
        "unpack": {"packed": rows, "offsets": OFFSETS, "max_length": 3, "fill": 0.5},
        "compact": {"packed": rows, "offsets": OFFSETS, "keep": keep, "capacity": 6},
        "append": {
            **{"packed": rows, "offsets": OFFSETS, "rows": torch.randn(2, 4)},
            **{"select": torch.tensor([True, False]), "capacity": 9},
        },
        "tail_mask": {"tokens": torch.randn(2, 3, 4), "lengths": LENGTHS, "fill": torch.randn(4)},
        "nearest_codeword": {"z": z, "codebook": codebook, **search},
        "codebook_entropy": {
            **{"z": z, "codebook": codebook, "temperature": 0.5, "metric": "cosine"},
            **{"mask": keep, "epsilon": 1e-5},
        },
        "codebook_statistics": {"index": index, "z": z, "num_codes": 5, "mask": keep},
        "vector_quantize": {
            **{"z": z, "codebook": codebook, "commitment": 0.25, "codebook_weight": 1.0},
            **{"mask": keep, **search},
        },
        "soft_codebook": {"logits": torch.randn(6, 5), "codebook": codebook, "target": target},
    }
    found: dict[str, tuple[Callable[..., Any], Arguments]] = {
        name: (getattr(ak, name), {**arguments, **auto}) for name, arguments in ops.items()
    }
    found["stops_causal"] = (ak.stops_causal, {"n": 5})
    found["stops_prefix"] = (ak.stops_prefix, {"n": 5, "prefix": 3})
    found["stops_blocks"] = (ak.stops_blocks, {"sizes": (2, 3)})
    options: Arguments = {"metric": "cosine", "commitment": 0.25, "codebook_weight": 1.0}
    options |= {"gradient": "rotation", "ema_decay": 0.9}
    options |= {"ema_epsilon": 1e-5, "ema_rewrites_all": False, "dead_code_threshold": 0.1}
    options |= {"num_codes": 5, "dim": 4, "channel_dim": -1, "process_group": None}
    found["VectorQuantizer"] = (VectorQuantizer, options)
    masked = {"z": z, "mask": keep}
    found["forward"] = (lambda **a: quantizer()(**a), masked)
    grid = {"z": torch.randn(2, 4, 3, 2), "mask": torch.rand(2, 3, 2) > 0.5}
    found["forward of a grid"] = (lambda **a: quantizer(channel_dim=1)(**a), grid)
    found["update_codebook"] = (
        lambda **a: quantizer().update_codebook(**a),
        {**masked, "index": index},
    )
    found["usage"] = (lambda **a: quantizer().usage(**a), {"index": index, "mask": keep})
    found["codes"] = (lambda **a: quantizer().codes(**a), {"index": index, "mask": keep})
    found["set_codebook"] = (lambda **a: quantizer().set_codebook(**a), {"weight": codebook})
    levels = torch.tensor([1, 2, 0, 1, 1, 2])
    found["forward of levels"] = (
        lambda **a: ResidualVQ(2, 5, 4)(**a),
        {**masked, "levels": levels},
    )
    found["forward of groups"] = (lambda **a: GroupedVQ(2, 5, 4)(**a), masked)
    found["codes of groups"] = (
        lambda **a: GroupedVQ(2, 5, 4).codes(**a),
        {"index": index[:, None].expand(-1, 2), "mask": keep[:, None].expand(-1, 2)},
    )
    found["codes of levels"] = (
        lambda **a: ResidualVQ(2, 5, 4).codes(**a),
        found["codes of groups"][1],
    )
    found["window"] = (lambda **a: UsageWindow(5).update(**a), {"index": index, "mask": keep})
    found["initialize"] = (lambda **a: quantizer().initialize(**a), {**masked, "iterations": 2})
    return found


def test_every_public_function_is_called() -> None:
    functions = {name for name in ak.__all__ if inspect.isfunction(getattr(ak, name))}
    # Errors of the first function's arguments are torch's; the second takes a model.
    assert functions - {"scaled_dot_product_attention", "accelerate"} <= calls().keys()


@pytest.fixture(scope="module")
def mesh() -> Iterator[Any]:
    """Device mesh of only this process, for DTensors."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


LAYOUTS: dict[str, Callable[[Tensor, Any], Tensor]] = {
    "COO": lambda x, mesh: x.to_sparse(),
    "CSR": lambda x, mesh: x.to_sparse_csr(),
    "mkldnn": lambda x, mesh: x.to_mkldnn(),
    "nested": lambda x, mesh: torch.nested.nested_tensor([*x]),
    "jagged": lambda x, mesh: torch.nested.nested_tensor([*x], layout=torch.jagged),
    "quantized": lambda x, mesh: torch.quantize_per_tensor(x, 0.1, 0, torch.qint8),
    "DTensor": lambda x, mesh: dist.tensor.DTensor.from_local(x, mesh, [dist.tensor.Replicate()]),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", calls())
def test_tensors_of_another_layout(name: str, layout: str, mesh: Any) -> None:
    """Tensors of another layout in place of any argument raise by name, from every implementation."""
    function, arguments = calls()[name]
    for argument, value in arguments.items():
        if not isinstance(value, Tensor):
            continue
        try:
            other = LAYOUTS[layout](value, mesh)
        except (RuntimeError, ValueError, IndexError):  # torch has no such tensor
            continue
        for implementation in ("auto", "reference", "cpp"):
            chosen = {"implementation": implementation} if "implementation" in arguments else {}
            with pytest.raises((TypeError, ValueError), match=rf"^{argument}: "):
                function(**{**arguments, argument: other, **chosen})


HUGE = (10**400, -(10**400), 10**5000, 2**63, 2**64, -(2**63) - 1, 2**31, 2**53 + 1)
SENSELESS: tuple[Any, ...] = (
    *(None, True, False, "", "x", b"x", 1.5, -1, 0, 3, complex(1, 1), *HUGE),
    *(float("nan"), float("inf"), float("-inf"), 1e39, range(3), range(0, 10**400), slice(1)),
    *([], {}, (1, 2), object, torch.float32, np.float32(1), np.float64("nan"), np.int64(3)),
    *(np.bool_(True), np.arange(2.0), torch.tensor(1), torch.tensor([0.1, 0.2]), "euclidean"),
    *("cpp", "torch", "reference", "ieee", torch.Size([2]), [torch.ones(2)]),
)
REFUSALS = (TypeError, ValueError, NotImplementedError)
DTYPES = [x for x in vars(torch).values() if isinstance(x, torch.dtype)]


def hostile(value: Any, chance: random.Random, mesh: Any) -> Any:
    """Random invalid replacement of ``value``; for tensors mostly another tensor."""
    if not isinstance(value, Tensor) or chance.random() < 0.2:
        return chance.choice(SENSELESS)
    match chance.randrange(6):
        case 0:
            return LAYOUTS[chance.choice(list(LAYOUTS))](value, mesh)
        case 1:
            return value.to(chance.choice(DTYPES))
        case 2:
            return value.to("meta")
        case 3 if value.ndim:
            dim = chance.randrange(value.ndim)
            return chance.choice(
                (
                    *(value.unsqueeze(dim), value.select(dim, 0), value.narrow(dim, 0, 0)),
                    *(torch.cat([value, value], dim), value.flatten(), value.sum(dim)),
                    *(value.transpose(0, -1), value.narrow(dim, 0, 1).expand_as(value)),
                )
            )
        case 4:
            number = chance.choice((-1, 5, 100, 2**31 - 1, 2**40, -(2**40), float("nan"), 0))
            changed = value.clone().flatten()
            changed[chance.randrange(changed.numel())] = torch.tensor(number).to(value.dtype)
            return changed.view(value.shape)
        case _:
            return value.flatten()[0]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", calls())
def test_arguments_that_nobody_should_pass(name: str, mesh: Any) -> None:
    """Only TypeError and ValueError (or NotImplementedError, by name) escape; the message names an argument."""
    function, right = calls()[name]
    names = re.compile(r"\b(" + "|".join([*right, f"alit_kernels.{name}"]) + r")\b")
    chance = random.Random(name)
    for _ in range(EXAMPLES):
        arguments = dict(right)
        for argument in chance.sample(list(right), min(len(right), chance.choice((1, 1, 1, 2, 3)))):
            try:
                arguments[argument] = hostile(right[argument], chance, mesh)
            except (RuntimeError, TypeError, ValueError, IndexError):
                continue  # torch has no such tensor
        escaped = escapes(function, arguments)
        named = escaped is None or (isinstance(escaped, REFUSALS) and names.search(str(escaped)))
        assert named, f"{type(escaped).__name__}: {escaped} from {shown(arguments)}"


def escapes(function: Callable[..., Any], arguments: Arguments) -> Exception | None:
    try:
        function(**arguments)
    except Exception as error:
        return error
    return None


def shown(arguments: Arguments) -> dict[str, str]:
    """Arguments as text for a message: tensors by type and shape, huge integers as "huge"."""

    def one(value: Any) -> str:
        if isinstance(value, Tensor):
            return f"{value.dtype} {value.layout} {value.device}" + (
                "" if value.is_nested else f" {tuple(value.shape)}"
            )
        return "huge" if isinstance(value, int) and abs(value) > 2**64 else repr(value)

    return {name: one(value) for name, value in arguments.items()}


@pytest.mark.parametrize(
    ("name", "argument", "value"),
    [
        *[("unpack", "fill", x) for x in (10**400, 10**5000, 2**53 + 1, True, "1", None, 1j)],
        *[("attention", "scale", x) for x in (10**400, float("nan"), float("inf"), True, "1")],
        *[("codebook_entropy", "temperature", x) for x in (0, -1.0, 10**400, float("nan"), None)],
        *[("codebook_entropy", "epsilon", x) for x in (-1e-9, float("inf"), "0", True)],
        *[("vector_quantize", "commitment", x) for x in (10**400, float("nan"), None, True)],
        *[("vector_quantize", "codebook_weight", x) for x in (10**400, float("inf"), None, "1")],
        *[("pack", "capacity", x) for x in (10**400, 10**5000, -1, 1.0, True, np.int64(9), None)],
        *[("attention", "return_lse", x) for x in (torch.ones(2), None, 1)],
        *[("VectorQuantizer", "ema_decay", x) for x in (10**400, float("nan"), "1", True, 1.0)],
        *[("nearest_codeword", "implementation", x) for x in (None, 1, torch.ones(2))],
    ],
    ids=lambda x: x if isinstance(x, str) else type(x).__name__,
)
def test_numbers_and_options(name: str, argument: str, value: Any) -> None:
    function, right = calls()[name]
    with pytest.raises((TypeError, ValueError), match=rf"^{argument}\b"):
        function(**{**right, argument: value})


@pytest.mark.parametrize(
    ("dtype", "fill"),
    [
        *[(torch.int32, x) for x in (0.5, float("nan"), float("inf"), 2**31, -(2**31) - 1)],
        *[(torch.uint8, -1), (torch.uint8, 256), (torch.bool, 2), (torch.bool, 0.5)],
        *[(torch.float16, 1e5), (torch.float32, 1e39), (torch.bfloat16, -1e39)],
    ],
)
def test_fill_that_the_dtype_does_not_hold(dtype: torch.dtype, fill: float) -> None:
    with pytest.raises(ValueError, match=r"^fill: expected"):
        ak.unpack(torch.zeros(6, 3, dtype=dtype), OFFSETS, max_length=4, fill=fill)


@pytest.mark.parametrize("implementation", ("reference", "cpp"))
@pytest.mark.parametrize(
    ("dtype", "fill"),
    [
        *[(torch.float16, float("-inf")), (torch.float16, 65504), (torch.float32, float("nan"))],
        *[(torch.int64, -(2**53)), (torch.uint8, 255), (torch.bool, 1), (torch.complex64, 2.0)],
    ],
)
def test_fill_at_the_end_of_a_range(dtype: torch.dtype, fill: float, implementation: str) -> None:
    packed = torch.ones(6, 3).to(dtype)
    padded = ak.unpack(packed, OFFSETS, max_length=4, fill=fill, implementation=implementation)
    expected = torch.full((2, 3), fill, dtype=dtype)
    torch.testing.assert_close(padded[0, 2:], expected, rtol=0, atol=0, equal_nan=True)
