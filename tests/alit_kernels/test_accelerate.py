"""accelerate: swapped modules compute the same, others are untouched, and the probe finds differences."""

from __future__ import annotations

import copy
import io
import pickle
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import alit_kernels as ak
from alit_kernels.accelerate.classes import InOurWay
from alit_kernels.accelerate.families import FAMILIES, family_of
from alit_kernels.accelerate.probe import SIZES, probe_input
from alit_kernels.nn import MultiheadAttention
from tests.helpers.ops import values
from tests.helpers.peers import (
    Lucidrains,
    TiTokQuantizer,
    VectorQuantizer2,
    left_alone,
    quantizers,
)
from tests.helpers.swapped import compare, counted, leaves_of, pair, step
from tests.helpers.titok import TiTok

NAMES = list(quantizers())


def tensors(result: Any) -> list[Tensor]:
    if isinstance(result, Tensor):
        return [result]
    parts = result.values() if isinstance(result, dict) else result
    return [x for part in parts if part is not None for x in tensors(part)] if parts else []


@pytest.mark.parametrize("training", (True, False))
@pytest.mark.parametrize("name", NAMES)
def test_steps_are_equal(name: str, training: bool) -> None:
    """Outputs, gradients and state are equal over three steps of an optimizer and of moving averages."""
    theirs, ours, x = pair(name)
    optimizers = []
    for module in (theirs.train(training), ours.train(training)):
        parameters = list(module.parameters())
        optimizers.append(torch.optim.SGD(parameters, 1e-3) if parameters else None)
    for _ in range(3):
        compare(step(ours, x, optimizers[1]), step(theirs, x, optimizers[0]))
        state, expected = ours.state_dict(), theirs.state_dict()
        assert list(state) == list(expected)
        compare(list(state.values()), list(expected.values()))


@pytest.mark.parametrize("name", NAMES)
def test_our_ops_compute(name: str) -> None:
    _, ours, x = pair(name)
    with counted() as calls:
        ours(x)
    assert len(calls) == 1


@pytest.mark.parametrize("name", NAMES)
def test_swapping_changes_the_class_alone_and_is_undone(name: str) -> None:
    module = quantizers()[name]
    parts = dict(module.named_modules())
    before = {key: (type(part), dict(vars(part))) for key, part in parts.items()}
    tensors = {key: (id(x), x.clone()) for key, x in module.state_dict(keep_vars=True).items()}
    random = torch.get_rng_state()
    report = ak.accelerate(module)
    assert isinstance(module, InOurWay) and isinstance(module, before[""][0])
    assert type(module).__qualname__ == before[""][0].__qualname__
    assert torch.equal(torch.get_rng_state(), random)
    for key, x in module.state_dict(keep_vars=True).items():
        assert (id(x), x.grad) == (tensors[key][0], None)
        assert torch.equal(x, tensors[key][1])
    report.undo()
    report.undo()
    for key, part in parts.items():
        assert type(part) is before[key][0]
        assert {k: id(v) for k, v in vars(part).items()} == {
            k: id(v) for k, v in before[key][1].items()
        }


@pytest.mark.parametrize("name", left_alone())
def test_left_alone(name: str) -> None:
    """Modules that are not swapped keep object, class, forward and hooks; with ``strict`` they raise."""
    module, why = left_alone()[name]
    model = nn.ModuleDict({"it": module, "attention": nn.MultiheadAttention(8, 2)})

    def state() -> list[Any]:
        return [
            (id(part), type(part), part.forward.__func__, {k: id(v) for k, v in vars(part).items()})
            for part in module.modules()
        ]

    before = state()
    report = ak.accelerate(model)
    assert state() == before and "forward" not in vars(module)
    assert [(each.name, each.why) for each in report.left] == [("it", why)]
    assert [each.name for each in report.swapped] == ["attention"]
    report.undo()
    assert type(model["attention"]) is nn.MultiheadAttention
    with pytest.raises(ValueError, match=re.escape(why)):
        ak.accelerate(model, strict=True)
    assert type(model["attention"]) is nn.MultiheadAttention and state() == before


