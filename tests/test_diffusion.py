"""Diffusion: the mixture's exact score, noise buckets as terms, the sampler, and both tasks."""

from __future__ import annotations

import importlib.util
import math
import warnings
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from adaptive_loss.checkpoint import load_file
from adaptive_loss.data import digits, mixture_2d
from adaptive_loss.data.base import Dataset
from adaptive_loss.data.mixture_2d import Mixture, MixtureDataset, two_scales
from adaptive_loss.data.points import PointDataset
from adaptive_loss.errors import Stopped, UsageError
from adaptive_loss.metrics.features import load_features
from adaptive_loss.metrics.kid import kernel_distance
from adaptive_loss.models._edm import EDMDenoiser
from adaptive_loss.models.denoiser_mlp import DenoiserMLP
from adaptive_loss.models.small_unet import SmallUNet
from adaptive_loss.seeding import own_generator
from adaptive_loss.tasks import tasks
from adaptive_loss.tasks._diffusion import (
    BUCKET_TERMS,
    LEVELS,
    bucket_losses,
    noisy,
    sample,
    stratified_levels,
    weighted_errors,
)
from adaptive_loss.tasks._image_diffusion import resized
from adaptive_loss.tasks.diffusion_2d import spread
from adaptive_loss.tasks.diffusion_aligned import misalignment
from adaptive_loss.trainer import loop
from adaptive_loss.trainer.stopping import StopRequest
from adaptive_loss.trainer.training import prepare
from adaptive_loss.utils.config import RunConfig
from tests.reliability.bits import differences

CPU = torch.device("cpu")
FEW = 120
NAMES = ("diffusion_2d", "diffusion")
SMALL = {
    name: RunConfig(
        task=name, dataset=dataset, epochs=1, batch_size=size, threads=1, precision="fp32", device="cpu", **given
    )
    for name, dataset, size, given in (
        ("diffusion_2d", "mixture_2d", 64, {}),
        ("diffusion", "digits", 16, {"subset": FEW}),  # which bounds the samples of an evaluation too
    )
}


@cache
def data_of(name: str) -> Any:
    return mixture_2d.load(subset=500) if name == "diffusion_2d" else digits.load(subset=FEW)


def build(name: str, **settings: Any) -> Any:
    torch.manual_seed(0)
    return tasks.get(name)(replace(SMALL[name], **settings), data_of(name), CPU)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# ---- the mixture


def test_the_mixture_has_deviation_one_half_and_no_direction() -> None:
    mixture = two_scales()
    assert mixture.means.shape == (16, 2)
    torch.testing.assert_close(mixture.means.mean(0), torch.zeros(2), atol=1e-6, rtol=0)
    covariance = mixture.means.T @ mixture.means / 16 + mixture.spread**2 * torch.eye(2)
    torch.testing.assert_close(covariance, 0.25 * torch.eye(2), atol=1e-6, rtol=0)


def test_the_mixture_s_density_against_torch_distributions() -> None:
    mixture, points, sigma = two_scales(), torch.randn(7, 2), torch.tensor([0.01, 0.1, 0.2, 0.5, 1.0, 3.0, 10.0])
    deviation = (sigma.square() + mixture.spread**2).sqrt()
    parts = torch.distributions.Normal(mixture.means, deviation[:, None, None]).log_prob(points[:, None]).sum(2)
    torch.testing.assert_close(mixture.log_density(points, sigma), parts.logsumexp(1) - math.log(16))


def test_the_best_denoiser_is_tweedie_s_formula() -> None:
    # E[y | x] = x + σ²∇log p(x; σ) (Karras et al. 2022, eq. 3), the gradient by automatic differentiation.
    mixture, sigma = two_scales(), torch.tensor([0.02, 0.1, 0.5, 2.0], dtype=torch.float64)
    points = torch.randn(4, 2, dtype=torch.float64).requires_grad_()
    (score,) = torch.autograd.grad(mixture.log_density(points, sigma).sum(), points)
    wanted = points + sigma.square()[:, None] * score
    torch.testing.assert_close(mixture.denoised(points, sigma), wanted, rtol=1e-6, atol=1e-9)


