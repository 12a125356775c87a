"""attention, varlen_attention, attention_map: against the softmax written out, and against float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from alit_kernels import (
    attention,
    attention_map,
    stops_blocks,
    stops_causal,
    stops_prefix,
    varlen_attention,
)
from alit_kernels._cpp import INSTRUCTION_SETS
from alit_kernels._library import extension
from alit_kernels.attention.cases import LONG_CASES, TEST_CASES, Case, make
from alit_kernels.testing import assert_within_budget
from tests.helpers.attention import (
    attend,
    check_forward,
    check_gradients,
    dense,
    everywhere,
    gradients,
)
from tests.helpers.targets import Target, targets

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def skip_where_impossible(case: Case, dtype: torch.dtype, target: Target) -> None:
    if target.implementation == "torch" and case.stops:
        pytest.skip("torch's fused attention takes no stops")
    if target == Target("triton", "cpu") and dtype == torch.bfloat16:
        pytest.skip("Triton's interpreter has no bfloat16 product")


@everywhere
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", (*TEST_CASES, *LONG_CASES))
def test_varlen_forward(case: Case, dtype: torch.dtype, target: Target) -> None:
    skip_where_impossible(case, dtype, target)
    check_forward(make(case, dtype=dtype, device=target.device), target)


@everywhere
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", (*TEST_CASES, *LONG_CASES))
def test_varlen_gradients(case: Case, dtype: torch.dtype, target: Target) -> None:
    skip_where_impossible(case, dtype, target)
    if case in LONG_CASES and (target == Target("triton", "cpu") or dtype != torch.float32):
        pytest.skip("minutes in the interpreter; in C++ float32 stands for all")
    check_gradients(make(case, dtype=dtype, device=target.device), target)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("instruction_set", INSTRUCTION_SETS)
@pytest.mark.parametrize("case", TEST_CASES)
def test_every_instruction_set(
    case: Case, instruction_set: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    core = extension()
    if core is None:
        pytest.skip("the compiled extension is not installed")
    best = core.build_info()["instruction_set"]
    if INSTRUCTION_SETS.index(instruction_set) > INSTRUCTION_SETS.index(best):
        pytest.skip(f"this machine has no {instruction_set}")
    monkeypatch.setenv("ALIT_KERNELS_INSTRUCTION_SET", instruction_set)
    target = Target("cpp", "cpu")
    x = make(case, dtype=dtype)
    check_forward(x, target)
    check_gradients(x, target)


@everywhere
def test_a_thousand_sequences(target: Target) -> None:
    """The search for a tile's sequence goes over several blocks of offsets; most sequences are empty."""
    lengths = tuple(3 if b % 100 == 99 or b in (0, 255, 256, 257) else 0 for b in range(1000))
    x = make(Case(lengths, 1, 16, spare=1), device=target.device)
    check_forward(x, target)
    if target != Target("triton", "cpu"):  # milliseconds for each program
        check_gradients(x, target)


@pytest.mark.parametrize("target", targets("cpp")[1:])
def test_threads_do_not_change_the_result(target: Target) -> None:
    """Results are equal to the bit for any number of threads: with many tasks, and few, split by blocks of queries."""
    cases = (Case((70, 3, 300, 0, 65), 3, 16, masked=True), Case((400,), 1, 16))
    for case in (*cases, Case((520,), 1, 144, masked=True), Case((390,), 1, 16, stops="random")):
        x, results = make(case, device=target.device), []
        for threads in (1, 2, 3, 16):
            torch.set_num_threads(threads)
            run = lambda y: attend(y, target)  # noqa: E731
            results.append([*run(x), *gradients(x, torch.float32, run)])
        for other in results[1:]:
            for a, b in zip(results[0], other, strict=True):
                assert torch.equal(a, b)


@everywhere
def test_what_is_not_finite_stays_in_its_row(target: Target) -> None:
    """NaN in a query spoils its own row, NaN in a value the column of its sequence; nothing else changes."""
    x = make(Case((5, 20, 3), 1, 16), device=target.device)
    clean, clean_lse = attend(x, target)
    x.q[7], x.v[26, 0, 2] = torch.nan, torch.inf
    out, lse = attend(x, target)
    spoilt = torch.zeros_like(out, dtype=torch.bool)
    spoilt[7], spoilt[25:28, 0, 2] = True, True
    assert not out[spoilt].isfinite().any() and lse[0, 7].isnan()
    kept = torch.arange(28, device=target.device) != 7
    assert torch.equal(out[~spoilt], clean[~spoilt]) and torch.equal(
        lse[:, kept], clean_lse[:, kept]
    )


@everywhere
def test_no_key_gives_zeros(target: Target) -> None:
    q, k, v = dense(target, 1, 3, 2, 4)
    mask = torch.zeros(1, 3, dtype=torch.bool, device=target.device)
    out, lse = attention(
        q, k, v, key_mask=mask, return_lse=True, implementation=target.implementation
    )
    assert not out.any() and bool((lse == -torch.inf).all())
    torch.logaddexp(lse, lse).add(out.sum()).sum().backward()  # its gradients are NaN
    assert not q.grad.any() and not k.grad.any() and not v.grad.any()


