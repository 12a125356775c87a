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
    m = model()
    (tmp_path / "scores.csv").write_text("file,complexity\n0.png,1\n1.png,3\n2.png,7\n3.png,9\n")
    for i, busy in enumerate((24, 16, 8, 0)):
        pixels = torch.zeros(3, *m.config.image_size)
        pixels[..., :busy] = torch.rand(3, m.config.image_size[0], busy)
        alit.images.save_image(alit.images.to_image(pixels), tmp_path / f"{i}.png")
    errors = torch.tensor([[0.03, 0.01], [0.045, 0.02], [0.2, 0.065], [0.3, 0.3]])
    monkeypatch.setattr(complexity, "errors", lambda *_, **__: errors)
    result = measure(m, tmp_path, batch_size=2)
    found = {row["max_l1"]: row for row in result["tokens_at"]}
    assert result["pictures"] == 4 and result["jpeg_size"] == pytest.approx(-1.0)
    step = m.config.latents_per_iteration
    assert found[0.05]["tokens"] == step * (1 + 1 + 2 + 2) / 4 and found[0.05]["met"] == 0.5
    assert found[0.05]["spearman"] == pytest.approx(0.894, abs=1e-3)