def test_no_denoiser_is_better_than_the_best() -> None:
    mixture, dice = two_scales(), generator()
    clean, noise = mixture.sample(4000, dice), torch.randn(4000, 2, generator=dice)
    sigma = torch.full((4000,), 0.2)
    x = noisy(clean, sigma, noise)
    best = mixture.denoised(x, sigma)
    error = (best - clean).square().mean()
    for other in (x, best * 0.95, best + 0.02, 0.9 * best + 0.1 * x):
        assert (other - clean).square().mean() > error


def test_points_are_seeded_and_the_test_points_always_the_same() -> None:
    one, again, other = mixture_2d.load(seed=1), mixture_2d.load(seed=1), mixture_2d.load(seed=2, subset=50)
    assert torch.equal(one.train.inputs, again.train.inputs) and one.provenance == again.provenance
    assert torch.equal(one.test.inputs, other.test.inputs)
    assert not torch.equal(one.select.inputs[:5], other.select.inputs)
    assert one.provenance["sha256"] != other.provenance["sha256"]
    assert [len(part) for part in (other.train, other.probe, other.select)] == [40, 5, 5]
    with pytest.raises(UsageError, match="--subset 9 is too small"):
        mixture_2d.load(subset=9)


# ---- noise levels, terms, sampler


def test_levels_follow_their_law_and_fill_their_buckets() -> None:
    sigma, bucket = stratified_levels(80_000, generator())
    assert torch.bincount(bucket).tolist() == [10_000] * 8
    logs = sigma.double().log()
    assert float(logs.mean()) == pytest.approx(-1.2, abs=0.005) and float(logs.std()) == pytest.approx(1.2, rel=0.005)
    medians = [float(sigma[bucket == k].median()) for k in range(8)]
    assert medians == pytest.approx(LEVELS, rel=0.03)
    edges = [(float(sigma[bucket == k].min()), float(sigma[bucket == k].max())) for k in range(8)]
    assert all(below[1] < above[0] for below, above in zip(edges, edges[1:], strict=False))


@pytest.mark.parametrize("count", [1, 5, 8, 13, 128])
def test_every_batch_has_every_bucket_to_within_one(count: int) -> None:
    _, bucket = stratified_levels(count, generator(count))
    held = torch.bincount(bucket, minlength=8)
    assert int(held.sum()) == count and int(held.max() - held.min()) <= 1


def test_no_bucket_is_left_out_by_batches_that_are_too_small_for_all() -> None:
    dice = generator()
    assert {int(stratified_levels(1, dice)[1]) for _ in range(200)} == set(range(8))


def test_terms_by_hand() -> None:
    # D − y = (0.3, −0.1): mean square 0.05; λ(0.5) = 8, λ(1) = 5 (Karras et al. 2022, table 1).
    errors = weighted_errors(torch.tensor([[1.3, 0.9], [1.3, 0.9]]), torch.ones(2, 2), torch.tensor([0.5, 1.0]))
    assert errors.tolist() == pytest.approx([0.4, 0.25], rel=1e-5)
    found = bucket_losses(torch.tensor([0.4, 0.25, 0.75]), torch.tensor([2, 5, 5]))
    weight = {k: 4 + LEVELS[k] ** -2 for k in (2, 5)}
    assert {name: float(loss) for name, loss in found.items()} == pytest.approx(
        {"bucket_2": 0.4 / weight[2], "bucket_5": 0.5 / weight[5]}, rel=1e-5
    )


