"""The VQ autoencoder with its discriminator: terms by hand, metrics against closed forms, the switch-on, runs."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from adaptive_loss.data.base import Dataset
from adaptive_loss.data.digits import load
from adaptive_loss.errors import UsageError
from adaptive_loss.metrics.perplexity import codebook_perplexity
from adaptive_loss.metrics.psnr_ssim import psnr, ssim
from adaptive_loss.models.vq_autoencoder import VQAutoencoder, straight_through
from adaptive_loss.tasks._adversarial import lecam
from adaptive_loss.tasks.vqgan import ANCHOR_DECAY, VQGANTask, unit
from adaptive_loss.trainer import loop
from adaptive_loss.trainer.training import Training, prepare
from adaptive_loss.utils.config import RunConfig
from adaptive_loss.weighting.switch_on import SwitchOn
from adaptive_loss.weighting.vqgan import VQGAN, adaptive_weights

CONFIG = RunConfig(task="vqgan", dataset="digits", epochs=4, batch_size=50, subset=260, precision="fp32")
ROWS = torch.arange(32)


@cache
def digits() -> Dataset:
    return load(seed=0, subset=260)


def build(**options: object) -> VQGANTask:
    settings = {name: options.pop(name) for name in ("objective", "weighting") if name in options}
    torch.manual_seed(0)
    return VQGANTask(replace(CONFIG, **settings), digits(), torch.device("cpu"), **options)  # type: ignore[arg-type]


# ---- metrics -


def test_psnr_of_a_constant_difference() -> None:
    # MSE 0.01 and 0.25: 20 dB and 6.02 dB.
    images = torch.stack([torch.full((1, 8, 8), 0.1), torch.full((1, 8, 8), 0.5)])
    torch.testing.assert_close(psnr(images, torch.zeros_like(images)), torch.tensor([20.0, 20 * math.log10(2)]))
    assert psnr(images, images).tolist() == [math.inf, math.inf]


@pytest.mark.parametrize("side", [8, 11, 28])
def test_ssim_of_constant_images_is_the_luminance_alone(side: int) -> None:
    a, b = torch.full((2, 3, side, side), 0.4), torch.full((2, 3, side, side), 0.8)
    wanted = (2 * 0.4 * 0.8 + 1e-4) / (0.4**2 + 0.8**2 + 1e-4)
    torch.testing.assert_close(ssim(a, b), torch.full((2,), wanted), rtol=1e-3, atol=0)


def test_ssim_at_the_one_place_of_a_window_by_hand() -> None:
    x, y = torch.rand(2, 11, 11, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    place = torch.arange(11, dtype=torch.float64) - 5
    w = torch.exp(-(place[:, None] ** 2 + place**2) / 4.5)
    w /= w.sum()
    mx, my = (w * x).sum(), (w * y).sum()
    vx, vy, c = (w * (x - mx) ** 2).sum(), (w * (y - my) ** 2).sum(), (w * (x - mx) * (y - my)).sum()
    wanted = (2 * mx * my + 1e-4) * (2 * c + 9e-4) / ((mx**2 + my**2 + 1e-4) * (vx + vy + 9e-4))
    assert float(ssim(x[None, None], y[None, None])) == pytest.approx(float(wanted), rel=1e-6)


def test_ssim_is_symmetric_bounded_and_1_for_equal_images() -> None:
    x, y = torch.rand(2, 4, 3, 16, 12, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(ssim(x, y), ssim(y, x))
    torch.testing.assert_close(ssim(x, x), torch.ones(4))
    assert (ssim(x, 1 - x) < ssim(x, y)).all() and (ssim(x, y).abs() <= 1).all()


def test_psnr_and_ssim_against_torchmetrics() -> None:
    reference = pytest.importorskip("torchmetrics.functional.image")
    x, y = torch.rand(2, 4, 3, 24, 20, generator=torch.Generator().manual_seed(0))
    options = {"data_range": 1.0, "reduction": "none", "return_full_image": True}
    _, places = reference.structural_similarity_index_measure(x, y, **options)
    # Where the whole window of 11 lies in the image; their own mean counts the images mirrored at their edges too.
    theirs = places[..., 5:-5, 5:-5].flatten(1).mean(1)
    torch.testing.assert_close(ssim(x, y), theirs, rtol=1e-4, atol=1e-5)
    theirs = reference.peak_signal_noise_ratio(x, y, data_range=1.0, dim=(1, 2, 3), reduction="none")
    torch.testing.assert_close(psnr(x, y), theirs)


@pytest.mark.parametrize("metric", [psnr, ssim])
def test_images_of_two_shapes_are_not_compared(metric: object) -> None:
    with pytest.raises(ValueError, match="of one shape"):
        metric(torch.zeros(1, 1, 8, 8), torch.zeros(2, 1, 8, 8))  # type: ignore[operator]


def test_perplexity_by_hand() -> None:
    assert codebook_perplexity(torch.zeros(3, 4, 4, dtype=torch.long), 8) == 1.0
    assert codebook_perplexity(torch.arange(8).view(2, 4), 8) == pytest.approx(8)
    # shares ½, ¼, ¼: entropy 1.5 bits.
    assert codebook_perplexity(torch.tensor([0, 0, 1, 5]), 8) == pytest.approx(2**1.5)
    with pytest.raises(ValueError, match="at least 1 index"):
        codebook_perplexity(torch.empty(0, dtype=torch.long), 8)


# ---- the model and the losses -


def test_straight_through_has_the_value_of_one_and_the_gradient_of_the_other() -> None:
    latent, value = torch.randn(5, requires_grad=True), torch.randn(5, requires_grad=True)
    out = straight_through(latent, value.detach())
    assert torch.equal(out, value)
    (out * torch.arange(5.0)).sum().backward()
    torch.testing.assert_close(latent.grad, torch.arange(5.0))
    assert value.grad is None


def test_every_vector_gets_the_nearest_code() -> None:
    model = VQAutoencoder((1, 8, 8), codes=5, size=3)
    latent = torch.randn(2, 3, 4, 4)
    distance = torch.cdist(latent.movedim(1, -1).reshape(-1, 3), model.codebook.detach())
    assert torch.equal(model.nearest(latent).flatten(), distance.argmin(1))


@pytest.mark.parametrize("side", [8, 16, 28, 32])
def test_sides_that_halve_and_those_that_do_not(side: int) -> None:
    model = VQAutoencoder((1, side, side))
    assert model(torch.zeros(2, 1, side, side))[0].shape == (2, 1, side, side)
    with pytest.raises(ValueError, match=f"not {side}×{side + 1}"):
        VQAutoencoder((1, side, side + 1))


def test_lecam_by_hand() -> None:
    # (1 − 0.5)² and (3 − 0.5)², mean 3.25; (0 − 2)² = 4.
    found = lecam(torch.tensor([1.0, 3.0]), torch.tensor([0.0]), torch.tensor([2.0, 0.5]))
    assert float(found) == pytest.approx(7.25)


def test_terms_by_hand() -> None:
    task = build()
    task.step = task.start
    losses = task.losses(ROWS)
    assert tuple(losses) == task.terms
    images = 2 * unit(digits().train.images[ROWS]) - 1
    with torch.no_grad():
        latent = task.network.encoder(images)
        code = task.network.codebook[task.network.nearest(latent)].movedim(-1, 1)
        made = task.network.last(task.network.decoder(code))
        wanted = {
            "reconstruction": (made - images).abs().mean(),
            "perceptual": (task.perceive((made + 1) / 2) - task.perceive((images + 1) / 2)).square().mean(),
            "codebook": (code - latent).square().mean(),
            "commitment": (code - latent).square().mean(),
            "adversarial": -task.discriminator(made).mean(),
        }
    for name, value in wanted.items():
        torch.testing.assert_close(losses[name].detach(), value, rtol=1e-4, atol=1e-6)
    theirs = task.opponent_losses("discriminator", ROWS)
    real, fake = task.discriminator(images), task.discriminator(made)
    hinge = ((1 - real).clamp_min(0).mean() + (1 + fake).clamp_min(0).mean()) / 2
    torch.testing.assert_close(theirs["hinge"], hinge)
    torch.testing.assert_close(theirs["lecam"], real.square().mean() + fake.square().mean())  # anchors begin at 0
    wanted_anchors = (1 - ANCHOR_DECAY) * torch.stack([real.mean(), fake.mean()]).detach()
    torch.testing.assert_close(task.anchors, wanted_anchors)


def reached(task: VQGANTask, loss: Tensor) -> set[str]:
    """The parts of the two networks at which a loss leaves a gradient."""
    task.network.zero_grad()
    task.discriminator.zero_grad()
    loss.backward(retain_graph=True)
    parts = {"encoder": task.network.encoder, "decoder": task.network.decoder, "discriminator": task.discriminator}
    found = {
        name for name, part in parts.items() if any(p.grad is not None and p.grad.any() for p in part.parameters())
    }
    codes = task.network.codebook.grad
    return found | ({"codes"} if codes is not None and codes.any() else set())


def test_each_term_moves_what_it_is_for() -> None:
    task = build()
    task.step = task.start
    losses = task.losses(ROWS)
    assert {name: reached(task, loss) for name, loss in losses.items()} == {
        "reconstruction": {"encoder", "decoder"},
        "perceptual": {"encoder", "decoder"},
        "codebook": {"codes"},
        "commitment": {"encoder"},
        "adversarial": {"encoder", "decoder"},
    }
    theirs = task.opponent_losses("discriminator", ROWS)
    assert all(reached(task, loss) == {"discriminator"} for loss in theirs.values())


@pytest.mark.parametrize("objective", ["sample_quality", "fidelity"])
def test_the_objective_reads_the_probe_split_and_reaches_all_of_the_model(objective: str) -> None:
    task = build(objective=objective)
    data = task.probe.data if isinstance(task.probe.data, Tensor) else task.probe.data[0]
    assert torch.equal(data, unit(task.splits["probe"].images))
    assert reached(task, task.probe()) == {"encoder", "decoder", "codes"}


def test_terms_left_out_are_left_out_and_change_no_other() -> None:
    whole, bare = build(), build(wanted=["reconstruction", "commitment", "hinge"])
    for task in (whole, bare):
        task.step = task.start
    theirs, own = bare.opponent_losses("discriminator", ROWS), bare.losses(ROWS)
    assert set(theirs) | set(own) == {"reconstruction", "commitment", "hinge"}
    assert torch.equal(theirs["hinge"], whole.opponent_losses("discriminator", ROWS)["hinge"])
    assert all(torch.equal(own[name], loss) for name, loss in whole.losses(ROWS).items() if name in own)


def test_data_without_features_are_refused_in_one_line() -> None:
    with pytest.raises(UsageError, match="--dataset cifar10 is not one of this task's"):
        VQGANTask(replace(CONFIG, dataset="cifar10"), digits(), torch.device("cpu"))


# ---- the switch-on -


def trained(steps: int, **changes: object) -> Training:
    training = prepare(replace(CONFIG, **changes), digits())  # type: ignore[arg-type]
    done = 0
    while done < steps:
        for rows in training.batches:
            loop._step(training, rows)
            done += 1
            if done == steps:
                break
    return training


def test_the_adversarial_term_comes_after_a_quarter_of_the_run() -> None:
    training = prepare(CONFIG, digits())
    records = [loop._step(training, rows) for _ in range(2) for rows in training.batches]
    assert ["adversarial" in record.losses for record in records] == [False] * 4 + [True] * 4  # of 4 epochs of 4 steps
    assert all({"hinge", "lecam"} <= set(record.losses) for record in records)


def test_the_rule_vqgan_weighs_the_adversarial_term_alone_at_the_last_layer() -> None:
    training = trained(4, weighting="vqgan", weights={"adversarial": 0.5})
    task = training.task
    assert isinstance(task, VQGANTask) and isinstance(training.executor.weighting, VQGAN)
    losses = task.losses(ROWS)
    (last,) = task.tap  # type: ignore[misc]
    assert last is task.network.last.weight
    norms = [
        torch.autograd.grad(losses[n], last, retain_graph=True)[0].norm() for n in ("reconstruction", "adversarial")
    ]
    training.executor(losses, tap=task.tap)
    wanted = 0.5 * adaptive_weights(norms[0], 0.5 * norms[1], 0.8)
    weights = training.executor.weights
    assert weights["adversarial"] == pytest.approx(float(wanted), rel=1e-4)
    assert {name: weights[name] for name in task.terms[:-1]} == dict.fromkeys(task.terms[:-1], 1.0)


def test_the_models_own_rule_has_options_and_others_are_as_ever() -> None:
    assert build().weighting("dwa").name == "dwa"
    assert build(wanted=["reconstruction", "hinge"]).weighting("vqgan").name == "fixed"


def test_the_balancer_taps_the_output() -> None:
    training = trained(6, weighting="encodec")
    (made,) = training.task.tap  # type: ignore[misc]
    assert made.shape == (50, 1, 8, 8)


def test_the_safe_switch_on_ramps_the_term_in() -> None:
    training = trained(6, weighting="switch_on")
    rule = training.executor.weighting
    assert isinstance(rule, SwitchOn) and rule.on and rule.term == "adversarial"
    assert 0 < training.executor.weights["adversarial"] <= 1


def test_the_jump_is_the_highest_rise_of_the_select_reconstruction_after_the_switch_on() -> None:
    task = build()
    task.step = task.start
    found = [task._jump(0.2)]
    for step, value in ((5, 0.15), (6, 0.3), (7, 0.1)):
        task.step = task.start + step
        found.append(task._jump(value))
    assert found == pytest.approx([0.0, 0.0, 0.5, 0.5])
    assert "switch_on_jump" in task.evaluate("select") and "switch_on_jump" not in task.evaluate("test")


# ---- evaluation and runs -


def test_evaluation_by_hand_and_it_repeats() -> None:
    task = build()
    found = task.evaluate("test")
    images = unit(digits().test.images)
    with torch.no_grad():
        made, latent, _ = task.network(2 * images - 1)
    made = (made + 1) / 2
    assert found["reconstruction"] == pytest.approx(2 * float(F.l1_loss(made, images)), rel=1e-5)
    assert found["psnr"] == pytest.approx(float(psnr(made.clamp(0, 1), images).mean()), rel=1e-5)
    assert found["perplexity"] == pytest.approx(codebook_perplexity(task.network.nearest(latent), 64))
    assert found["loss"] == found["own_kid"] and found["own_frechet"] > 0
    assert found == task.evaluate("test") and task.model.training


@pytest.mark.parametrize("mode", ["lookahead_only", "full", "base_only"])
def test_a_run_in_each_mode(mode: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "_load", lambda config: digits())
    weighting = "switch_on" if mode == "base_only" else "fixed"  # a rule for a term that is not there
    result = loop.run(replace(CONFIG, mode=mode, weighting=weighting), tmp_path, quiet=True)
    assert result["status"] == "ok" and result["steps"] == 16 and result["collapsed_opponents"] == {}
    assert {"test_psnr", "test_ssim", "test_perplexity", "select_switch_on_jump"} <= set(result)
    assert (tmp_path / "pictures" / "reconstructions_000016.png").is_file()