def changed(change: Callable[[Any, Any], Any], base: type[nn.Module] = TiTokQuantizer) -> nn.Module:
    """Quantizer whose class has a known name, with the results of its forward changed by ``change``."""

    class Other(base):  # type: ignore[misc,valid-type]
        def forward(self, z: Tensor) -> Any:
            return change(self, super().forward(z))

    Other.__qualname__ = base.__qualname__
    Other.__module__ = base.__module__
    torch.manual_seed(0)
    return Other(40, 6, cosine=True)


def scaled(name: str) -> Callable[[Any, Any], Any]:
    return lambda self, out: (out[0], {**out[1], name: out[1][name] * 1.01})


def draws(self: Any, out: Any) -> Any:
    torch.rand(1)
    return out


def counts(self: Any, out: Any) -> Any:
    self.calls = getattr(self, "calls", 0) + 1
    return out


def detached(self: Any, out: Any) -> Any:
    return out[0], {**out[1], "codebook_loss": out[1]["codebook_loss"].detach()}


def fails(self: Any, out: Any) -> Any:
    raise KeyError("of theirs")


def another_gradient(self: Any, out: Any) -> Any:
    z = out[0]
    return z + 0.1 * (z - z.detach()), out[1]


@pytest.mark.parametrize(
    "change, why",
    (
        (scaled("commitment_loss"), "output[1]['commitment_loss'] of call 0 differs in training"),
        (lambda self, out: (out[0], {**out[1], "more": 1}), "other outputs in training"),
        (lambda self, out: (out[0], list(out[1].values())), "other outputs in training"),
        (lambda self, out: [*out], "output (type) of call 0 differs in training"),
        (lambda self, out: out if self.training else (out[0] * 1.01, out[1]), "in evaluation"),
        (lambda self, out: (out[0].transpose(2, 3).contiguous().transpose(2, 3), out[1]), "contig"),
        (detached, "output[1]['codebook_loss'] of call 0 differs"),
        (another_gradient, "gradient of input differs"),
        (draws, "random numbers differs"),
        (counts, "attributes of"),
        (fails, "the probe failed: KeyError: 'of theirs'"),
    ),
)
def test_the_probe_finds_what_differs(change: Any, why: str) -> None:
    module = changed(change)
    (left,) = ak.accelerate(module).left
    assert left.kind == "TiTok" and why in left.why
    assert not isinstance(module, InOurWay)


def test_the_probe_finds_another_convention() -> None:
    """The probe finds loss weights swapped, another decay of moving averages, and an update after the lookup."""
    module = VectorQuantizer2(40, 6, legacy=True)

    class Mended(VectorQuantizer2):
        def forward(self, z: Tensor) -> Any:
            self.__dict__["legacy"] = False
            try:
                return super().forward(z)
            finally:
                self.__dict__["legacy"] = True

    Mended.__qualname__ = VectorQuantizer2.__qualname__
    module.__class__ = Mended
    (left,) = ak.accelerate(module).left
    assert "of call 0 differs in training" in left.why or "gradient" in left.why

    quantizer = Lucidrains(40, 6)
    quantizer._codebook.update_ema = lambda: quantizer._codebook.embed.data.mul_(1.01)
    quantizer._codebook.__class__ = type(
        "Codebook", (type(quantizer._codebook),), {"forward": late}
    )
    (left,) = ak.accelerate(quantizer).left
    assert "differs in training" in left.why


def late(self: Any, x: Tensor, **options: Any) -> Any:
    _, index, distances = super(type(self), self).forward(x, **options)
    return self.embed[0][index], index, distances


def test_hooks() -> None:
    """Hooks of a swapped module are called as before, not by the probe; modules with hooks on parts are not swapped."""
    seen: list[str] = []
    module, x = VectorQuantizer2(40, 6, legacy=True), values(2, 6, 3, 5)
    module.register_forward_hook(lambda *_: seen.append("after"))
    module.register_forward_pre_hook(lambda *_: seen.append("before"))
    assert ak.accelerate(module).swapped and not seen
    module(x)
    assert seen == ["before", "after"]
    other = VectorQuantizer2(40, 6, legacy=True)
    other.embedding.register_forward_hook(lambda *_: None)
    assert ak.accelerate(other).left[0].why == "a part of it has hooks"
    replaced = VectorQuantizer2(40, 6, legacy=True)
    replaced.forward = lambda z: z
    assert ak.accelerate(replaced).left[0].why == "its forward was replaced"
    sparse = VectorQuantizer2(40, 6, legacy=True)
    sparse.embedding.sparse = True
    assert ak.accelerate(sparse).left[0].why == "its embedding is no plain nn.Embedding"


