"""The table of docs/your-tokenizer.md: every entry is checked, and the page has all of them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from alit_kernels.accelerate.families import FAMILIES, family_of
from tests.helpers.claims import PAGE, ROWS, claims, page_with, table
from tests.helpers.peers import quantizers
from tests.helpers.swapped import pair


@pytest.mark.parametrize("check", claims().values(), ids=claims())
def test_holds(check: Callable[[], None]) -> None:
    check()


def test_the_page_has_the_rows() -> None:
    assert page_with(table()) == PAGE.read_text(), "run python -m tests.helpers.claims"


def test_every_family_and_class_has_a_row_and_a_module() -> None:
    """Every family has a row, and the checks swap a module of each of its classes."""
    assert [*ROWS] == ["attention", *FAMILIES]
    tested: dict[str, set[str]] = {name: set() for name in FAMILIES}
    for module in quantizers().values():
        tested[family_of(module).name].add(type(module).__qualname__)
    for name, family in FAMILIES.items():
        assert ROWS[name].classes == family.classes
        assert tested[name] == set(family.classes.split())


@pytest.mark.parametrize("name", ("TiTok", "LlamaGen", "taming"))
def test_where_no_loss_enters_the_gradient_of_the_codebook_is_zeros(name: str) -> None:
    theirs, ours, x = pair(name)
    for module in (theirs, ours):
        module(x.clone().requires_grad_())[0].sum().backward()
    assert theirs.embedding.weight.grad is None and not ours.embedding.weight.grad.any()


def test_a_vector_of_nan_gets_the_code_0() -> None:
    _, ours, x = pair("taming")
    x[0, :, 0, 0] = torch.nan
    assert int(ours(x)[2][2][0]) == 0