@pytest.mark.parametrize("name", NAMES)
def test_with_the_customary_weights_the_total_is_edm_s_loss(name: str) -> None:
    task = build(name)
    clean = task.examples["train"][:64]
    sigma, _, noise = task.draw(clean, generator_like(task.noise))
    losses = task.losses(torch.arange(64))
    total = sum(task.customary[term] * loss for term, loss in losses.items()) / 8
    denoised = task.model(clean + sigma.view(-1, *[1] * (clean.dim() - 1)) * noise, sigma)
    edm = (sigma**2 + 0.25) / (0.5 * sigma) ** 2 * (denoised - clean).square().flatten(1).mean(1)
    torch.testing.assert_close(total, edm.mean())


def generator_like(other: torch.Generator) -> torch.Generator:
    copy = torch.Generator()
    copy.set_state(other.get_state())
    return copy


def test_preconditioning_by_hand() -> None:
    class Constant(nn.Module):
        def forward(self, x: Tensor, level: Tensor) -> Tensor:
            self.seen = x, level
            return torch.ones_like(x)

    network = Constant()
    # σ = σd = 0.5: c_skip = 1/2, c_out = 0.5/√2, c_in = √2, c_noise = ln(0.5)/4.
    found = EDMDenoiser(network)(torch.tensor([[2.0]]), torch.tensor([0.5]))
    assert float(found) == pytest.approx(1 + 0.5 / math.sqrt(2), rel=1e-6)
    assert float(network.seen[0]) == pytest.approx(2 * math.sqrt(2), rel=1e-6)
    assert float(network.seen[1]) == pytest.approx(math.log(0.5) / 4, rel=1e-6)


@pytest.mark.parametrize(("network", "shape"), [(DenoiserMLP(2), (6, 2)), (SmallUNet(3), (6, 3, 16, 16))])
def test_networks_start_at_zero_and_know_the_noise_level(network: nn.Module, shape: tuple[int, ...]) -> None:
    x, level = torch.randn(shape), torch.linspace(-1, 1, 6)
    assert not network(x, level).any()
    nn.init.normal_(network.output.weight, generator=generator())  # type: ignore[union-attr]
    assert network(x, level).shape == shape
    assert not torch.allclose(network(x, level), network(x, level + 0.3))


def test_the_sampler_with_the_best_denoiser_draws_from_the_mixture() -> None:
    mixture = two_scales()
    points = sample(mixture.denoised, torch.randn(2000, 2, generator=generator()), 40)
    nearest = torch.cdist(points, mixture.means).min(1)
    counts = torch.bincount(nearest.indices, minlength=16)
    # 125 are expected at each; five deviations of a count are 54. A component's points are s·√(π/2) off on average.
    assert counts.min() > 70 and counts.max() < 180
    assert float(nearest.values.mean()) == pytest.approx(mixture.spread * math.sqrt(math.pi / 2), rel=0.1)


def test_one_gaussian_is_sampled_as_the_ode_s_solution() -> None:
    # p(x; σ) = N(0, s² + σ²): the flow keeps x/√(s² + σ²).
    mixture, noise = Mixture(torch.zeros(1, 2), spread=0.5), torch.randn(50, 2, generator=generator())
    wanted = 10 * noise * 0.5 / math.sqrt(100.25)
    torch.testing.assert_close(sample(mixture.denoised, noise, 60), wanted, rtol=2e-3, atol=1e-5)


# ---- the tasks


@pytest.mark.parametrize("name", NAMES)
def test_every_term_is_there_live_and_reaches_the_tap(name: str) -> None:
    task = build(name)
    before = torch.get_rng_state()
    losses = task.losses(torch.arange(16))
    assert torch.equal(before, torch.get_rng_state())
    assert tuple(losses) == BUCKET_TERMS == task.terms
    for loss in losses.values():
        (gradient,) = torch.autograd.grad(loss, task.tap, retain_graph=True)
        assert loss.dim() == 0 and torch.isfinite(loss) and gradient.any()
    # A network that starts at 0 leaves every level's weighted loss at about 1, the data's deviation being about σd.
    clean = task.examples["test"]
    assert float(clean.square().mean().sqrt()) == pytest.approx(0.5, rel=0.05)


