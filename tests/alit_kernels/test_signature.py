"""Signatures of calls: equal for calls that differ only in contents and addresses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from alit_kernels import _calls, tail_mask, unpack
from alit_kernels._core import extension, sees_tensors
from alit_kernels._library import Op

pytestmark = pytest.mark.skipif(not sees_tensors(), reason="needs the core and torch 2.10 or later")
BASE = torch.zeros(64)


def signature(*arguments: Any) -> bytes | None:
    found: bytes | None = extension().signature(*arguments)
    return found


def test_contents_and_addresses_do_not_count() -> None:
    one, other = (torch.rand(3, 4) for _ in range(2))
    assert signature(one, 1, "x") == signature(other, 1, "x") is not None
    assert signature(one) == signature(one.clone().requires_grad_())
    assert signature(one) == signature(torch.nn.Parameter(other))


DIFFERENT: dict[str, tuple[tuple[Any, ...], tuple[Any, ...]]] = {
    "shape": ((torch.zeros(3, 4),), (torch.zeros(4, 3),)),
    "dimensions": ((torch.zeros(12),), (torch.zeros(12, 1),)),
    "strides": ((torch.zeros(4, 4),), (torch.zeros(4, 4).t(),)),
    "dtype": ((torch.zeros(4, dtype=torch.float16),), (torch.zeros(4, dtype=torch.bfloat16),)),
    "boolean or byte": ((torch.zeros(4) > 0,), (torch.zeros(4, dtype=torch.uint8),)),
    "alignment": ((BASE[:4],), (BASE[1:5],)),
    "less alignment": ((BASE[1:5],), (BASE[2:6],)),
    "one tensor twice": ((BASE, BASE), (BASE, BASE.clone())),
    "None": ((None,), (0,)),
    "truth": ((True,), (1,)),
    "number": ((1,), (1.0,)),
    "numbers": ((0.25,), (0.5,)),
    "zeros": ((0.0,), (-0.0,)),
    "text": (("a",), ("b",)),
    "longer text": (("12345678",), ("123456789",)),
    "types": ((torch.float32,), (torch.float64,)),
    "order": ((1, 2.0), (2.0, 1)),
    "how many": ((1,), (1, None)),
}


@pytest.mark.parametrize("name", DIFFERENT)
def test_all_else_counts(name: str) -> None:
    one, other = DIFFERENT[name]
    assert signature(*one) == signature(*one) is not None
    assert signature(*one) != signature(*other)


class Own(torch.Tensor):
    pass


@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.zeros(2).as_subclass(Own),
        lambda: torch.zeros(2, device="meta"),
        lambda: torch.zeros(2, 2).to_sparse(),
        lambda: torch.tensor([1j, 2j]).conj().imag,  # has the lazy negative bit
        lambda: torch._efficientzerotensor(2),
        lambda: 10**400,
        lambda: [1],
        lambda: object(),
        lambda: "x" * 5000,
    ],
)
def test_what_has_no_signature(make: Callable[[], Any]) -> None:
    assert signature(torch.zeros(1), make()) is None
    assert signature(*[1] * 33) is None


def test_an_op_remembers_a_bounded_number_of_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_calls, "MOST_KNOWN", 4)
    op = Op(
        "test_known(Tensor x, int n) -> Tensor", reference=lambda x, n: x + n, fake=lambda x, n: x
    )
    for n in range(20):
        assert op(torch.ones(2), n).tolist() == [1.0 + n] * 2
        assert 1 <= len(op.calls) <= 4


def test_a_changed_environment_takes_effect_at_the_next_call(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    arguments = (torch.ones(1, 2, 4), torch.tensor([1]), torch.zeros(4))
    tail_mask(*arguments)
    monkeypatch.setenv(_calls.ENVIRONMENT_VARIABLE, "nonsense")
    with pytest.raises(ValueError, match="implementation='nonsense'"):
        tail_mask(*arguments)
    monkeypatch.delenv(_calls.ENVIRONMENT_VARIABLE)
    tail_mask(*arguments)


def test_values_are_checked_in_every_call() -> None:
    """Values are checked in every call, also of known signatures."""
    rows = torch.ones(4, 2)
    for _ in range(2):
        unpack(rows, torch.tensor([0, 2, 4], dtype=torch.int32), max_length=3)
        with pytest.raises(ValueError, match="offsets: "):
            unpack(rows, torch.tensor([0, 3, 2], dtype=torch.int32), max_length=3)
