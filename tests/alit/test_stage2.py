"""The stage-2 loop: gradients of each side, schedule, resumption, and errors on missing inputs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from typer.testing import CliRunner

from alit import AdaptiveTokenizer, CheckpointError, Quirks
from alit.cli import app
from alit.losses import PatchDiscriminator, Perceptual
from alit.losses.stage2 import reconstructions
from alit.training import NotFinite, TrainingConfig, checkpoints, train
from alit.training.stage import iterations_of
from alit.training.stage2 import Stage2
from tests.helpers.models import BASES, model
from tests.helpers.runs import (
    ALONE,
    SMALL,
    Synchronizations,
    config,
    gradients,
    log_of,
    noise_images,
    state_of,
    weights_of,
)

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def _narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make discriminators an eighth as wide, to save time."""
    monkeypatch.setattr("alit.training.stage2.PatchDiscriminator", lambda: PatchDiscriminator(8))


def small(base: str = "vqgan", **options: Any) -> AdaptiveTokenizer:
    return model(base, image_size=(24, 24), iterations=2, **options)


def stage2(**fields: Any) -> TrainingConfig:
    """Stage-2 configuration with discriminators from the first step, without LPIPS."""
    return config(**{"stage": "2", "perceptual": "off", "gan_schedule": ((0.0, 0.5),), **fields})


# One step.


def test_optimizers_are_apart() -> None:
    """Each parameter belongs to one optimizer and gets its gradient from that side's loss alone."""
    m = small()
    stage = Stage2(m, stage2(), ALONE)
    own = {n: {id(p) for _, p in o.parameters} for n, o in stage.optimizers.items()}
    assert own["model"] == {id(p) for p in m.parameters()}
    assert not own["model"] & own["discriminators"]
    seen: dict[str, bool] = {}
    judges = stage.modules["discriminators"]
    step = stage.optimizers["model"].step

    def look(rate: float) -> Tensor:
        seen["no gradient of discriminators"] = all(p.grad is None for p in judges.parameters())
        return step(rate)

    stage.optimizers["model"].step = look  # type: ignore[method-assign]
    before = {side: _copy(module) for side, module in stage.modules.items()}
    terms = stage.step(0, 0.5, 1e-3, [noise_images()])
    assert seen == {"no gradient of discriminators": True}
    assert all(p.grad is None for p in (*m.parameters(), *judges.parameters()))
    assert all(p.requires_grad for p in judges.parameters())
    for side, module in stage.modules.items():
        assert any(not torch.equal(x, before[side][n]) for n, x in _copy(module).items()), side
    names = ("l1_0", "quantization_0", "adversarial_0", "weight_0", "discriminator_0", "real_0")
    assert {*names, "loss", "gradient_norm", "discriminator_gradient_norm"} <= terms.keys()


def _copy(module: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in module.named_parameters()}


def test_gradients_are_those_of_the_losses() -> None:
    """Gradients of generator and discriminator equal those of the losses written out."""
    m, x = small(), noise_images()
    stage = Stage2(m, stage2(l2_weight=2.0, ssim_weight=0.3), ALONE)
    judge = stage.critics.discriminator(1)
    found = gradients(stage, [x], 1)
    torch.manual_seed(0)
    ((_, pixels, quantization, _),) = reconstructions(m, x, [1])
    from skimage.metrics import structural_similarity as reference

    from alit.losses import structural_similarity

    ssim = structural_similarity(x, pixels)
    for value, a, b in zip(ssim.tolist(), x, pixels.detach(), strict=True):
        planes = (y.permute(1, 2, 0).numpy() for y in (a, b))
        assert value == pytest.approx(reference(*planes, channel_axis=2, data_range=1), abs=1e-5)
    nll = (x - pixels).abs().mean() + 2 * (x - pixels).square().mean() + 0.3 * (1 - ssim.mean())
    verdict = -judge(pixels).mean()
    last = m.base_tokenizer.vqgan.decoder.conv_out.weight
    norms = [torch.autograd.grad(y, last, retain_graph=True)[0].norm() for y in (nll, verdict)]
    total = nll + 0.5 * (norms[0] / (norms[1] + 1e-4)).detach() * verdict + quantization
    own = dict(m.named_parameters())
    wanted = torch.autograd.grad(total, list(own.values()), allow_unused=True)
    for (name, _), gradient in zip(own.items(), wanted, strict=True):
        assert (gradient is None) == (name not in found["model"]), name
        if gradient is not None:
            torch.testing.assert_close(found["model"][name], gradient, rtol=1e-3, atol=1e-6)
    hinge = 0.5 * (torch.relu(1 - judge(x)).mean() + torch.relu(1 + judge(pixels.detach())).mean())
    hinge.backward()
    for name, p in judge.named_parameters():
        torch.testing.assert_close(
            found["discriminators"][f"1.{name}"], p.grad, rtol=1e-3, atol=1e-6
        )
    assert all(name.startswith("1.") for name in found["discriminators"])


