"""The lapped transform of a DCT base, and the network that corrects its images."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from alit import DCTConfig
from alit.base.dct import BlockDCT, DCTBase, LappedTransform

PATCH = 8
EVERYTHING = (PATCH**2, PATCH**2, PATCH**2)
GRIDS = [(1, 1), (1, 3), (2, 1), (3, 4)]


def noise(height: int, width: int, count: int = 2) -> Tensor:
    return torch.rand(count, 3, height, width, generator=torch.Generator().manual_seed(0))


def smooth(side: int = 64, points: int = 7) -> Tensor:
    """Smooth images, (4, 3, side, side)."""
    few = noise(points, points, count=4)
    return interpolate(few, size=(side, side), mode="bicubic", align_corners=True).clamp(0, 1)


def shortened(images: Tensor, *, lapped: bool, luma: int = 6, chroma: int = 2) -> Tensor:
    """Images decoded from the lowest coefficients, of the same shape."""
    base = DCTBase(DCTConfig(patch_size=PATCH, luma=luma, chroma=chroma, lapped=lapped))
    grid = (images.shape[2] // PATCH, images.shape[3] // PATCH)
    return base.pixels(base.encode(images).code_BNC, grid)


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("patch", [2, PATCH, 12])
def test_all_coefficients_give_the_image_back(grid: tuple[int, int], patch: int) -> None:
    images = noise(grid[0] * patch, grid[1] * patch)
    transform = LappedTransform(patch, (patch**2, patch**2, patch**2))
    coefficients = transform(images)
    assert coefficients.shape == (2, 3 * patch**2, *grid)
    torch.testing.assert_close(transform.inverse(coefficients), images, atol=1e-5, rtol=0)


def test_planes_have_equal_units() -> None:
    """A unit of the same coefficient in any plane makes the same squared RGB error."""
    transform = LappedTransform(PATCH, EVERYTHING)
    units = torch.eye(3 * PATCH**2).view(-1, 3 * PATCH**2, 1, 1)
    energy = transform.inverse(units).double().square().sum((1, 2, 3)).view(3, -1)
    torch.testing.assert_close(energy[1:], energy[:1].expand(2, -1), rtol=1e-4, atol=0)


def test_the_lowest_basis_function_has_no_step() -> None:
    """The lowest basis function rises from zero half a patch outside its own, without a jump."""
    transform, size = LappedTransform(32, (1, 1, 1)), 3
    units = torch.zeros(1, 3, size, size)
    units[0, 0, 1, 1] = 1
    row = transform.inverse(units)[0, 0, 48]
    assert row[:16].abs().max() == 0 and row[-16:].abs().max() == 0
    assert row.diff().abs().max() < 0.1 * row.max(), row


@pytest.mark.parametrize("grid", GRIDS)
def test_a_constant_image_takes_one_coefficient_of_a_plane(grid: tuple[int, int]) -> None:
    color = torch.tensor([0.4, -0.2, 0.1]).view(1, 3, 1, 1)
    images = color.expand(1, 3, grid[0] * PATCH, grid[1] * PATCH)
    planes = LappedTransform(PATCH, EVERYTHING)(images).unflatten(1, (3, PATCH**2))
    assert planes[:, :, 1:].abs().max() < 1e-5
    first = planes[:, :, :1]
    assert bool((first.abs() > 0.05).all())
    torch.testing.assert_close(first, first[..., :1, :1].expand_as(first), atol=1e-5, rtol=0)


def test_tokens_are_in_units_of_deviations() -> None:
    """Tokens are coefficients divided by their deviations; the code has the units of the error."""
    base, images = DCTBase(DCTConfig(patch_size=PATCH, luma=6, chroma=2, lapped=True)), smooth()
    found = base.encode(images)
    coefficients = base.transform(images - 0.5)
    torch.testing.assert_close(found.code_BNC, coefficients.flatten(2).mT)
    ratio = coefficients / found.tokens_BCHW
    torch.testing.assert_close(ratio, ratio[:1, :, :1, :1].expand_as(ratio), atol=1e-4, rtol=1e-4)
    deviations = ratio[0, :, 0, 0]
    luma, chroma = deviations[:6], deviations[6:].view(2, 2)
    assert bool((luma[1:] < 1.001 * luma[:-1]).all())
    torch.testing.assert_close(chroma, luma[:2].expand(2, 2) / 3)
    again = base.predict(found.tokens_BCHW.flatten(2).mT, None)
    torch.testing.assert_close(
        again.code_BNC, found.code_BNC * again.code_BNC.norm() / found.code_BNC.norm()
    )
    blocks = DCTBase(DCTConfig(patch_size=PATCH, luma=6, chroma=2)).encode(images)
    torch.testing.assert_close(blocks.tokens_BCHW.flatten(2).mT, blocks.code_BNC)


def test_reaches_halfway_into_neighbors() -> None:
    """Coefficients of a patch depend on, and decode to, pixels up to half a patch away, in both directions."""
    images, transform = noise(3 * PATCH, 3 * PATCH, count=1), LappedTransform(PATCH, EVERYTHING)
    far, near = images.clone(), images.clone()
    far[..., PATCH + PATCH // 2 :] = 0
    near[..., PATCH + PATCH // 2 - 1 :] = 0
    first, same, other = (transform(x)[..., 0] for x in (images, far, near))
    torch.testing.assert_close(same, first)
    assert not torch.allclose(other, first, atol=1e-3)
    impulse = torch.zeros(1, 3 * PATCH**2, 3, 3)
    impulse[:, 0, 1, 1] = 1
    reached = transform.inverse(impulse)[0, 0].abs() > 1e-6
    half = PATCH // 2
    assert not bool(reached[:half].any() | reached[-half:].any())
    assert bool(reached[half:PATCH].any()), "into the patch above"
    assert bool(reached[:, half:PATCH].any()), "and into that to the left"


def test_fewer_coefficients_for_a_smooth_image() -> None:
    images = smooth()
    blocks, lapped = (
        float((shortened(images, lapped=x) - images).square().mean()) for x in (False, True)
    )
    assert lapped < 0.8 * blocks, (lapped, blocks)


def test_no_step_at_borders_of_patches() -> None:
    """The lapped transform with few coefficients has no step at borders of patches; a block transform has."""

    def step(images: Tensor) -> float:
        """Ratio of the mean step across borders of patches to that within."""
        steps = images.diff(dim=-1).abs().mean((0, 1, 2))
        across = torch.arange(1, images.shape[-1]) % PATCH == 0
        return float(steps[across].mean() / steps[~across].mean())

    images = smooth()
    assert step(images) == pytest.approx(1, abs=0.1)
    assert step(shortened(images, lapped=False)) > 1.3
    assert step(shortened(images, lapped=True)) < 1


@pytest.mark.parametrize("patch", [1, 3, 9])
def test_odd_patches(patch: int) -> None:
    with pytest.raises(ValueError, match=f"patch_size: a lapped transform needs .* got {patch}"):
        DCTConfig(patch_size=patch, luma=1, chroma=1, lapped=True)
    assert DCTConfig(patch_size=patch, luma=1, chroma=1).latent_channels == 3


def test_blocks_unless_asked_for() -> None:
    base = DCTBase(DCTConfig(patch_size=PATCH, luma=3, chroma=1))
    assert isinstance(base.transform, BlockDCT)
    assert not list(base.parameters())
    assert not base.state_dict()


def test_half_precision() -> None:
    """The transform follows the dtype of the images."""
    images = smooth()
    transform = LappedTransform(PATCH, (6, 2, 2))
    exact = transform.inverse(transform(images - 0.5))
    half = transform.inverse(transform(images.bfloat16() - 0.5))
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), exact, atol=0.02, rtol=0)


def test_a_base_without_weights_cannot_be_trained() -> None:
    with pytest.raises(ValueError, match="base: DCTBase has no weights to train"):
        DCTBase(DCTConfig(patch_size=PATCH, luma=6, chroma=2)).autoencode(smooth())