@everywhere
@pytest.mark.parametrize("scale", (-0.7, 0.0, 2.0))
def test_any_scale(scale: float, target: Target) -> None:
    q, k, v = dense(target, 2, 7, 1, 16)
    weights = torch.randn_like(q)

    def run(implementation: str, dtype: torch.dtype) -> list[Tensor]:
        leaves = [x.detach().to(dtype).requires_grad_() for x in (q, k, v)]
        out, lse = attention(*leaves, scale=scale, return_lse=True, implementation=implementation)
        return [out, lse, *torch.autograd.grad((out * weights).sum() + lse.sum(), leaves)]

    ours, eager = (run(name, torch.float32) for name in (target.implementation, "reference"))
    exact = run("reference", torch.float64)
    for i, (a, e, x) in enumerate(zip(ours, eager, exact, strict=True)):
        assert_within_budget(a.detach(), e.detach(), x.detach(), k=2 if i < 2 else 3)


def test_gradcheck() -> None:
    q, k, v = (torch.randn(2, 3, 2, 4, dtype=torch.float64, requires_grad=True) for _ in range(3))
    mask = torch.tensor([[True, False, True], [True, True, True]])
    assert torch.autograd.gradcheck(
        lambda *x: attention(*x, key_mask=mask, return_lse=True), (q, k, v)
    )
    offsets = torch.tensor([0, 2, 2, 5], dtype=torch.int32)
    packed = [torch.randn(6, 2, 4, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    assert torch.autograd.gradcheck(
        lambda *x: varlen_attention(*x, offsets, max_length=3, return_lse=True), packed
    )


@everywhere
def test_permuting_sequences_permutes_outputs(target: Target) -> None:
    """Permuting sequences permutes outputs and gradients, to the bit; each sequence alone gives the same."""
    lengths, order = (5, 70, 2, 33), (2, 0, 3, 1)
    x = make(Case(lengths, 2, 16), device=target.device)
    pieces = [t.split(lengths) for t in x[:3]]

    def run(chosen: tuple[int, ...]) -> list[dict[int, Tensor]]:
        rows = [torch.cat([piece[b] for b in chosen]).requires_grad_() for piece in pieces]
        sizes = [lengths[b] for b in chosen]
        offsets = torch.tensor([0, *sizes], device=target.device).cumsum(0).int()
        out = varlen_attention(*rows, offsets, max_length=70, implementation=target.implementation)
        out.square().sum().backward()
        results = (out.detach(), *(r.grad for r in rows))
        return [dict(zip(chosen, t.split(sizes), strict=True)) for t in results]

    straight, shuffled = run((0, 1, 2, 3)), run(order)
    alone = [run((b,)) for b in range(4)]
    exact = target.implementation != "reference"  # its padded products may differ in the last bit
    tolerance = {"rtol": 0.0, "atol": 0.0} if exact else {}
    for t in range(4):
        for b in range(4):
            torch.testing.assert_close(shuffled[t][b], straight[t][b], **tolerance)
            torch.testing.assert_close(alone[b][t][b], straight[t][b], **tolerance)


@pytest.mark.parametrize("target", targets("triton"))
def test_attention_map(target: Target) -> None:
    x = make(Case((6, 0, 40), 3, 8, spare=2), device=target.device)
    lse = varlen_attention(*x[:4], max_length=41, return_lse=True)[1]
    result = attention_map(
        *(x.q, x.k, lse, x.offsets),
        queries=range(2, 38),
        keys=range(1, 36),
        max_length=41,
        implementation=target.implementation,
    )
    assert result.shape == (3, 36, 35)
    for b, (start, stop) in enumerate(((0, 6), (6, 6), (6, 46))):
        q, k = x.q[start:stop].transpose(0, 1), x.k[start:stop].transpose(0, 1)
        full = torch.zeros(41, 41, device=target.device)
        if stop > start:
            full[: stop - start, : stop - start] = (q @ k.mT * 8**-0.5).softmax(-1).mean(0)
        torch.testing.assert_close(result[b], full[2:38, 1:36])


def test_autocast_changes_the_inputs_and_nothing_inside() -> None:
    q, k, v = (torch.randn(2, 9, 2, 8, requires_grad=True) for _ in range(3))
    expected = attention(q.bfloat16(), k.bfloat16(), v.bfloat16(), return_lse=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = attention(q, k.bfloat16(), v, return_lse=True)
    for a, e in zip(actual, expected, strict=True):
        assert a.dtype == e.dtype and torch.equal(a, e)
    actual[0].sum().backward()
    assert q.grad.dtype == torch.float32


def test_heads_without_width() -> None:
    out = attention(*[torch.empty(1, 3, 2, 0)] * 3)
    assert out.shape == (1, 3, 2, 0)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"k": torch.randn(5, 2, 4)}, ValueError, "k: expected shape"),
        ({"v": torch.randn(6, 2, 4).half()}, TypeError, "v: expected dtype"),
        ({"q": torch.zeros(6, 2, 4, dtype=torch.int64)}, TypeError, "q: expected dtype"),
        ({"q": [1]}, TypeError, "q: expected a tensor"),
        ({"offsets": torch.tensor([0, 3, 6])}, TypeError, "offsets: expected dtype int32"),
        (
            {"offsets": torch.tensor([0, 4, 3], dtype=torch.int32)},
            ValueError,
            "offsets: expected an ascending",
        ),
        (
            {"offsets": torch.tensor([0, 4, 9], dtype=torch.int32)},
            ValueError,
            "offsets: expected at most 6 rows",
        ),
        ({"max_length": 2}, ValueError, "max_length: expected at least 3"),
        ({"max_length": 2.0}, TypeError, "max_length: expected an int"),
        ({"max_length": 2**31}, ValueError, r"max_length: expected less than 2\^31"),
        (
            {"max_key_length": 2},
            ValueError,
            "max_key_length: expected at least 3, the longest of offsets",
        ),
        ({"key_mask": torch.ones(5, dtype=torch.bool)}, ValueError, "key_mask: expected shape"),
        ({"key_stop": torch.ones(6)}, TypeError, "key_stop: expected dtype int32"),
        ({"key_stop": torch.ones(1, 6).int()}, ValueError, "key_stop: expected shape"),
        ({"key_stop": 3}, TypeError, "key_stop: expected a tensor"),
        (
            {"implementation": "fast"},
            ValueError,
            "implementation='fast' of alit_kernels.attention",
        ),
    ],
)
def test_wrong_arguments(change: dict[str, object], error: type[Exception], message: str) -> None:
    q, k, v = (torch.randn(6, 2, 4) for _ in range(3))
    arguments = {
        "q": q,
        "k": k,
        "v": v,
        "offsets": torch.tensor([0, 3, 6], dtype=torch.int32),
        "max_length": 3,
    }
    with pytest.raises(error, match=message):
        varlen_attention(**{**arguments, **change})