def test_pickles_and_copies() -> None:
    module, x = VectorQuantizer2(40, 6, legacy=True), values(2, 6, 3, 5)
    ak.accelerate(module)
    expected = module(x)
    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    for other in (
        pickle.loads(pickle.dumps(module)),
        copy.deepcopy(module),
        copy.copy(module),
        torch.load(buffer, weights_only=False),
    ):
        assert type(other) is type(module)
        compare(leaves_of(other(x)), leaves_of(expected))
    assert copy.deepcopy(module).embedding.weight is not module.embedding.weight


def passed_on() -> dict[str, Callable[[Any, Tensor], Any]]:
    def autocast(module: Any, x: Tensor) -> Any:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return module(x)

    return {
        "other arguments": lambda module, x: module(x, temp=1.0),
        "by name": lambda module, x: module(z=x),
        "autocast": autocast,
        "float64": lambda module, x: module.double()(x.double()),
        "bfloat16": lambda module, x: module.bfloat16()(x.bfloat16()),
        "vmap": lambda module, x: torch.vmap(lambda y: module(y[None])[0])(x),
    }


@pytest.mark.parametrize("name", passed_on())
def test_calls_that_stay_theirs(name: str) -> None:
    """Calls passed on to the old code return the same bits."""
    theirs, ours, x = pair("taming")
    call = passed_on()[name]
    for a, b in zip(leaves_of(call(ours, x)), leaves_of(call(theirs, x)), strict=True):
        assert a is b is None or torch.equal(a, b)


@pytest.mark.parametrize("moved", (False, True))
def test_a_buffer_that_records(moved: bool) -> None:
    """LlamaGen's usage ring, a parameter registered as a buffer, is updated; so is the tensor it becomes on a move."""
    torch.manual_seed(0)
    ours = quantizers()["LlamaGen, cosine, usage"]
    plain = copy.deepcopy(ours)
    ring: Any = nn.Parameter(ours.codebook_used.clone())
    ours.register_buffer("codebook_used", ring.double().float() if moved else ring)
    x = probe_input(plain, family_of(plain))
    assert ak.accelerate(ours).swapped
    for _ in range(2):
        compare(step(ours, x, None), step(plain, x, None))
    assert torch.equal(ours.codebook_used, plain.codebook_used) and ours.codebook_used.any()


@pytest.mark.parametrize("name", ("lucidrains", "lucidrains, cosine"))
def test_options_of_lucidrains(name: str) -> None:
    """Masks and frozen codebooks are computed by our ops; ``indices``, which need distances, by the old code."""
    theirs, ours, x = pair(name)
    mask = torch.arange(x.shape[1]) < torch.tensor([[4], [15]])
    index = torch.arange(x.shape[0] * x.shape[1]) % 40
    for options in (
        {"mask": mask},
        {"freeze_codebook": True},
        {"indices": index},
        {"mask": mask, "indices": index},
    ):
        compare(leaves_of(ours(x, **options)), leaves_of(theirs(x, **options)))
        compare(
            leaves_of(ours(x, options.get("indices"))), leaves_of(theirs(x, options.get("indices")))
        )
        compare(list(ours.state_dict().values()), list(theirs.state_dict().values()))


def test_undo_of_what_changed_since() -> None:
    module = nn.MultiheadAttention(8, 2)
    report = ak.accelerate(module)
    module.__class__ = type("Sharded", (type(module),), {})
    with pytest.raises(RuntimeError, match="its class was changed after it was swapped"):
        report.undo()


def test_unknown_quantizers_hide_nothing() -> None:
    class MyQuantizer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(2, 2))
            self.inner = VectorQuantizer2(40, 6, legacy=True)

    assert [each.name for each in ak.accelerate(MyQuantizer(), strict=True).swapped] == ["inner"]


def test_a_shared_codebook() -> None:
    first, second = Lucidrains(40, 6), Lucidrains(40, 6)
    second._codebook = first._codebook
    model = nn.ModuleList([first, second])
    report = ak.accelerate(model, strict=True)
    assert [each.name for each in report.swapped] == ["0", "1"]
    report.undo()
    assert not any(isinstance(part, InOurWay) for part in model.modules())


