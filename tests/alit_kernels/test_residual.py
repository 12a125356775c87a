"""ResidualVQ and GroupedVQ against loops over distances and rows."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from alit_kernels import VectorQuantized
from alit_kernels.nn import GroupedVQ, ResidualVQ, VectorQuantizer
from alit_kernels.nn.codebook import rotated

METRICS = pytest.mark.parametrize("metric", ("euclidean", "cosine"))
CHANNELS = pytest.mark.parametrize("channel_dim", (-1, 1))


def spread(module: torch.nn.Module) -> Any:
    """The module with codes as far apart as in a trained codebook."""
    with torch.no_grad():
        for part in module.modules():
            if isinstance(part, VectorQuantizer):
                part.embedding.weight.normal_()
    return module


def grid(channel_dim: int, dim: int = 4) -> Tensor:
    return torch.randn(3, 5, 2, dim).movedim(-1, channel_dim).requires_grad_()


def written_out(z: Tensor, books: list[Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Sum of codes (straight through), indices (..., L), sums of mean((r - sg(q))^2) and of mean((sg(r) - q)^2)."""
    residual, total, indices = z, torch.zeros_like(z), []
    commitment = codebook = torch.zeros(())
    for book in books:
        index = (residual[..., None, :] - book).square().sum(-1).argmin(-1)
        q = book[index]
        commitment = commitment + (residual - q.detach()).square().mean()
        codebook = codebook + (residual.detach() - q).square().mean()
        residual, total = residual - q.detach(), total + q.detach()
        indices.append(index)
    return z + (total - z).detach(), torch.stack(indices, -1), commitment, codebook


@pytest.mark.parametrize("shared", (False, True))
@CHANNELS
def test_residual_is_what_is_written_out(channel_dim: int, shared: bool) -> None:
    """Values, indices, losses and gradients equal the formulas of SoundStream and RQ-VAE."""
    module = spread(ResidualVQ(3, 16, 4, shared=shared, channel_dim=channel_dim, commitment=0.5))
    z = grid(channel_dim)
    weights = [level.embedding.weight for level in module.levels]
    result = module(z)
    expected = written_out(z.movedim(channel_dim, -1), weights * (3 if shared else 1))
    assert len(weights) == (1 if shared else 3) and result.mask is None
    assert torch.equal(result.index, expected[1])
    torch.testing.assert_close(result.quantized.movedim(channel_dim, -1), expected[0])
    torch.testing.assert_close(result.commitment_loss, 0.5 * expected[2])
    torch.testing.assert_close(result.codebook_loss, expected[3])
    torch.testing.assert_close(result.loss, 0.5 * expected[2] + expected[3])
    g = torch.randn_like(z)
    leaves = [z, *weights]
    found = torch.autograd.grad((result.quantized * g).sum() + result.loss, leaves)
    total = (expected[0] * g.movedim(channel_dim, -1)).sum() + 0.5 * expected[2] + expected[3]
    for a, b in zip(found, torch.autograd.grad(total, leaves), strict=True):
        torch.testing.assert_close(a, b)
    torch.testing.assert_close(module.codes(result.index), result.quantized)


@METRICS
@CHANNELS
def test_levels_of_each_image(channel_dim: int, metric: str) -> None:
    """An image with n levels equals a quantizer of n levels; masked places and levels add nothing, without gradient."""
    module = spread(ResidualVQ(3, 16, 4, metric=metric, channel_dim=channel_dim))
    z, levels, mask = grid(channel_dim), torch.tensor([2, 0, 3]), torch.rand(3, 5, 2) > 0.3
    z.detach().movedim(channel_dim, -1)[~mask] = torch.nan
    result = module(z, mask[:, None] if channel_dim == 1 else mask, levels=levels)
    expected_mask = mask[..., None] & (torch.arange(3) < levels[:, None, None, None])
    assert torch.equal(result.mask, expected_mask) and not result.index[~expected_mask].any()
    for image, n in enumerate(levels.tolist()):
        some = result.quantized[image : image + 1].movedim(channel_dim, -1)
        if n == 0:
            assert not some.any()
            continue
        short = copy.deepcopy(module)
        short.num_levels = n
        alone = short(z[image : image + 1], mask[image : image + 1])
        assert torch.equal(alone.index, result.index[image : image + 1, ..., :n])
        torch.testing.assert_close(alone.quantized.movedim(channel_dim, -1), some)
    torch.testing.assert_close(module.codes(result), result.quantized)
    torch.testing.assert_close(module.codes(result.index, result.mask), result.quantized)
    (result.quantized.sum() + result.loss).backward()
    grad = z.grad.movedim(channel_dim, -1)
    assert grad.isfinite().all() and not grad[~expected_mask.any(-1)].any()


