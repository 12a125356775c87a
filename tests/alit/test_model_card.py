"""The model card on the Hub states only facts from the model file and its evaluation."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from alit.evaluation.results import Blockiness, Evaluation, LengthQuality, Quality
from alit.model_card import write
from tests.helpers.models import model


def card(variant: dict[str, Any] | None = None, **options: Any) -> str:
    own = model(**(variant or {}))
    return write("me/model", own.config, own.identity(), 1234567, **options)


def evaluated(**changes: Any) -> dict[str, Any]:
    """Evaluation of the small model in the format of ``alit evaluate``, with ``changes``."""
    thumbnail, sides = Quality(0.9, 9.0, 0.09), Blockiness(1.0, 1.0)
    lengths = [
        LengthQuality(
            tokens=tokens,
            bits=5.0 * tokens,
            model=Quality(0.5 / tokens, 20 + tokens, 0.25, lpips=None, top1=0.1, top5=0.5),
            thumbnail=thumbnail,
            thumbnail_side=1,
            codes_used=1.0,
            perplexity=3.0,
            loses=0,
            webp=None,
            avif=None,
            blockiness=sides,
        )
        for tokens in (3, 6, 9, 12)
    ]
    result = Evaluation("pinned", 7, (16, 24), lengths, ["private.png"], sides)
    return {"model": "/home/me/run", **asdict(result), "calibration": [], **changes}


def test_says_what_the_model_is() -> None:
    text = card()
    for said in (
        "# model\n",
        "| image size | 24x16 pixels |",
        "| tokens per image | 3 to 12, in steps of 3 |",
        "| bits per token | 5 |",
        "| codebook | 32 codes of 6 channels |",
        "| recurrence | latents, 4 iterations |",
        "| base | dct, patches of 4x4 pixels, 9 channels |",
        "| encoder, decoder | 2 layers of width 32, 2 layers of width 32 |",
        "| parameters | 1,234,567, without codebooks |",
        f"| fingerprint | `{model().identity().fingerprint.hex()[:12]}`,",
        'model = AdaptiveTokenizer.from_pretrained("me/model")\n',
        "library_name: alit\n",
    ):
        assert said in text
    assert text.startswith("---\n") and "license" not in text and "Evaluation" not in text
    assert "| 1 to 12 |" in card({"any_length": True})
    assert ", one for each iteration |" in card({"codebooks": "each"})
    assert "| a token | 6 numbers (continuous) |" in card({"bottleneck": "continuous"})
    assert "| a token | 32 numbers (unfactorized) |" in card({"bottleneck": "unfactorized"})


def test_license_is_one_line() -> None:
    text = card(license='mit"\ntags: x')
    assert r'license: "mit\"\ntags: x"' in text.splitlines()


def test_numbers_of_an_evaluation(tmp_path: Path) -> None:
    path = tmp_path / "evaluation.json"
    path.write_text(json.dumps(evaluated()))
    text = card(evaluation=path)
    assert (
        "| tokens | bits | L1 | PSNR | SSIM | top-1 | top-5 |\n|---|---|---|---|---|---|---|\n"
        in text
    )
    assert "\n| 3 | 15 | 0.1667 | 23.00 | 0.250 | 0.10 | 0.50 |\n| 6 | 30 |" in text
    assert 'Of 7 images, protocol "pinned"' in text
    assert "private" not in text and "/home" not in text
    path.write_text(json.dumps(evaluated(images=1, kinds=[{}], protocol="official")))
    assert 'Of 1 drawn image, protocol "official"' in card(evaluation=str(path))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("no JSON", "expected the evaluation.json of alit evaluate, got .*JSONDecodeError"),
        ("[]", "expected the evaluation.json"),
        ("{}", "expected the evaluation.json of alit evaluate, got .*KeyError: 'lengths'"),
        (evaluated(lengths=[{}]), "expected the evaluation.json"),
        (evaluated(protocol="</table>"), "protocol: expected one of pinned, official"),
        (evaluated(images="<b>many"), "expected the evaluation.json"),
        (evaluated(image_size=[256, 256]), r"expected one of images \[16, 24\]"),
        (evaluated(lengths=evaluated()["lengths"][:3]), r"got \[16, 24\] and \[3, 6, 9\]"),
    ],
    ids=range(8),
)
def test_evaluations_that_are_none(
    content: str | dict[str, Any], message: str, tmp_path: Path
) -> None:
    path = tmp_path / "evaluation.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(ValueError, match=f"evaluation: .*{message}"):
        card(evaluation=path)