def small(layers: int = 2) -> TiTok:
    torch.manual_seed(0)
    return TiTok(width=32, layers=layers, heads=4, latents=6, patch=4, grid=3, num_codes=40, dim=6)


def test_a_tokenizer() -> None:
    """A tokenizer with attention and quantizer swapped: equal outputs, gradients and steps of an earlier optimizer."""
    theirs, images = small(), values(2, 3, 12, 12)
    ours = copy.deepcopy(theirs)
    optimizers = [torch.optim.SGD(m.parameters(), 0.1) for m in (theirs, ours)]
    report = ak.accelerate(ours, strict=True)
    assert [each.kind for each in report.swapped] == ["attention"] * 4 + ["TiTok"]
    assert all(isinstance(block.attn, MultiheadAttention) for block in ours.encoder)
    for _ in range(2):
        found, expected = (
            step(m, images, o) for m, o in zip((ours, theirs), optimizers[::-1], strict=True)
        )
        compare(found, expected, atol=1e-5)
        compare(list(ours.state_dict().values()), list(theirs.state_dict().values()), atol=1e-5)
    assert ak.accelerate(ours, strict=True).swapped == ()
    text = str(report).splitlines()
    assert text[0].split() == ["module", "kind"]
    assert text[1].split() == ["encoder.0.attn", "attention", "swapped"]


def test_compiles() -> None:
    model, images = small(layers=1), values(2, 3, 12, 12)
    ak.accelerate(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for a, b in zip(tensors(compiled(images)), tensors(model(images)), strict=True):
        torch.testing.assert_close(a, b)
    quantizer = Lucidrains(40, 6)
    ak.accelerate(quantizer)
    other, x = copy.deepcopy(quantizer), values(2, 7, 6)
    compiled = torch.compile(other, fullgraph=True, backend="aot_eager")
    compare(leaves_of(compiled(x)), leaves_of(quantizer(x)))
    compare(list(other.state_dict().values()), list(quantizer.state_dict().values()))


def test_encoder_layers_are_noted() -> None:
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, batch_first=True), 2)
    report = ak.accelerate(model)
    assert [each.name for each in report.swapped] == ["layers.0.self_attn", "layers.1.self_attn"]
    assert len(report.notes) == 2 and "never calls" in report.notes[0]
    assert str(report).splitlines()[-1] == report.notes[1]


def test_training_state_of_attention_is_kept() -> None:
    module = nn.MultiheadAttention(8, 2, dropout=0.3)
    module.in_proj_bias.requires_grad_(False)
    before = dict(vars(module))
    assert ak.accelerate(module).swapped
    assert dict(vars(module)) == before
    assert all(p.grad is None for p in module.parameters())
    assert not module.in_proj_bias.requires_grad and module.training


def test_attention_is_probed_too(monkeypatch: pytest.MonkeyPatch) -> None:
    module = nn.MultiheadAttention(8, 2)
    monkeypatch.setattr(nn.MultiheadAttention, "forward", lambda self, q, *a, **k: (q * 1.0, None))
    assert ak.accelerate(module).left[0].why.startswith("the probe failed: RuntimeError: ")
    monkeypatch.undo()
    linear = torch.nn.functional.multi_head_attention_forward
    wrong = lambda *a, **k: (linear(*a, **k)[0] * 1.01, None)  # noqa: E731
    monkeypatch.setattr(torch.nn.functional, "multi_head_attention_forward", wrong)
    assert ak.accelerate(module).left[0].why == "results differ"
    assert type(module) is nn.MultiheadAttention


def test_a_model_without_any() -> None:
    report = ak.accelerate(nn.Linear(2, 2), strict=True)
    assert (report.swapped, report.left) == ((), ())
    assert str(report) == "no attention module or quantizer that is known here"
    with pytest.raises(TypeError, match=r"^model: expected a torch\.nn\.Module, got Tensor"):
        ak.accelerate(torch.ones(2))  # type: ignore[arg-type]


def test_every_family_is_tested() -> None:
    assert {family_of(module).name for module in quantizers().values()} == set(FAMILIES)
    assert set(SIZES) >= set("bhwnt")
