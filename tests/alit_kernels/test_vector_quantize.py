"""nearest_codeword, codebook_statistics, vector_quantize and the VectorQuantizer module."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import normalize

from alit_kernels import codebook_statistics, nearest_codeword, vector_quantize
from alit_kernels.nn import VectorQuantizer
from alit_kernels.testing import assert_exact_nearest, assert_within_budget
from alit_kernels.vector_quantize.cases import TEST_CASES, Case, make

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("metric", ("euclidean", "cosine"))
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", TEST_CASES)
def test_search_is_exact(case: Case, dtype: torch.dtype, metric: str) -> None:
    z, codebook, _ = make(case, dtype=dtype)
    index = nearest_codeword(z, codebook, metric=metric)
    if metric == "cosine":
        z, codebook = normalize(z.float(), dim=-1), normalize(codebook.float(), dim=-1)
    assert_exact_nearest(index, z, codebook)


def test_search_with_nan_and_inf() -> None:
    nan, inf = torch.nan, torch.inf
    codebook = torch.tensor([[nan, 0.0], [5.0, 0.0], [inf, 0.0], [5.0, 0.0]])
    z = torch.tensor([[4.0, 0.0], [nan, 0.0], [inf, 0.0], [-inf, 1.0]])
    index = nearest_codeword(z, codebook)
    # Ties take the lowest index; NaN never wins; all NaN gives 0; an infinite distance beats a NaN one.
    assert index.tolist() == [1, 0, 1, 1]
    assert_exact_nearest(index, z, codebook)


def test_exactness_check_rejects() -> None:
    """The check itself must be able to fail."""
    z, codebook, _ = make(Case(20, 30, 4))
    index = nearest_codeword(z, codebook)
    wrong = index.clone()
    wrong[7] = (wrong[7] + 1) % 30
    with pytest.raises(AssertionError, match="not nearest"):
        assert_exact_nearest(wrong, z, codebook)
    doubled = torch.cat([codebook, codebook])
    with pytest.raises(AssertionError, match="lowest index"):
        assert_exact_nearest(index + 30, z, doubled)


def test_search_of_strided_inputs() -> None:
    z, codebook, _ = make(Case(24, 16, 6))
    expected = nearest_codeword(z, codebook)
    assert torch.equal(nearest_codeword(z.t().contiguous().t(), codebook), expected)
    assert torch.equal(
        nearest_codeword(torch.cat([z, z], 1)[:, :6], codebook.t().contiguous().t()), expected
    )
    assert torch.equal(nearest_codeword(z[:1].expand(5, -1), codebook), expected[:1].expand(5))


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 40), st.integers(1, 20), st.integers(1, 9))
def test_search_properties(seed: int, vectors: int, codes: int, dim: int) -> None:
    z, codebook, _ = make(Case(vectors, codes, dim), seed=seed)
    index = nearest_codeword(z, codebook)
    order = torch.randperm(vectors, generator=torch.Generator().manual_seed(seed))
    assert torch.equal(nearest_codeword(z[order], codebook), index[order])
    assert torch.equal(nearest_codeword(4 * z, 4 * codebook), index)
    assert torch.equal(
        nearest_codeword(4 * z, codebook, metric="cosine"),
        nearest_codeword(z, codebook, metric="cosine"),
    )


@pytest.mark.parametrize("masked", (False, True))
def test_statistics(masked: bool) -> None:
    z, index = torch.randn(50, 6), torch.randint(9, (50,))
    mask = torch.rand(50) > 0.4 if masked else None
    if mask is not None:
        z[~mask], index[~mask] = torch.nan, 10**9
    count, total = codebook_statistics(index, z, 12, mask=mask)
    for code in range(12):
        mine = (index == code) if mask is None else (index == code) & mask
        assert count[code] == mine.sum()
        torch.testing.assert_close(total[code], z[mine].sum(0))
    again = codebook_statistics(index, z, 12, mask=mask)
    assert torch.equal(count, again[0]) and torch.equal(total, again[1])


def written_out(
    z: Tensor, codebook: Tensor, index: Tensor, mask: Tensor | None, metric: str
) -> dict[str, Tensor]:
    """Losses and straight-through output, differentiated by autograd at fixed indices."""
    if mask is not None:
        z, index = z[mask], index[mask]
    u, e = (
        (normalize(z, dim=-1), normalize(codebook, dim=-1)) if metric == "cosine" else (z, codebook)
    )
    q = e[index]
    commitment = 0.25 * (u - q.detach()).square().mean() if u.numel() else u.sum()
    codebook_loss = (q - u.detach()).square().mean() if u.numel() else 0 * codebook.sum()
    return {"quantized": u + (q - u).detach(), "commitment": commitment, "codebook": codebook_loss}


@pytest.mark.parametrize("metric", ("euclidean", "cosine"))
@pytest.mark.parametrize(
    "case", [case for case in TEST_CASES if case.layout not in ("tiny", "huge")]
)
def test_quantizer_forward_and_gradients(case: Case, metric: str) -> None:
    inputs = make(case)
    index = vector_quantize(inputs.z, inputs.codebook, metric=metric, mask=inputs.mask).index
    weights = torch.randn(inputs.z.shape, generator=torch.Generator().manual_seed(2))

    def run(dtype: torch.dtype, ours: bool) -> list[Tensor]:
        z, codebook = (
            t.detach().clone().to(dtype).requires_grad_() for t in (inputs.z, inputs.codebook)
        )
        if ours:
            r = vector_quantize(z, codebook, metric=metric, mask=inputs.mask)
            quantized, commitment, codebook_loss = r.quantized, r.commitment_loss, r.codebook_loss
            torch.testing.assert_close(r.loss, commitment + codebook_loss)
            quantized = quantized if inputs.mask is None else quantized[inputs.mask]
        else:
            result = written_out(z, codebook, index, inputs.mask, metric)
            quantized, commitment, codebook_loss = (
                result["quantized"],
                result["commitment"],
                result["codebook"],
            )
        w = weights.to(dtype) if inputs.mask is None else weights.to(dtype)[inputs.mask]
        (3 * commitment + 2 * codebook_loss + (quantized * w).sum()).backward()
        return [quantized, commitment, codebook_loss, z.grad, codebook.grad]

    names = ("quantized", "commitment", "codebook loss", "gradient of z", "gradient of codebook")
    for name, a, e, x in zip(
        names,
        run(torch.float32, True),
        run(torch.float32, False),
        run(torch.float64, False),
        strict=True,
    ):
        assert_within_budget(
            a.detach(), e.detach(), x.detach(), k=3 if "gradient" in name else 2, what=name
        )


def test_straight_through_gradient_is_its_formula() -> None:
    """Euclidean: identity to z, nothing to the codebook. Cosine: (g - u (u . g)) / |z|."""
    z, codebook = torch.randn(7, 5, requires_grad=True), torch.randn(9, 5, requires_grad=True)
    weights = torch.randn(7, 5)
    (vector_quantize(z, codebook).quantized * weights).sum().backward()
    assert torch.equal(z.grad, weights) and not codebook.grad.any()
    z.grad = None
    (vector_quantize(z, codebook, metric="cosine").quantized * weights).sum().backward()
    norm = z.detach().norm(dim=-1, keepdim=True)
    u = z.detach() / norm
    torch.testing.assert_close(z.grad, (weights - u * (u * weights).sum(-1, keepdim=True)) / norm)


@pytest.mark.parametrize("metric", ("euclidean", "cosine"))
def test_gradcheck_of_losses(metric: str) -> None:
    """With stop-gradients the loss is no gradient field: each loss is checked in the argument it moves."""
    z, codebook = torch.randn(5, 3, dtype=torch.float64), 3 * torch.randn(4, 3, dtype=torch.float64)
    mask = torch.tensor([True, True, False, True, True])

    def loss(name: str) -> object:
        return lambda x, c: getattr(vector_quantize(x, c, metric=metric, mask=mask), name)

    assert torch.autograd.gradcheck(
        lambda x: loss("commitment_loss")(x, codebook), z.clone().requires_grad_()
    )
    assert torch.autograd.gradcheck(
        lambda c: loss("codebook_loss")(z, c), codebook.clone().requires_grad_()
    )


def test_masked_equals_removed() -> None:
    z, codebook, mask = make(Case(64, 30, 12, masked=True))
    whole, kept = vector_quantize(z, codebook, mask=mask), vector_quantize(z[mask], codebook)
    assert torch.equal(whole.index[mask], kept.index) and torch.equal(
        whole.quantized[mask], kept.quantized
    )
    assert not whole.index[~mask].any() and not whole.quantized[~mask].any()
    torch.testing.assert_close(whole.loss, kept.loss)
    nothing = vector_quantize(z, codebook, mask=torch.zeros_like(mask))
    assert nothing.loss == 0


def test_shapes_and_autocast() -> None:
    codebook = torch.randn(6, 4)
    assert vector_quantize(torch.randn(2, 3, 5, 4), codebook).index.shape == (2, 3, 5)
    single = vector_quantize(codebook[3], codebook)
    assert single.index.shape == () and int(single.index) == 3
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = vector_quantize(torch.randn(3, 4).bfloat16(), codebook)
    assert result.quantized.dtype == torch.float32


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"codebook": torch.randn(5, 3)}, ValueError, "codebook: expected shape"),
        ({"codebook": torch.randn(0, 4)}, ValueError, "codebook: expected at least 1 row"),
        ({"codebook": torch.randn(5, 4).half()}, TypeError, "codebook: expected dtype"),
        ({"z": torch.zeros(3, 4, dtype=torch.int64)}, TypeError, "z: expected dtype"),
        ({"metric": "manhattan"}, ValueError, "metric: expected one of"),
        ({"precision": "fp8"}, ValueError, "precision: expected one of"),
        ({"mask": torch.ones(4, dtype=torch.bool)}, ValueError, "mask: expected shape"),
        (
            {"implementation": "cuda"},
            ValueError,
            "implementation='cuda' of alit_kernels.vector_quantize cannot run",
        ),
    ],
)
def test_wrong_arguments(change: dict[str, object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        vector_quantize(**{"z": torch.randn(3, 4), "codebook": torch.randn(5, 4), **change})


def test_wrong_statistics_arguments() -> None:
    with pytest.raises(ValueError, match=r"index: expected values in 0\.\.3, got 4\.\.4"):
        codebook_statistics(torch.tensor([4]), torch.randn(1, 2), 4)
    with pytest.raises(ValueError, match="num_codes: expected at least 1"):
        codebook_statistics(torch.tensor([0]), torch.randn(1, 2), 0)


def test_module_moving_average_backward() -> None:
    """The update happens in place after the loss; the backward still sees the codebook of the forward."""
    module = VectorQuantizer(8, 4, metric="cosine", ema_decay=0.9)
    z = torch.randn(20, 4, requires_grad=True)
    before = module.embedding.weight.clone()
    first, second = module(z), module(z)
    (first.loss + second.loss).backward()
    assert not torch.equal(before, module.embedding.weight)
    assert z.grad.isfinite().all() and module.embedding.weight.grad is None
    torch.testing.assert_close(
        first.loss, vector_quantize(z, before, metric="cosine").commitment_loss
    )


def test_module_state_and_evaluation() -> None:
    module = VectorQuantizer(8, 4, metric="cosine", ema_decay=0.9).eval()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    result = module(torch.randn(2, 3, 4))
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    torch.testing.assert_close(module.codes(result.index), result.quantized)
    with pytest.raises(ValueError, match="ema_decay"):
        VectorQuantizer(8, 4, ema_decay=1.5)
    with pytest.raises(ValueError, match="metric"):
        VectorQuantizer(8, 4, metric="dot")


@pytest.mark.parametrize("mask", [None, False])
def test_module_first_batch_without_vectors(mask: bool | None) -> None:
    module = VectorQuantizer(8, 4, ema_decay=0.9)
    before = module.embedding.weight.clone()
    z = torch.randn(0 if mask is None else 5, 4)
    module(z, None if mask is None else torch.zeros(5, dtype=torch.bool))
    assert torch.equal(module.embedding.weight, before)


def test_module_learns_nothing_without_gradients() -> None:
    module = VectorQuantizer(8, 4, ema_decay=0.9)
    before = module.embedding.weight.clone()
    with torch.no_grad():
        module(torch.randn(5, 4))
    assert torch.equal(module.embedding.weight, before)


def test_codebook_gradient_is_deterministic() -> None:
    z, codebook = torch.randn(100_000, 12), torch.randn(8, 12, requires_grad=True)
    gradients = []
    for _ in range(4):
        codebook.grad = None
        vector_quantize(z, codebook).loss.backward()
        gradients.append(codebook.grad.clone())
    assert all(torch.equal(gradients[0], other) for other in gradients[1:])
