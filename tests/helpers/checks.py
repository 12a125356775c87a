"""Checks of the entries in the table of docs/your-tokenizer.md (``claims.py``)."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import distribute_module

import alit_kernels as ak

from .lucidrains import LucidrainsResidual
from .ops import values
from .peers import left_alone
from .swapped import Call, compare, counted, leaves_of, pair, plain, step

Check = Callable[[], None]


def swapped(*names: str, call: Call = plain, modes: Sequence[bool] = (True, False)) -> Check:
    """Check that swapped quantizers call our ops and return what they did before, in training and in evaluation."""

    def check() -> None:
        for name in names:
            for training in modes:
                theirs, ours, x = pair(name)
                with counted() as calls:
                    found = step(ours.train(training), x, call=call)
                assert calls
                compare(found, step(theirs.train(training), x, call=call))
                compare(list(ours.state_dict().values()), list(theirs.state_dict().values()))

    return check


def passed_on(*names: str, call: Call) -> Check:
    """Check that swapped quantizers leave this call to their old code: equal to the bit, with no call of our ops."""

    def check() -> None:
        for name in names:
            theirs, ours, x = pair(name)
            with counted() as calls:
                found = leaves_of(call(ours, x))
            assert not calls
            for a, b in zip(found, leaves_of(call(theirs, x)), strict=True):
                assert torch.equal(a, b) if isinstance(a, Tensor) else a == b

    return check


def not_swapped(*names: str) -> Check:
    """Check that ``accelerate`` does not swap these modules, and that its report states the reason."""

    def check() -> None:
        for name in names:
            module, why = left_alone()[name]
            report = ak.accelerate(module)
            assert not report.swapped and [each.why for each in report.left] == [why]

    return check


def all_of(*checks: Check) -> Check:
    def check() -> None:
        for each in checks:
            each()

    return check


def in_half(module: Any, x: Tensor) -> Any:
    return module.bfloat16()(x.bfloat16())


def within_autocast(module: Any, x: Tensor) -> Any:
    with torch.autocast(x.device.type, dtype=torch.bfloat16):
        return module(x)


def on_a_gpu(name: str, call: Call) -> Check:
    def check() -> None:
        if not torch.cuda.is_available():
            pytest.skip("needs a GPU")
        theirs, ours, x = (each.cuda() for each in pair(name))
        with counted() as calls:
            found = step(ours, x, call=call)
        assert calls
        compare(found, step(theirs, x, call=call))

    return check


def half_and_autocast(*names: str) -> dict[str, Check]:
    return {
        "half precision": passed_on(*names, call=in_half),
        "autocast": passed_on(*names, call=within_autocast),
    }


def entropy_turned_on(name: str) -> dict[str, Check]:
    def with_entropy(module: Any, x: Tensor) -> Any:
        module.entropy_loss_ratio = 0.1
        return module(x)

    return {"an entropy loss that is turned on later": passed_on(name, call=with_entropy)}


def training_and_evaluation(*names: str) -> dict[str, Check]:
    return {
        "training": swapped(*names, modes=(True,)),
        "evaluation": swapped(*names, modes=(False,)),
    }


def one_hot_matrix() -> None:
    _, ours, x = pair("taming, one-hot")
    _, _, (_, one_hot, index) = ours(x)
    expected = nn.functional.one_hot(index[:, 0], ours.n_e).to(one_hot.dtype)
    assert torch.equal(one_hot, expected)


def masked(module: Any, x: Tensor) -> Any:
    return module(x, mask=torch.arange(x.shape[1]) < torch.tensor([[4], [15]]))


def residual() -> None:
    torch.manual_seed(0)
    theirs, x = LucidrainsResidual(3, 40, 6), values(2, 15, 6)
    ours = copy.deepcopy(theirs)
    report = ak.accelerate(ours, strict=True)
    assert [each.name for each in report.swapped] == [f"layers.{i}" for i in range(3)]
    with counted() as calls:
        found = step(ours, x)
    assert len(calls) == 3
    compare(found, step(theirs, x))


def attentions(**options: Any) -> tuple[nn.MultiheadAttention, nn.MultiheadAttention]:
    """A ``nn.MultiheadAttention`` as it was, and a copy swapped by ``accelerate``."""
    torch.manual_seed(0)
    theirs = nn.MultiheadAttention(16, 4, **options)
    ours = copy.deepcopy(theirs)
    assert len(ak.accelerate(ours, strict=True).swapped) == 1
    return theirs, ours


def attends(
    *shapes: tuple[int, ...],
    ours: bool,
    within: Any = plain,
    batch_first: bool = True,
    dropout: float = 0.0,
    **options: Any,
) -> Check:
    """Check that our ops compute a call with queries and keys of these shapes, or do not; results are equal anyway."""

    def check() -> None:
        pair = attentions(batch_first=batch_first, dropout=dropout)
        query, key = (values(*shape, seed=i) for i, shape in enumerate((shapes * 2)[:2]))
        given = {"need_weights": False, **options}

        def call(module: Any, x: Tensor) -> Any:
            keys = x if len(shapes) == 1 else key
            return within(lambda q: module(q, keys, keys, **given), x)

        results = []
        for module in pair[::-1]:
            with counted() as calls:
                results.append(step(module, query, call=call))
            assert bool(calls) == (ours and module is pair[1])
        for found, expected in zip(*results, strict=True):
            if within is plain:
                torch.testing.assert_close(found, expected)
            elif found is not None:  # of narrow types
                torch.testing.assert_close(found, expected, rtol=0.05, atol=0.02)

    return check


def all_keys_masked() -> None:
    theirs, ours = attentions(batch_first=True)
    x, mask = values(2, 5, 16), torch.tensor([[True] * 5, [False] * 5])
    with torch.no_grad():
        nn.init.normal_(ours.out_proj.bias)
        theirs.load_state_dict(ours.state_dict())
        out, fast = (m.eval()(x, x, x, mask, need_weights=False)[0] for m in (ours, theirs))
    torch.testing.assert_close(out[0], ours.out_proj.bias.expand(5, -1))
    torch.testing.assert_close(out[1], fast[1])
    assert fast[0].isnan().all()


def nested() -> None:
    theirs, ours = attentions(batch_first=True)
    x = torch.nested.nested_tensor([values(3, 16), values(5, 16)])
    with torch.no_grad(), counted() as calls:
        found, expected = (m.eval()(x, x, x, need_weights=False)[0] for m in (ours, theirs))
    assert not calls
    for a, b in zip(found.unbind(), expected.unbind(), strict=True):
        assert torch.equal(a, b)


def sharded() -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        module = nn.MultiheadAttention(16, 4)
        distribute_module(module, dist.init_device_mesh("cpu", (1,)))
        (left,) = ak.accelerate(module).left
        assert left.why == "its weights are no plain tensors"
    finally:
        dist.destroy_process_group()
