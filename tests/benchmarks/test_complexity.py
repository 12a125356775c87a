"""benchmarks.studies.complexity: tokens against people's judgement."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import alit
from benchmarks.studies import complexity
from benchmarks.studies.complexity import measure
from tests.helpers.models import model


def test_ranks_are_those_of_the_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures whose errors fall later get more tokens; their order is the judgement's here, and the files' is not."""
    (tmp_path / "scores.csv").write_text("file,complexity\n0.png,1\n1.png,3\n2.png,7\n3.png,9\n")
    for i, size in enumerate((90, 60, 40, 10)):
        (tmp_path / f"{i}.png").write_bytes(b"x" * size)
    errors = torch.tensor([[0.03, 0.01], [0.045, 0.02], [0.2, 0.065], [0.3, 0.3]])
    monkeypatch.setattr(complexity, "errors", lambda *_: errors)
    result = measure(model(), tmp_path, batch_size=2)
    found = {row["max_l1"]: row for row in result["tokens_at"]}
    assert result["jpeg_size"] == pytest.approx(-1.0)
    step = model().config.latents_per_iteration
    assert found[0.05]["tokens"] == step * (1 + 1 + 2 + 2) / 4 and found[0.05]["met"] == 0.5
    assert found[0.05]["spearman"] == pytest.approx(0.894, abs=1e-3)


def test_errors_are_those_of_the_criterion(tmp_path: Path) -> None:
    m = model()
    pixels = torch.rand(3, *m.config.image_size)
    path = tmp_path / "x.png"
    alit.images.save_image(alit.images.to_image(pixels), path)
    found = complexity.errors(m, [path, path, path], batch_size=2)
    image = alit.images.load(path, m.config.image_size)[None]
    with torch.no_grad():
        decoded = [
            m.pixels(x.prediction)  # type: ignore[arg-type]
            for x in m.rollout(image)
        ]
    expected = torch.stack([(pixels - image).abs().mean() for pixels in decoded])
    torch.testing.assert_close(found, expected.expand(3, -1), atol=1e-3, rtol=0)
