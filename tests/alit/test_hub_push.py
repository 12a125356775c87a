"""Models uploaded to the Hugging Face Hub, with a local substitute for it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from alit import AdaptiveTokenizer, CheckpointError
from tests.helpers.hub_server import Hub, Refusal
from tests.helpers.models import model

FILE = "model.safetensors"


def test_push(hub: Hub, content: bytes, tmp_path: Path) -> None:
    address = model().push_to_hub("me/model", private=True, token="hf_secret", license="mit")
    assert address == f"{hub.address}/me/model/commit/{'0' * 40}"
    files = hub.files["me/model", "main"]
    assert files.keys() == {FILE, "README.md"} and files[FILE] == content
    card = files["README.md"].decode()
    assert 'license: "mit"\n' in card and 'from_pretrained("me/model")' in card
    assert hub.made[0]["name"] == "model" and hub.made[0]["organization"] == "me"
    assert hub.made[0].get("visibility") == "private" or hub.made[0].get("private") is True
    assert [x["summary"] for x in hub.commits] == ["Upload model"]
    assert "Bearer hf_secret" in hub.tokens and "hf_secret" not in card
    assert AdaptiveTokenizer.from_pretrained("me/model").identity() == model().identity()
    assert sorted(x.name for x in tmp_path.iterdir()) == ["home"]


def test_push_to_a_branch(hub: Hub, tmp_path: Path) -> None:
    model().push_to_hub("me/model")
    model(seed=1).push_to_hub("me/model", revision="try/2", commit_message="Another seed")
    assert [(x["revision"], x["summary"]) for x in hub.commits] == [
        ("main", "Upload model"),
        ("try/2", "Another seed"),
    ]
    of = AdaptiveTokenizer.from_pretrained
    assert of("me/model", "try/2").identity() == model(seed=1).identity()
    assert of("me/model").identity() == model().identity()


def test_push_in_half_precision(hub: Hub, content: bytes) -> None:
    """The card of a half-precision upload names the fingerprint of the model that others load."""
    model().half().push_to_hub("me/half")
    fingerprint = AdaptiveTokenizer.from_pretrained("me/half").identity().fingerprint
    files = hub.files["me/half", "main"]
    assert fingerprint.hex()[:12] in files["README.md"].decode()
    assert len(files[FILE]) < 0.6 * len(content)


def test_push_is_refused(hub: Hub) -> None:
    for name in ("model", "a/b/c", "a/b.safetensors"):
        with pytest.raises(
            ValueError, match=r"name: expected owner/name, as the Hub has them, got"
        ):
            model().push_to_hub(name)
    with pytest.raises(FileNotFoundError, match=r"none\.json"):
        model().push_to_hub("me/model", evaluation="none.json")
    broken = model()
    broken.latent_tokens.data[0, 0] = torch.nan
    with pytest.raises(CheckpointError, match="latent_tokens has values that are NaN"):
        broken.push_to_hub("me/model")
    assert not hub.asked
    hub.refusals["/api/repos/create"] = Refusal(403, "", "No rights in this namespace")
    with pytest.raises(
        PermissionError, match=r"^me/model: the Hub answered 403 No rights in this nam"
    ) as caught:
        model().push_to_hub("me/model", token="hf_secret")
    assert "hf_secret" not in str(caught.value) and "\n" not in str(caught.value)
    hub.refusals.clear()
    hub.refusals["/upload"] = Refusal(403, "", "Full")
    with pytest.raises(PermissionError, match=r"^me/model: the Hub answered 403 Full"):
        model().push_to_hub("me/model")
    assert not hub.commits