@pytest.mark.parametrize("name", NAMES)
def test_terms_left_out_change_no_other_term(name: str) -> None:
    whole = build(name).losses(torch.arange(16))
    torch.manual_seed(0)
    kind = tasks.get(name)
    alone = kind(SMALL[name], data_of(name), CPU, wanted=["bucket_3"]).losses(torch.arange(16))
    assert set(alone) == {"bucket_3"} and torch.equal(alone["bucket_3"], whole["bucket_3"])


@pytest.mark.parametrize("name", NAMES)
def test_the_objective_is_edm_s_loss_on_the_probe_split_with_its_noise_drawn_anew(name: str) -> None:
    task = build(name)
    assert task.probe.data == (task.examples["probe"],)
    state = task.probe.state_dict()
    first = task.probe()
    first.backward()
    assert task.model.network.output.weight.grad.any() and float(first.detach()) == pytest.approx(1.0, rel=0.35)
    assert float(task.probe().detach()) != float(first.detach())
    task.probe.load_state_dict(state)
    assert float(task.probe().detach()) == float(first.detach())
    generator = torch.Generator()
    generator.set_state(state["generator"])
    examples = task.examples["probe"]
    clean = examples[torch.randperm(len(examples), generator=generator)[: task.probe_batch]]
    sigma, _, noise = task.draw(clean, generator)
    errors = weighted_errors(task.model(noisy(clean, sigma, noise), sigma), clean, sigma)
    torch.testing.assert_close(first, errors.mean())


@pytest.mark.parametrize("name", NAMES)
def test_evaluation_repeats_and_touches_nothing(name: str) -> None:
    task = build(name)
    state, noise = torch.get_rng_state(), task.noise.get_state()
    one, two = task.evaluate("select"), task.evaluate("select")
    assert one == two and all(math.isfinite(value) for value in one.values())
    assert torch.equal(state, torch.get_rng_state()) and torch.equal(noise, task.noise.get_state())
    assert task.model.training


def test_score_errors_vanish_for_the_best_denoiser_and_are_its_distance_for_another() -> None:
    task = build("diffusion_2d")
    task.average = task.mixture.denoised
    found = task.evaluate("test")
    assert all(value < 1e-8 for name, value in found.items() if name != "denoising")
    assert 0.5 < found["denoising"] < 1
    # A score that is off by c in each coordinate, so that D is off by σ²c, has the error λ(σ)·σ⁴c² = σ²(1 + 4σ²)c².
    task.average = lambda x, sigma: task.mixture.denoised(x, sigma) + 0.1 * sigma.square()[:, None]
    found = task.evaluate("test")
    assert found["loss"] == pytest.approx(sum(found[f"score_error_{k}"] for k in range(8)) / 8, rel=1e-9)
    sigma, bucket = stratified_levels(80_000, generator())
    wanted = (0.01 * sigma.square() * (1 + 4 * sigma.square())).double()
    for k in range(7):
        assert found[f"score_error_{k}"] == pytest.approx(float(wanted[bucket == k].mean()), rel=0.05)


def test_what_is_measured_is_the_running_mean() -> None:
    task = build("diffusion_2d")
    task.after_step()
    before = task.evaluate("select")
    with torch.no_grad():
        task.model.network.output.weight.fill_(1.0)
    assert task.evaluate("select") == before
    task.after_step()
    assert task.evaluate("select") != before
    assert float(task.average.module.network.output.weight.detach().mean()) == pytest.approx(0.01, rel=1e-5)