def test_the_base_frozen_or_trained() -> None:
    """A frozen base passes gradients on; the adaptive weight then compares at the decoder's last layer."""
    for base in BASES:
        trained = gradients(Stage2(small(base), stage2(), ALONE), [noise_images()], 0)["model"]
        frozen_model = small(base)
        frozen = gradients(
            Stage2(frozen_model, stage2(train_base=False), ALONE), [noise_images()], 0
        )
        names = {name for name in trained if name.startswith("base_tokenizer.")}
        assert bool(names) == (base != "dct")
        assert frozen["model"].keys() == trained.keys() - names
        assert all(p.grad is None for p in frozen_model.base_tokenizer.parameters())
        assert float(frozen["model"]["decoder.ffn.2.weight"].norm()) > 0


def test_schedule_and_who_takes_part() -> None:
    published = TrainingConfig(stage="2", batch_size=96)
    weights = [published.gan_weight(epoch / 200) for epoch in (0, 19, 20, 99, 100, 200)]
    assert weights == [0, 0, 0.2, 0.2, 0.8, 0.8]
    assert published.peak_learning_rate == pytest.approx(1e-4 * 96 / 256)
    assert [iterations_of(published, 8, step, 0.0) for step in range(9)] == [
        *([i] for i in range(8)),
        [0],
    ]
    drawn = TrainingConfig(stage="2", iterations_per_step=3)
    assert {len(iterations_of(drawn, 8, step, 0.0)) for step in range(9)} == {3}
    # While the weight is 0, discriminators neither run nor step.
    stage = Stage2(small(), stage2(gan_schedule=((0.5, 0.8),)), ALONE)
    before = _copy(stage.modules["discriminators"])
    terms = stage.step(0, 0.49, 1e-3, [noise_images()])
    assert not [name for name in terms if name.startswith(("adversarial", "real", "discriminator"))]
    buffers = dict(stage.modules["discriminators"].named_buffers())
    assert int(buffers["0.main.3.num_batches_tracked"]) == 0
    stage.step(0, 0.5, 1e-3, [noise_images()])
    after = _copy(stage.modules["discriminators"])
    changed = {name.split(".")[0] for name, p in after.items() if not torch.equal(p, before[name])}
    assert changed == {"0"}
    shared = Stage2(small(), stage2(discriminators="shared"), ALONE)
    assert shared.critics.discriminator(0) is shared.critics.discriminator(1)
    none = Stage2(small(), stage2(gan_schedule=((0.0, 0.0),)), ALONE)
    assert none.modules.keys() == none.optimizers.keys() == {"model"}


def test_learning_rates() -> None:
    stage = Stage2(small(), stage2(learning_rate=1e-3, discriminator_learning_rate=4e-3), ALONE)
    stage.step(0, 0.5, 2e-4, [noise_images()])
    rates = {n: {g["lr"] for g in o.adamw.param_groups} for n, o in stage.optimizers.items()}
    assert rates["model"] == {2e-4}
    (rate,) = rates["discriminators"]
    assert rate == pytest.approx(8e-4)


def test_accumulated_parts_give_the_mean_gradient() -> None:
    """Accumulated microbatches give the mean gradient; no discriminators, whose batch statistics are per microbatch."""
    x, fields = noise_images(), {"gan_schedule": (), "iterations_per_step": 2}
    whole = gradients(Stage2(small(), stage2(**fields), ALONE), [x], 0)["model"]
    parts = gradients(Stage2(small(), stage2(accumulate=2, **fields), ALONE), [x[:2], x[2:]], 0)
    assert whole.keys() == parts["model"].keys()
    for name, gradient in whole.items():
        torch.testing.assert_close(parts["model"][name], gradient, rtol=1e-3, atol=1e-6, msg=name)


