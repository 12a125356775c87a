"""Demo on the photographs that come with scikit-image: a page of results, or training (``live``)."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from ..images import load_square

PHOTOGRAPHS = {
    "astronaut": "astronaut.png",
    "cameraman": "camera.png",
    "cat": "chelsea.png",
    "coffee": "coffee.png",
    "rocket": "rocket.jpg",
    "motorcycle": "motorcycle_left.png",
    "coins": "coins.png",
    "moon": "moon.png",
    "brick": "brick.png",
    "retina": "retina.jpg",
    "galaxies": "hubble_deep_field.jpg",
    "tissue": "ihc.png",
    "grass": "grass.png",
    "gravel": "gravel.png",
    "clock": "clock_motion.png",
    "cell": "cell.png",
}
#: Photographs shown at every length; the first two also with attention maps.
FEATURED = ("astronaut", "cat", "coffee", "rocket", "motorcycle", "moon")


def photographs(size: int) -> dict[str, Tensor]:
    """Center squares of the photographs by name, (3, size, size) in [0, 1].

    Raises:
        ModuleNotFoundError: scikit-image is not installed.
    """
    import skimage

    folder = Path(skimage.__file__).parent / "data"
    return {name: load_square(folder / file, size) for name, file in PHOTOGRAPHS.items()}