def test_levels_of_a_single_vector() -> None:
    module = spread(ResidualVQ(3, 16, 4))
    z = torch.randn(4)
    result = module(z, levels=torch.tensor(2))
    assert result.mask.tolist() == [True, True, False]
    torch.testing.assert_close(result.quantized, module.codes(module(z).index[:2]))


def test_shared_averages_are_updated_level_by_level() -> None:
    module = spread(ResidualVQ(2, 16, 4, shared=True, ema_decay=0.9))
    assert list(module.state_dict()) == [
        f"levels.0.{name}" for name in ("embed_avg", "cluster_size", "embedding.weight")
    ]
    single: Any = copy.deepcopy(module.levels[0])
    z = torch.randn(50, 4)
    result = module(z)
    first = single(z)
    second = single(z - first.quantized)
    assert torch.equal(result.index, torch.stack([first.index, second.index], -1))
    assert torch.equal(result.loss, first.commitment_loss + second.commitment_loss)
    for name, value in single.state_dict().items():
        assert torch.equal(module.state_dict()[f"levels.0.{name}"], value)


@pytest.mark.parametrize("reentrant", (False, True))
@pytest.mark.parametrize("shared", (False, True))
def test_under_checkpoints(shared: bool, reentrant: bool) -> None:
    """Under checkpoints each level updates once a step, and gradients do not change."""
    module = spread(ResidualVQ(3, 16, 4, shared=shared, ema_decay=0.9, gradient="rotation"))
    other = copy.deepcopy(module)
    z = torch.randn(50, 4, requires_grad=True)

    def total(module: ResidualVQ, z: Tensor) -> Tensor:
        result = module(z)
        return result.quantized.square().sum() + result.loss

    (expected,) = torch.autograd.grad(total(module, z), z)
    checkpoint(total, other, z, use_reentrant=reentrant).backward()
    torch.testing.assert_close(z.grad, expected)
    for name, value in module.state_dict().items():
        assert torch.equal(value, other.state_dict()[name])


@METRICS
def test_rotation_to_the_sum(metric: str) -> None:
    module = spread(ResidualVQ(3, 16, 4, gradient="rotation", metric=metric))
    plain = spread(ResidualVQ(3, 16, 4, metric=metric))
    plain.load_state_dict(module.state_dict())
    z, g = torch.randn(20, 4, requires_grad=True), torch.randn(20, 4)
    found, expected = module(z), plain(z)
    for a, b in zip(found[:5], expected[:5], strict=True):
        assert torch.equal(a, b)
    wanted = torch.autograd.grad(rotated(expected.quantized, z, None, metric), z, g)
    assert torch.equal(torch.autograd.grad(found.quantized, z, g)[0], wanted[0])


def test_k_means_of_the_levels() -> None:
    """Each level is initialized by k-means of the residual of those before: the error falls with every level."""
    z = torch.randn(400, 4)
    z[300:] = torch.nan
    mask = torch.arange(400) < 300
    module = ResidualVQ(4, 16, 4, ema_decay=0.9)
    module.initialize(z, mask, generator=torch.Generator().manual_seed(0))
    assert all(level.cluster_size.sum() == 300 for level in module.levels)
    result = module.eval()(z, mask)
    errors = [
        float((module.codes(result.index[..., :n]) - z)[mask].square().mean()) for n in range(1, 5)
    ]
    assert all(later < 0.6 * earlier for earlier, later in itertools.pairwise(errors))


@CHANNELS
@pytest.mark.parametrize("num_levels", (None, 2))
def test_groups_are_quantizers_of_their_channels(num_levels: int | None, channel_dim: int) -> None:
    options: dict[str, Any] = {"metric": "cosine", "channel_dim": channel_dim}
    module = spread(GroupedVQ(2, 16, 6, num_levels=num_levels, **options))
    z, mask = grid(channel_dim, 6), torch.rand(3, 5, 2) > 0.3
    result = module(z, mask)
    alone = [
        group(x, mask) for group, x in zip(module.groups, z.chunk(2, channel_dim), strict=True)
    ]
    shape = (3, 5, 2, 2) if num_levels is None else (3, 5, 2, 2, num_levels)
    assert result.index.shape == result.mask.shape == shape
    for i, each in enumerate(alone):
        assert torch.equal(result.index[:, :, :, i], each.index)
        assert torch.equal(result.quantized.chunk(2, channel_dim)[i], each.quantized)
    for name in ("loss", "commitment_loss", "codebook_loss"):
        mean = (getattr(alone[0], name) + getattr(alone[1], name)) / 2
        torch.testing.assert_close(getattr(result, name), mean)
    torch.testing.assert_close(module.codes(result.index, result.mask), result.quantized)
    whole = spread(GroupedVQ(2, 16, 6))
    z = torch.randn(7, 6)
    error = (whole.codes(whole(z).index) - z).square().mean()
    torch.testing.assert_close(whole(z).codebook_loss, error)


