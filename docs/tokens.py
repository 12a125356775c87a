"""The image of the README, docs/images/tokens.jpg: ``python docs/tokens.py``; needs the extra ``demo``.

Photographs that come with scikit-image, and what the shipped tokenizer gives back of the tokens that each needs.
"""

from __future__ import annotations

from pathlib import Path

import torch

from alit import AdaptiveTokenizer, RelativeL1
from alit.demo import photographs
from alit.demo.sheet import Tile, sheet

NAMES = ("clock", "retina", "rocket", "coffee", "astronaut", "cat")
OUTPUT = Path(__file__).parent / "images" / "tokens.jpg"


@torch.no_grad()
def main() -> None:
    model = AdaptiveTokenizer.from_pretrained("nano")
    photos = photographs(model.config.image_size[0])
    images = torch.stack([photos[name] for name in NAMES])
    tokens = model.encode(images, RelativeL1(0.35))
    shown, lengths = model.decode(tokens).clamp(0, 1), tokens.lengths.tolist()
    order = sorted(range(len(NAMES)), key=lengths.__getitem__)
    above = [Tile(NAMES[i], images[i]) for i in order]
    below = [Tile(f"{lengths[i]} token{'s' * (lengths[i] != 1)}", shown[i]) for i in order]
    OUTPUT.parent.mkdir(exist_ok=True)
    sheet([""] * len(order), [above, below], together=2).save(OUTPUT, quality=88)


if __name__ == "__main__":
    main()