def kid_of_the_first(task: Any, count: int, split: str) -> float:
    """The kernel distance of ``count`` samples and as many images, on a way of its own."""
    judge = load_features("digits", "judge").features
    noise = own_generator(task.config.seed, f"samples {split}")
    with torch.no_grad():
        samples = nn.functional.avg_pool2d(task.generate(count, noise, task.average), 2)
        images = task.splits[split].images[:count].float() / 255
        return float(kernel_distance(judge(samples).double(), judge(images).double()))


def test_images_are_reported_in_judging_features_at_their_own_size() -> None:
    task = build("diffusion")
    found = task.evaluate("select")
    wanted = kid_of_the_first(task, len(task.examples["select"]), "select")
    assert found["own_kid"] == pytest.approx(wanted, rel=1e-4)
    assert "own_frechet" not in found  # 14 images are too few for it
    assert {f"denoising_{k}" for k in range(8)} <= set(found)


@pytest.mark.parametrize("count", [20, 40])
def test_a_subset_bounds_the_samples_too(count: int) -> None:
    task = build("diffusion", subset=count)
    found = task.evaluate("test")
    assert found["own_kid"] == pytest.approx(kid_of_the_first(task, count, "test"), rel=1e-4)
    assert ("own_frechet" in found) == (count > 32)  # which takes one more than there are features


def test_sample_quality_reaches_the_network() -> None:
    task = build("diffusion", objective="sample-quality")
    value = task.probe()
    value.backward()
    assert torch.isfinite(value) and task.model.network.output.weight.grad.any()


def test_pixels_are_the_images_again() -> None:
    task = build("diffusion")
    images = task.splits["test"].images.float() / 255
    torch.testing.assert_close(resized(task.pixels(task.examples["test"]), (8, 8)), images)


@pytest.mark.parametrize("name", NAMES)
def test_pictures_are_images_and_the_same_at_every_call(name: str) -> None:
    task = build(name)
    one, two = task.pictures(), task.pictures()
    for key, images in one.items():
        assert images.dim() == 4 and torch.equal(images, two[key])
        assert float(images.min()) >= 0 and float(images.max()) <= 1


def test_a_point_is_drawn_where_it_lies() -> None:
    # The picture's first row is the top, y = 1.25; x grows to the right.
    assert spread(torch.tensor([[-1.24, 1.24]]))[0, 0, 0, 0] == 1
    assert spread(torch.tensor([[1.24, 1.24]]))[0, 0, 0, -1] == 1
    assert not spread(torch.tensor([[9.0, 0.0]])).any()


@pytest.mark.parametrize("name", NAMES)
def test_everything_stays_on_the_device_it_is_given(name: str) -> None:
    for objective in tasks.get(name).objectives:
        task = tasks.get(name)(replace(SMALL[name], objective=objective), data_of(name), torch.device("meta"))
        losses = task.losses(torch.arange(16))
        sum(losses.values()).backward()
        task.after_step()
        assert {loss.device.type for loss in (*losses.values(), task.probe())} == {"meta"}


def test_data_without_a_known_density_are_refused() -> None:
    known = mixture_2d.load(subset=50)
    bare = PointDataset("other", known.train, known.probe, known.select, known.test, {})
    assert isinstance(known, MixtureDataset)
    with pytest.raises(UsageError, match="diffusion_2d needs a density that is known"):
        tasks.get("diffusion_2d")(SMALL["diffusion_2d"], bare, CPU)


# ---- alignment


ALIGNED = replace(SMALL["diffusion"], task="diffusion_aligned")