def test_levels_within_groups() -> None:
    module = spread(GroupedVQ(2, 16, 6, num_levels=3))
    levels = torch.tensor([1, 3])
    mask = module(torch.randn(2, 5, 6), levels=levels).mask
    assert torch.equal(mask.sum(-1), levels[:, None, None].expand(2, 5, 2))


def modules() -> dict[str, Any]:
    options: dict[str, Any] = {"ema_decay": 0.9, "dead_code_threshold": 0.05}
    return {
        "residual": ResidualVQ(2, 8, 4, gradient="rotation", **options),
        "shared": ResidualVQ(2, 8, 4, shared=True, codebook_weight=0.5),
        "grouped": GroupedVQ(2, 8, 4, **options),
        "grouped residual": GroupedVQ(2, 8, 4, num_levels=2),
    }


@pytest.mark.parametrize("name", modules())
def test_compiles_without_graph_break(name: str) -> None:
    module = spread(modules()[name])
    other = copy.deepcopy(module)
    compiled = torch.compile(other, fullgraph=True, backend="aot_eager")
    for step in range(2):
        z, mask = torch.randn(6 + step, 5, 4, requires_grad=True), torch.rand(6 + step, 5) > 0.2
        results = []
        for function in (module, compiled):
            torch.manual_seed(step)
            result = function(z, mask)
            total = result.quantized.square().sum() + result.loss
            results.append([*result, *torch.autograd.grad(total, z)])
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b)
    for name, value in module.state_dict().items():
        torch.testing.assert_close(value, other.state_dict()[name])


@pytest.mark.parametrize("name", modules())
def test_narrow_and_empty_input(name: str) -> None:
    module = modules()[name].eval()
    z = torch.randn(2, 3, 4)
    for a, b in zip(module(z.bfloat16())[:5], module(z.bfloat16().float())[:5], strict=True):
        assert torch.equal(a, b)
    empty = module(z[:0])
    assert empty.quantized.shape == (0, 3, 4) and empty.loss == 0 and len(empty.index) == 0


def test_groups_are_initialized_with_their_channels() -> None:
    torch.manual_seed(0)
    z = torch.cat([torch.randint(0, 8, (500, 2)) % 4, torch.randint(10, 14, (500, 2))], 1).float()
    for module, worst in ((GroupedVQ(2, 16, 4), 0.3), (GroupedVQ(2, 16, 4, num_levels=3), 0.03)):
        module.initialize(z)
        assert (module.eval()(z).quantized - z).square().mean() < worst


RESIDUAL, GROUPED = ResidualVQ(2, 8, 4), GroupedVQ(2, 8, 4)
Z, INDEX = torch.randn(3, 4), torch.zeros(3, 2, dtype=torch.int64)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: ResidualVQ(0, 8, 4), ValueError, "num_levels: expected at least 1, got 0"),
        (lambda: ResidualVQ(2, 8, 4, shared=1), TypeError, "shared: expected a bool, got int"),
        (lambda: ResidualVQ(2, 8, 4, gradient="gumbel"), ValueError, "gradient: expected one of"),
        (lambda: ResidualVQ(2, 8, 4, metric="dot"), ValueError, "metric: expected one of"),
        (lambda: ResidualVQ(2, 8, 4, decay=0.9), TypeError, "decay"),
        (lambda: RESIDUAL(Z[:, :3]), ValueError, r"z: expected shape \(\.\.\., 4\), got"),
        (lambda: RESIDUAL(Z, levels=INDEX), ValueError, r"levels: expected shape \(3\), got"),
        (lambda: RESIDUAL(Z, levels=Z[:, 0]), TypeError, "levels: expected dtype int32 or int64"),
        (lambda: RESIDUAL(Z, levels=2), TypeError, "levels: expected a tensor, got int"),
        (lambda: RESIDUAL.codes(INDEX[:, [0, 0, 0]]), ValueError, "index: expected shape"),
        (lambda: RESIDUAL.codes(INDEX + 8), ValueError, r"index: expected values in 0\.\.7"),
        (lambda: GroupedVQ(0, 8, 4), ValueError, "num_groups: expected at least 1"),
        (lambda: GroupedVQ(3, 8, 4), ValueError, "dim: expected a multiple of num_groups, 3, got 4"),
        (lambda: GROUPED(Z[:, :3]), ValueError, "z: expected 4 channels in dimension -1, got"),
        (lambda: GROUPED(Z, levels=INDEX[:, 0]), ValueError, "levels: expected None without num_levels"),
        (lambda: GROUPED("z"), TypeError, "z: expected a tensor, got str"),
        (lambda: GROUPED.codes(INDEX[:, :1]), ValueError, "index: expected 2 groups"),
    ],
)  # fmt: skip
def test_wrong_arguments(call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


def test_results_are_those_of_a_quantizer() -> None:
    for module in modules().values():
        assert type(module(torch.randn(5, 4))) is VectorQuantized
