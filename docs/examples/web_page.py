"""Decode an image to a web page with a slider over its tokens.

Shows: `AdaptiveTokenizer` with the shipped weights: one call of `encode`, `truncated` for every shorter description,
`decode`, which needs nothing but the tokens. The page is one file, works offline, and loads nothing from elsewhere.

Run:  python docs/examples/web_page.py photo.jpg           # writes tokens.html
      python docs/examples/web_page.py --lengths 16,64,256  # a photograph that comes inside scikit-image
"""

from __future__ import annotations

import argparse
import base64
import io
import json
from pathlib import Path

import torch
from PIL import Image
from skimage import data

from alit import AdaptiveTokenizer, FixedLength
from alit.images import load, to_image

PAGE = """<!doctype html>
<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>Tokens</title>
<style>
  body { font: 16px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 40rem; padding: 0 1rem;
         color-scheme: light dark; color: CanvasText; background: Canvas; }
  div { display: flex; gap: 1rem; flex-wrap: wrap; } img { width: 256px; } input { width: 100%; }
</style>
<h1>An image in <output id="count"></output> tokens</h1>
<div><img id="seen" alt="reconstruction"><img src="ORIGINAL" alt="original"></div>
<p><label>Tokens <input id="slider" type="range" min="0"></label></p><p id="cost"></p>
<script>
  const steps = STEPS, find = name => document.getElementById(name);
  const show = i => {
    find("count").textContent = steps[i].tokens; find("seen").src = steps[i].image;
    find("cost").textContent = `${steps[i].bytes} bytes, mean pixel error ${steps[i].error}`;
  };
  find("slider").max = steps.length - 1; find("slider").value = steps.length - 1;
  find("slider").oninput = event => show(event.target.value); show(steps.length - 1);
</script>
"""


def embedded(image: Image.Image) -> str:
    file = io.BytesIO()
    image.save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("photo", nargs="?", help="default: the astronaut of scikit-image")
    parser.add_argument("--lengths", default="1,2,4,8,16,32,64,96,128,160,192,224,256")
    parser.add_argument("--output", type=Path, default=Path("tokens.html"))
    arguments = parser.parse_args()
    model = AdaptiveTokenizer.from_pretrained("nano")
    if arguments.photo:
        photo = load(arguments.photo, model.config.image_size)  # (3, 256, 256) in [0, 1]
    else:
        half = torch.from_numpy(data.astronaut()[::2, ::2].copy())  # 256 x 256
        photo = half.permute(2, 0, 1) / 255
    tokens = model.encode(photo[None], FixedLength(256))
    steps, bits = [], model.identity().bits
    for length in map(int, arguments.lengths.split(",")):
        pixels = model.decode(tokens.truncated(length))[0].clamp(0, 1)
        error, size = (pixels - photo).abs().mean().item(), -(-length * bits // 8)
        steps.append({"tokens": length, "bytes": size, "error": f"{error:.4f}"})
        steps[-1]["image"] = embedded(to_image(pixels))
        print(f"{length:4} tokens  {size:4} bytes  mean pixel error {error:.4f}")
    page = PAGE.replace("ORIGINAL", embedded(to_image(photo))).replace("STEPS", json.dumps(steps))
    arguments.output.write_text(page, encoding="utf-8")
    print(f"{arguments.output}: {arguments.output.stat().st_size // 1024} KB, open it in a browser")


if __name__ == "__main__":
    main()