def test_pixel_training_lowers_the_error() -> None:
    """Training with L1 alone, on a base without weights, lowers the error."""
    errors: list[float] = []
    fields: dict[str, Any] = {"steps": 60, "gan_schedule": (), "flip": False, "ema": 0.0}
    train(
        stage2(learning_rate=3e-3, **fields),
        model=model(image_size=(24, 24), iterations=1, bottleneck="continuous"),
        images=torch.nn.functional.interpolate(noise_images()[:, :, :2, :2], size=(24, 24)),
        on_log=lambda record: errors.append(record["l1_0"]),
    )
    assert sum(errors[-10:]) < 0.8 * sum(errors[:10])


def test_perceptual_is_one_and_frozen(random_perceptual: list[Perceptual]) -> None:
    made = random_perceptual
    m = small()
    stage = Stage2(m, stage2(perceptual="lpips", perceptual_weight=0.5), ALONE)
    before = _copy(made[0])
    for step in range(2):
        terms = stage.step(step, 0.5, 1e-3, [noise_images()])
        assert float(terms[f"perceptual_{step}"]) > 0
    assert len(made) == 1 and not any(p.requires_grad for p in made[0].parameters())
    assert all(torch.equal(p, before[name]) for name, p in _copy(made[0]).items())
    own = {id(p) for o in stage.optimizers.values() for _, p in o.parameters}
    assert not own & {id(p) for p in made[0].parameters()}
    assert (made[0].unit_range, made[0].training) == (False, False)
    Stage2(small(quirks=Quirks.official()), stage2(perceptual="lpips"), ALONE)
    assert (made[1].unit_range, made[1].training) == (True, True)


@pytest.mark.parametrize("base", BASES)
@pytest.mark.usefixtures("random_perceptual")
def test_no_synchronization_in_a_step(base: str) -> None:
    m = small(base, halting="mask", dead_code_threshold=0.1)
    stage = Stage2(m, stage2(perceptual="lpips", ssim_weight=0.1, l2_weight=1.0), ALONE)
    stage.step(0, 0.5, 1e-3, [noise_images(2)])
    with Synchronizations() as seen:
        stage.step(1, 0.5, 1e-3, [noise_images(2)])
    assert seen.places == []


@pytest.mark.usefixtures("random_perceptual")
def test_bfloat16() -> None:
    terms = []
    for precision in ("float32", "bfloat16"):
        stage = Stage2(small(), stage2(perceptual="lpips", precision=precision), ALONE)
        torch.manual_seed(0)
        terms.append(stage.step(0, 0.5, 1e-3, [noise_images()]))
    for name in ("loss", "l1_0", "perceptual_0"):
        assert terms[1][name].dtype == torch.float32
        torch.testing.assert_close(terms[1][name], terms[0][name], rtol=0.1, atol=0.02)


# Whole runs.


def test_the_average_is_the_model(folder: Path, tmp_path: Path) -> None:
    """The saved average lies between the weights before and after one step, for the base tokenizer too."""
    m = model("vqgan", image_size=(32, 32), iterations=2)
    before = _copy(m)
    run = tmp_path / "run"
    fields: dict[str, Any] = {"steps": 1, "warmup": 0.0, "ema": 0.5, "output": str(run)}
    train(stage2(data=str(folder), **fields), model=m)
    averaged, raw = weights_of(run), state_of(run)
    name = "base_tokenizer.vqgan.decoder.conv_out.weight"
    after = torch.frombuffer(bytearray(raw[f"model/{name}"]), dtype=torch.float32)
    decay = min(0.5, 2 / 11)
    expected = decay * before[name].flatten() + (1 - decay) * after
    torch.testing.assert_close(averaged[name].flatten(), expected)
    assert not torch.equal(after, before[name].flatten())


