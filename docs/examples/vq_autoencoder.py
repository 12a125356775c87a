"""A VQ autoencoder on the photographs that come inside scikit-image.

Shows: `alit_kernels.nn.VectorQuantizer` in a model of your own: k-means start, moving-average codebook, the loss that
it returns, how many codes are in use. After training it draws four photographs above their reconstructions.

Run:  python docs/examples/vq_autoencoder.py             # minutes on a CPU
      python docs/examples/vq_autoencoder.py --steps 50  # a quick look
Needs: pip install scikit-image
"""

from __future__ import annotations

import argparse

import torch
import torch.nn.functional as F
from PIL import Image
from skimage import data
from torch import Tensor, nn

from alit_kernels.nn import VectorQuantizer

NAMES = ("astronaut", "chelsea", "coffee", "rocket")
SIDE = 128


def photographs() -> Tensor:
    """(4, 3, 128, 128) in [0, 1]."""
    found = [torch.from_numpy(getattr(data, name)()).permute(2, 0, 1) / 255 for name in NAMES]
    squares = [x[:, : min(x.shape[1:]), : min(x.shape[1:])] for x in found]
    return torch.cat([F.interpolate(x[None], (SIDE, SIDE), mode="area") for x in squares])


class Autoencoder(nn.Module):
    """8 x 8 pixels become one of 512 codes: 9 bits instead of 1536."""

    def __init__(self, width: int = 64, num_codes: int = 512, dim: int = 8) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Conv2d(3, width, 8, stride=8), nn.GELU(), nn.Conv2d(width, dim, 1)
        )
        # Codes that hardly anything chose move to a random vector of the batch.
        self.quantizer = VectorQuantizer(
            num_codes, dim, ema_decay=0.95, dead_code_threshold=0.05, channel_dim=1
        )
        self.decoder = nn.Sequential(
            nn.Conv2d(dim, width, 3, padding=1),
            nn.GELU(),
            nn.ConvTranspose2d(width, 3, 8, stride=8),
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--output", default="vq_autoencoder.png")
    arguments, _ = parser.parse_args(), torch.manual_seed(0)
    images, model = photographs(), Autoencoder()
    with torch.no_grad():
        model.quantizer.initialize(model.encoder(images))  # k-means of the first vectors
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for step in range(arguments.steps + 1):
        result = model.quantizer(model.encoder(images))
        reconstruction = model.decoder(result.quantized)
        error = F.mse_loss(reconstruction, images)
        optimizer.zero_grad()
        (error + result.loss).backward()
        optimizer.step()
        if step % max(arguments.steps // 5, 1) == 0:
            usage, psnr = model.quantizer.usage(result), -10 * error.log10().item()
            print(f"step {step:5}  PSNR {psnr:5.2f} dB  codes in use {usage.fraction.item():4.0%}")
    sheet = torch.cat([torch.cat(list(x), -1) for x in (images, reconstruction.detach())], 1)
    pixels = (sheet.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()
    Image.fromarray(pixels).save(arguments.output)
    print(f"{arguments.output}: photographs above, reconstructions below")


if __name__ == "__main__":
    main()
