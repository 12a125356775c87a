"""Extract the files of tests/data from a folder of reference tensors: ``python -m tests.data.make_sample FOLDER``.

Weights are stored as bfloat16 and images with 8 bits, both without loss.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

EXPECTED = (
    *(
        "encoder_ln_pre/out",
        "decoder_query",
        "iter0/latent_tokens",
        "iter0/decoded_code",
    ),
    *(f"iter{i}/{name}" for i in range(8) for name in ("indices", "quantizer_loss")),
    *("iter3/latent_prequant", "iter7/latent_prequant", "iter7/latent_quantized"),
)


def main(folder: Path) -> None:
    target = Path(__file__).parent
    state = load_file(folder / "vqgan_state_alit.safetensors")
    small = {name: tensor.bfloat16() for name, tensor in state.items()}
    assert all(torch.equal(small[name].float(), tensor) for name, tensor in state.items())
    save_file(small, target / "vqgan_state_alit.safetensors")
    images = load_file(folder / "inputs.safetensors")["imgs"]
    levels = (images * 255).round().to(torch.uint8)
    assert torch.equal(levels.float() / 255, images)
    evaluation = load_file(folder / "vqgan_quant_eval.safetensors")
    base = load_file(folder / "vqgan_state_base_encoder.safetensors")
    sample = {
        "imgs": levels,
        "base/codebook": base["base_tokenizer.vqgan.quantize.embedding.weight"],
        **{name: evaluation[name] for name in ("base/tokens", "base/gt_indices", *EXPECTED)},
    }
    save_file(
        {name: tensor.contiguous() for name, tensor in sample.items()},
        target / "vqgan_quant_eval.safetensors",
    )
    for name in (
        "vqgan_config.json",
        "vqgan_quant.json",
        "vector_quantizer.json",
        "vector_quantizer.safetensors",
    ):
        (target / name).write_bytes((folder / name).read_bytes())


if __name__ == "__main__":
    main(Path(sys.argv[1]))