def test_wrong_map_ranges() -> None:
    x = make(Case((3,), 1, 4))
    lse = torch.zeros(1, 3)
    with pytest.raises(ValueError, match="queries: expected a range"):
        attention_map(*x[:2], lse, x.offsets, queries=range(0, 9), keys=range(2), max_length=3)
    with pytest.raises(TypeError, match="keys: expected a range"):
        attention_map(*x[:2], lse, x.offsets, queries=range(2), keys=[0], max_length=3)


@everywhere
@pytest.mark.parametrize("shared", (True, False))
def test_stops_of_a_dense_batch(shared: bool, target: Target) -> None:
    """Stops equal a mask of all pairs, forward and backward; stops beyond the ends are clamped."""
    if target.implementation == "torch":
        pytest.skip("torch's fused attention takes no stops")
    generator = torch.Generator().manual_seed(0)
    stops = torch.randint(-9, 90, (70,) if shared else (2, 70), generator=generator).int()
    seen = torch.arange(81) < stops.clamp(0, 81)[..., None]
    weights = torch.randn(2, 70, 2, 16, generator=generator)
    weights *= seen.any(-1)[..., None, None]  # torch has no zero for a query without any key
    q, k, v = (torch.randn(2, n, 2, 16, generator=generator) for n in (70, 81, 81))
    leaves = [x.to(target.device).requires_grad_() for x in (q, k, v)]
    out = attention(*leaves, key_stop=stops.to(target.device), implementation=target.implementation)
    ours = torch.autograd.grad((out * weights.to(out)).sum(), leaves)
    mask = (seen | ~seen.any(-1, keepdim=True)).expand(2, 70, 81)[:, None]
    doubles = [x.double().requires_grad_() for x in (q, k, v)]
    heads_first = [x.transpose(1, 2) for x in doubles]
    dense_out = torch.nn.functional.scaled_dot_product_attention(*heads_first, attn_mask=mask)
    dense_out = dense_out.transpose(1, 2) * seen.any(-1)[..., None, None]
    theirs = torch.autograd.grad((dense_out * weights).sum(), doubles)
    for a, b in zip((out.detach(), *ours), (dense_out.detach(), *theirs), strict=True):
        torch.testing.assert_close(a.cpu(), b.float())


def test_stops_of_usual_masks() -> None:
    assert stops_causal(4).tolist() == [1, 2, 3, 4]
    assert stops_prefix(5, 3).tolist() == [3, 3, 3, 4, 5]
    assert stops_blocks([1, 0, 2, 3]).tolist() == [1, 3, 3, 6, 6, 6]
    assert stops_blocks([]).dtype == torch.int32
    for call, name in (
        (lambda: stops_causal(-1), "n: "),
        (lambda: stops_prefix(3, 4), "prefix: "),
        (lambda: stops_blocks([1, -2]), r"sizes\[1\]: "),
        (lambda: stops_blocks(3), "sizes: "),
    ):
        with pytest.raises((TypeError, ValueError), match=name):
            call()