def test_misalignment_by_hand() -> None:
    found = torch.tensor([[1.0, 0.0], [2.0, 0.0], [0.0, -3.0]])
    wanted = torch.tensor([[5.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
    assert float(misalignment(found, wanted)) == pytest.approx((0 + 1 + 2) / 3)


def test_alignment_is_to_the_clean_image_s_features_and_its_gradient_stays_in_the_encoder() -> None:
    torch.manual_seed(0)
    task = tasks.get("diffusion_aligned")(ALIGNED, data_of("diffusion"), CPU)
    features = load_features("digits", "probe").features
    images = task.splits["train"].images[:16].float() / 255
    torch.testing.assert_close(task.wished[:16], features(images), rtol=1e-3, atol=1e-4)
    generator = generator_like(task.noise)
    losses = task.losses(torch.arange(16))
    clean = task.examples["train"][:16]
    sigma, _, noise = task.draw(clean, generator)
    errors = weighted_errors(task.model(noisy(clean, sigma, noise), sigma), clean, sigma)
    torch.testing.assert_close(losses["denoising"], errors.mean())
    losses["alignment"].backward()
    unet = task.network.unet
    assert unet.output.weight.grad is None and all(p.grad is not None for p in unet.enter.parameters())
    assert task.tap.grad is not None and all(p.grad is not None for p in task.network.projection.parameters())


def test_alignment_is_stopped_for_good_once_it_opposes_the_base() -> None:
    training = prepare(replace(ALIGNED, weighting="wind_down", epochs=20), data_of("diffusion"))
    task, rule = training.task, training.executor.weighting
    assert (rule.term, rule.opposed, rule.decay) == ("alignment", 20, 0.0)

    def step(sign: float) -> None:
        # What is taken away from the base: a gradient along the alignment's own, or against it.
        terms = dict(task.losses(torch.arange(16)))
        terms["denoising"] = terms["denoising"] * 0 + sign * terms["alignment"] + 3
        training.learner.learn(terms, task.tap)

    step(1.0)
    assert training.executor.weights["alignment"] == 1.0
    for _ in range(60):
        step(-1.0)
    assert training.executor.weights == {"denoising": 1.0, "alignment": 0.0}


def test_alignment_needs_features() -> None:
    digits_ = data_of("diffusion")
    parts = (digits_.train, digits_.probe, digits_.select, digits_.test)
    other = Dataset("other", digits_.classes, *parts, {})
    with pytest.raises(UsageError, match="no 'probe' features for 'other'"):
        tasks.get("diffusion_aligned")(replace(ALIGNED, dataset="package:other"), other, CPU)


# ---- runs


@pytest.fixture
def given_data(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "_load", lambda config: data_of(config.task))


RULES = {
    # λ(σ), min(SNR, 5), SNR/(1 + SNR) and √SNR, on squared errors of D, at SNR 1/σ²; level 2 is far below SNR 5.
    "edm": lambda s: 4 + s**-2,
    "edm2_uncertainty": lambda s: 4 + s**-2,
    "min_snr": lambda s: min(s**-2, 5),
    "p2": lambda s: s**-2 / (1 + s**-2),
    "debiased": lambda s: 1 / s,
    "inverse_ema": lambda s: 1.0,
    "equal": lambda s: 1.0,
}


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", NAMES)
def test_the_diffusion_rules_run_and_are_given_the_levels(name: str, rule: str) -> None:
    training = prepare(replace(SMALL[name], weighting=rule), data_of(name))
    assert training.learner.learn(training.task.losses(torch.arange(16)), training.task.tap).applied
    wanted = {f"bucket_{k}": RULES[rule](s) for k, s in enumerate(LEVELS)}
    assert training.executor.weights == pytest.approx(wanted, rel=1e-6)


@pytest.mark.parametrize(("named", "rule"), [("fixed", "inverse_ema"), ("p2", "p2")])
def test_adaptive_weighs_buckets_by_a_rule_alone(named: str, rule: str, tmp_path: Path) -> None:
    wrong = replace(SMALL["diffusion_2d"], weights={"bucket_3": 10.0}, epochs=20)

    def weights_over(config: RunConfig) -> list[dict[str, float]]:
        training, seen = prepare(config, data_of("diffusion_2d")), []
        for _ in range(20):
            training.learner.learn(training.task.losses(torch.arange(16)))
            seen.append(training.weights)
        return seen

    adapted, ruled = (
        weights_over(c) for c in (replace(wrong, mode="adaptive", weighting=named), replace(wrong, weighting=rule))
    )
    assert adapted == ruled and adapted[-1]["bucket_3"] != 10.0
    assert prepare(replace(wrong, mode="controller_only"), data_of("diffusion_2d")).executor.modulators
    told = replace(wrong, mode="adaptive", weighting=named, epochs=1, subset=500)
    assert loop.run(told, tmp_path, quiet=True)["rule"] == rule


@pytest.mark.parametrize("rule", ["gradnorm", "lr_annealing", "dwa", "uncertainty"])
def test_other_rules_run_where_they_can(rule: str) -> None:
    training = prepare(replace(SMALL["diffusion_2d"], weighting=rule), data_of("diffusion_2d"))
    needs = training.executor.weighting.needs
    if "base" in needs:
        with pytest.raises(UsageError, match=f"weighting '{rule}' needs base"):
            training.learner.learn(training.task.losses(torch.arange(16)), training.task.tap)
    else:
        assert training.learner.learn(training.task.losses(torch.arange(16)), training.task.tap).applied


def test_there_is_no_base_to_train_alone() -> None:
    with pytest.raises(UsageError, match="mode base_only: task diffusion_2d has no base term"):
        prepare(replace(SMALL["diffusion_2d"], mode="base_only"), data_of("diffusion_2d"))


@pytest.mark.parametrize(
    ("name", "mode", "weights"),
    [
        ("diffusion_2d", "full", {"bucket_3": 10.0}),
        ("diffusion", "lookahead_only", {"bucket_3": 10.0}),
        ("diffusion_aligned", "lookahead_only", {}),
    ],
)
def test_a_run_that_was_stopped_goes_on_to_the_last_bit_without_a_warning(
    name: str,
    mode: str,
    weights: dict[str, float],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    given_data: None,
) -> None:
    config = replace(SMALL.get(name, ALIGNED), mode=mode, weights=weights)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        whole = loop.run(config, tmp_path / "whole", quiet=True)
    with monkeypatch.context() as patch:
        asked = iter([None, None, Stopped("stopped by a test", 143)])
        patch.setattr(StopRequest, "asked", lambda self: next(asked))
        with pytest.raises(Stopped):
            loop.run(config, tmp_path / "cut", quiet=True)
    torch.manual_seed(99)  # another process
    again = loop.run(config, tmp_path / "cut", quiet=True)
    assert again["test_loss"] == whole["test_loss"]
    ends = [load_file(tmp_path / folder / "checkpoint.pt") for folder in ("whole", "cut")]
    for end in ends:
        del end["counters"]["seconds"]
    assert differences(*ends) == []
    other = loop.run(replace(config, seed=7), tmp_path / "other", quiet=True)
    assert other["test_loss"] != whole["test_loss"]


@pytest.fixture(scope="module")
def reference() -> ModuleType:
    file = Path(__file__).parents[1] / "benchmarks/reference/diffusion.py"
    spec = importlib.util.spec_from_file_location("diffusion_reference", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_it_learns_as_the_reference_does(
    reference: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The draws are the same, so the weights are, to rounding; the exact errors are measured on different noise. The
    # figures of the quick form are in the reference's docstring.
    weights = dict(tasks.get("diffusion_2d").customary)
    config = replace(SMALL["diffusion_2d"], epochs=4, lr=5e-3, batch_size=128, weights=weights)
    data = mixture_2d.load(subset=6000)
    monkeypatch.setattr(loop, "_load", lambda config: data)
    theirs, mine = reference.train(data, 4, 5e-3, 1), loop.run(replace(config, seed=1), tmp_path, quiet=True)
    assert mine["test_loss"] == pytest.approx(theirs, rel=0.05)
    assert theirs < 0.75 * build("diffusion_2d").evaluate("test")["loss"]