def test_images_of_a_run(folder: Path, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = tmp_path / "run"
    fields: dict[str, Any] = {"tensorboard": True, "image_every": 1, "steps": 1}
    train(stage2(data=str(folder), output=str(run), model=SMALL, **fields))
    events = EventAccumulator(str(run / "tensorboard"), size_guidance={"images": 0})
    events.Reload()
    (image,) = events.Images("reconstructions")
    assert (image.height, image.width) == (
        4 * 32,
        4 * 32,
    )  # originals, and one row for each of three lengths
    assert "real_0" in events.Tags()["scalars"]


def test_a_term_that_is_not_finite_stops(folder: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    fields: dict[str, Any] = {
        **{"data": str(folder), "output": str(run), "model": SMALL, "steps": 6},
        **{"checkpoint_every": 2, "log_every": 3},
    }

    def poison(stage: Stage2, *args: Any, step: Any = Stage2.step) -> Any:
        if args[0] == 3:
            for p in stage.critics.discriminators.parameters():
                p.data.fill_(torch.nan)
        return step(stage, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Stage2, "step", poison)
        with pytest.raises(
            NotFinite, match=r"step 4: adversarial_0 is nan; the last good.*checkpoint-00000002"
        ):
            train(stage2(**fields))
    assert [x.name for x in checkpoints.saved(run)] == ["checkpoint-00000002"]
    assert train(stage2(**fields), resume=True).steps == 6


@pytest.mark.usefixtures("offline")
def test_bad_input(folder: Path, tmp_path: Path) -> None:
    fields: dict[str, Any] = {"data": str(folder), "model": SMALL}
    with pytest.raises(ValueError, match=r"VGG16 cannot be had .*no network.*--perceptual off"):
        train(stage2(perceptual="lpips", **fields))
    with pytest.raises(ValueError, match="image_size: expected at least 24 pixels for a discrim"):
        train(stage2(data=str(folder), model={**SMALL, "image_size": 16}))
    run = str(tmp_path / "run")
    train(stage2(output=run, steps=1, **fields))
    with pytest.raises(ValueError, match="stage: '2' there, '1' here"):
        train(config(output=run, steps=1, **fields), resume=True)
    with pytest.raises(ValueError, match=r"gan_schedule: \[\[0.0, 0.5\]\] there, \[\] here"):
        train(stage2(output=run, steps=1, gan_schedule=(), **fields), resume=True)
    # Discriminators that are missing in the checkpoint.
    plain = str(tmp_path / "plain")
    train(stage2(output=plain, steps=1, gan_schedule=(), **fields))
    with pytest.raises(CheckpointError, match="could not be read"):
        train(stage2(output=plain, steps=2, **fields), resume=True, allow_changes=True)
    more = stage2(output=run, steps=2, **fields)
    assert train(more, resume=True, allow_changes=True).steps == 2


@pytest.mark.usefixtures("offline")
def test_the_command(folder: Path, tmp_path: Path) -> None:
    """The command as documented without discriminators, then with them, then with LPIPS whose download fails."""
    path = tmp_path / "start.safetensors"
    model("vqgan", image_size=(32, 32), iterations=2).save_pretrained(path)
    command = ["train", "--stage", "2", "--start-from", str(path), "--data", str(folder)]
    command += ["--steps", "1", "--batch-size", "2", "--device", "cpu", "--set", "workers=0"]

    def run(name: str, *options: str) -> Any:
        return CliRunner().invoke(app, [*command, "--output", str(tmp_path / name), *options])

    cheap = ("--perceptual", "off", "--set", "gan_schedule=[]", "--set", "train_base=false")
    done = run("cheap", *cheap)
    assert done.exit_code == 0 and "after 1 step" in " ".join(done.output.split()), done.output
    done = run("judged", "--set", "perceptual=off", "--set", "gan_schedule=[[0.0, 0.1]]")
    assert done.exit_code == 0, done.output
    assert "real_0" in log_of(tmp_path / "judged")[0]
    failed = run("offline")
    assert failed.exit_code == 1 and "Traceback" not in failed.output
    assert "or train without it: --perceptual off" in failed.output
    start, trained = load_file(path), weights_of(tmp_path / "cheap")
    frozen = [name for name in start if name.startswith("base_tokenizer.")]
    assert frozen and all(torch.equal(start[name], trained[name]) for name in frozen)


def test_configurations_of_earlier_versions() -> None:
    """Fields missing in an earlier configuration count as their defaults."""
    read = TrainingConfig(stage="2", perceptual="off")
    assert read.differences(read.asdict()) == []
    old = {k: v for k, v in read.asdict().items() if k not in ("stage", "perceptual")}
    assert read.differences(old) == [
        "stage: '1' there, '2' here",
        "perceptual: 'lpips' there, 'off' here",
    ]
