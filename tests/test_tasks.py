"""The tasks' terms by hand, and the tasks themselves on the digits."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributions import Bernoulli, Independent, Normal, kl_divergence

from adaptive_loss.data.base import Dataset, Split
from adaptive_loss.data.digits import load
from adaptive_loss.errors import UsageError
from adaptive_loss.metrics.calibration import calibration_error
from adaptive_loss.metrics.features import load_features
from adaptive_loss.metrics.frechet import frechet_distance
from adaptive_loss.metrics.kid import kernel_distance
from adaptive_loss.models.conv_vae import ConvVAE
from adaptive_loss.models.vae import VAE
from adaptive_loss.seeding import own_generator
from adaptive_loss.tasks import tasks
from adaptive_loss.tasks.base import Task
from adaptive_loss.tasks.classify import confidence_penalty, mixed_cross_entropy, supervised_contrastive
from adaptive_loss.tasks.vae import bernoulli_reconstruction, gaussian_kl
from adaptive_loss.utils.config import RunConfig

CPU = torch.device("cpu")
LOG = math.log


def test_mixed_cross_entropy_by_hand() -> None:
    # p = (1/4, 3/4) and (1/2, 1/2).
    logits = torch.tensor([[0.0, LOG(3)], [0.0, 0.0]])
    found = mixed_cross_entropy(logits, torch.tensor([0, 0]), torch.tensor([1, 0]), torch.tensor(0.25))
    wanted = 0.25 * (LOG(4) + LOG(2)) / 2 + 0.75 * (LOG(4 / 3) + LOG(2)) / 2
    assert float(found) == pytest.approx(wanted, rel=1e-6)


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_mixing_an_image_with_its_own_class_is_cross_entropy(share: float) -> None:
    logits, labels = torch.randn(5, 3), torch.randint(3, (5,))
    found = mixed_cross_entropy(logits, labels, labels, torch.tensor(share))
    torch.testing.assert_close(found, F.cross_entropy(logits, labels))


def test_supervised_contrastive_by_hand() -> None:
    # Two images along e1 of class 0, one along e2 of class 1, τ = 1: each of the pair sees softmax (e, 1), the third
    # has no positive and counts 0. Lengths do not matter.
    features = torch.tensor([[2.0, 0.0], [0.5, 0.0], [0.0, 3.0]])
    found = supervised_contrastive(features, torch.tensor([0, 0, 1]), temperature=1.0)
    assert float(found) == pytest.approx(2 * LOG((math.e + 1) / math.e) / 3, rel=1e-6)


def test_supervised_contrastive_against_a_double_loop() -> None:
    features, labels = torch.randn(9, 4), torch.randint(3, (9,))
    unit = features / features.norm(dim=1, keepdim=True)
    whole = 0.0
    for i in range(9):
        others = [a for a in range(9) if a != i]
        positives = [p for p in others if labels[p] == labels[i]]
        bottom = sum(math.exp(float(unit[i] @ unit[a]) / 0.2) for a in others)
        shares = [LOG(math.exp(float(unit[i] @ unit[p]) / 0.2) / bottom) for p in positives]
        whole -= sum(shares) / max(len(shares), 1)
    assert float(supervised_contrastive(features, labels, 0.2)) == pytest.approx(whole / 9, rel=1e-4)


@pytest.mark.parametrize(
    ("features", "labels"),
    [
        (torch.zeros(4, 3), [0, 0, 1, 1]),
        (torch.ones(1, 3), [0]),
        (torch.ones(3, 3), [0, 1, 2]),
        (torch.ones(3, 3), [1] * 3),
    ],
    ids=["all features 0", "one image", "no positives", "one class"],
)
def test_supervised_contrastive_is_finite_with_its_gradient(features: Tensor, labels: list[int]) -> None:
    leaf = features.clone().requires_grad_()
    found = supervised_contrastive(leaf, torch.tensor(labels))
    found.backward()
    assert torch.isfinite(found) and leaf.grad is not None and torch.isfinite(leaf.grad).all()


def test_confidence_by_hand() -> None:
    uniform, sure = torch.zeros(2, 4), torch.tensor([[200.0, 0.0, 0.0, 0.0]])
    assert float(confidence_penalty(F.log_softmax(uniform, 1))) == pytest.approx(0, abs=1e-6)
    assert float(confidence_penalty(F.log_softmax(sure, 1))) == pytest.approx(LOG(4), rel=1e-6)
    logits = torch.tensor([[0.0, LOG(3)]])
    entropy = -(0.25 * LOG(0.25) + 0.75 * LOG(0.75))
    assert float(confidence_penalty(F.log_softmax(logits, 1))) == pytest.approx(LOG(2) - entropy, rel=1e-6)


def test_confidence_is_a_kl_divergence() -> None:
    log_p = F.log_softmax(torch.randn(6, 5), 1)
    reference = F.kl_div(torch.full_like(log_p, -LOG(5)), log_p, reduction="batchmean", log_target=True)
    torch.testing.assert_close(confidence_penalty(log_p), reference)


def test_gaussian_kl_against_torch_distributions() -> None:
    mean, log_variance = torch.randn(7, 3), torch.randn(7, 3)
    posterior = Independent(Normal(mean, (log_variance / 2).exp()), 1)
    prior = Independent(Normal(torch.zeros(7, 3), torch.ones(7, 3)), 1)
    torch.testing.assert_close(gaussian_kl(mean, log_variance), kl_divergence(posterior, prior).mean())
    assert float(gaussian_kl(torch.zeros(2, 3), torch.zeros(2, 3))) == 0.0


def test_reconstruction_against_torch_distributions() -> None:
    logits, pixels = torch.randn(5, 8), torch.rand(5, 8)
    reference = -Bernoulli(logits=logits, validate_args=False).log_prob(pixels).sum(1).mean()
    torch.testing.assert_close(bernoulli_reconstruction(logits, pixels), reference)


def test_vae_draws_from_the_given_generator_alone() -> None:
    model, pixels = VAE(16, latent=3), torch.rand(4, 16)
    before = torch.get_rng_state()
    one = model(pixels, torch.Generator().manual_seed(1))[0]
    two = model(pixels, torch.Generator().manual_seed(1))[0]
    other = model(pixels, torch.Generator().manual_seed(2))[0]
    assert torch.equal(one, two) and not torch.equal(one, other)
    assert torch.equal(before, torch.get_rng_state())


# ---- the tasks -


@pytest.fixture(scope="module")
def digits() -> Dataset:
    return load(seed=0)


def build(name: str, digits: Dataset, **options: object) -> Task:
    torch.manual_seed(0)
    config = RunConfig(dataset="digits", task=name)
    return tasks.get(name)(config, digits, CPU, **options)


NAMES = ["classify", "vae"]


@pytest.mark.parametrize("name", NAMES)
def test_terms_are_live_finite_scalars_in_order_and_draw_from_own_generators(name: str, digits: Dataset) -> None:
    task = build(name, digits)
    before = torch.get_rng_state()
    losses = task.losses(torch.arange(32))
    assert torch.equal(before, torch.get_rng_state())
    assert set(losses) <= set(task.terms) and task.terms[0] == task.base
    for loss in losses.values():
        assert loss.dim() == 0 and loss.requires_grad and torch.isfinite(loss)


@pytest.mark.parametrize("name", NAMES)
def test_everything_stays_on_the_device_it_is_given(name: str, digits: Dataset) -> None:
    # The meta device stands in for CUDA: a tensor left behind on the CPU meets none of its tensors without an error.
    for objective in (None, *tasks.get(name).objectives):
        config = RunConfig(dataset="digits", task=name, objective=objective)
        task = tasks.get(name)(config, digits, torch.device("meta"))
        losses = task.losses(torch.arange(32))
        sum(losses.values()).backward()
        task.after_step()
        assert {loss.device.type for loss in (*losses.values(), task.probe())} == {"meta"}


@pytest.mark.parametrize("name", NAMES)
def test_terms_left_out_change_no_other_term(name: str, digits: Dataset) -> None:
    whole = build(name, digits).losses(torch.arange(32))
    for wanted in whole:
        alone = build(name, digits, wanted=[wanted]).losses(torch.arange(32))
        assert set(alone) == {wanted}
        assert float(alone[wanted].detach()) == float(whole[wanted].detach())


@pytest.mark.parametrize("name", NAMES)
def test_one_image_is_a_batch(name: str, digits: Dataset) -> None:
    task = build(name, digits)
    task.model.eval()  # batch statistics of one image are another matter
    assert all(torch.isfinite(loss) for loss in task.losses(torch.arange(1)).values())


@pytest.mark.parametrize("name", NAMES)
def test_the_probe_reads_the_probe_split_and_repeats_from_its_state(name: str, digits: Dataset) -> None:
    task = build(name, digits)
    assert task.probe.data[0] is task.splits["probe"].images
    state = task.probe.state_dict()
    first = task.probe()
    second = task.probe()
    assert first.requires_grad and float(first.detach()) != float(second.detach())
    task.probe.load_state_dict(state)
    assert float(task.probe().detach()) == float(first.detach())
    assert task.model.training


@pytest.mark.parametrize("name", NAMES)
def test_evaluation_repeats_and_leaves_model_and_generators(name: str, digits: Dataset) -> None:
    task = build(name, digits)
    before = {key: value.clone() for key, value in task.model.state_dict().items()}
    state = torch.get_rng_state()
    one, two = task.evaluate("select"), task.evaluate("select")
    assert one == two and math.isfinite(one["loss"])
    assert task.model.training and torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(before[key], value) for key, value in task.model.state_dict().items())


def test_classifier_evaluation_by_hand(digits: Dataset) -> None:
    task = build("classify", digits)
    task.model.eval()
    split = task.splits["test"]
    with torch.no_grad():
        images = (split.images.float() / 255 - task.mean[:, None, None]) / task.std[:, None, None]
        logits = task.model(images).double()
    found = task.evaluate("test")
    assert found["accuracy"] == pytest.approx(float((logits.argmax(1) == split.labels).double().mean()))
    assert found["loss"] == pytest.approx(float(F.cross_entropy(logits, split.labels)), rel=1e-5)
    assert found["calibration_error"] == pytest.approx(calibration_error(logits.softmax(1), split.labels), rel=1e-4)


def test_mixed_images_do_not_enter_the_statistics_that_evaluation_uses(digits: Dataset) -> None:
    """Found on CIFAR-10, where the mixed pass cost half a point of accuracy at any weight, 0.01 included."""
    task, alone = build("classify", digits), build("classify", digits)
    alone.wanted = frozenset({"cross_entropy"})
    for rows in torch.arange(96).split(32):
        task.losses(rows)
        alone.losses(rows)
    for mine, theirs in zip(task.model.state_dict().items(), alone.model.state_dict().items(), strict=True):
        assert torch.equal(mine[1], theirs[1])
    layers = [layer for layer in task.model.modules() if isinstance(layer, torch.nn.BatchNorm2d)]
    assert layers and all(layer.track_running_stats for layer in layers)


def test_vae_evaluation_is_the_sum_of_its_parts(digits: Dataset) -> None:
    found = build("vae", digits).evaluate("test")
    assert found["loss"] == pytest.approx(found["reconstruction"] + found["kl"])
    assert found["bits_per_dim"] == pytest.approx(found["loss"] / 64 / LOG(2))
    # An untrained decoder's logits are near 0: log 2 a pixel.
    assert found["reconstruction"] == pytest.approx(64 * LOG(2), rel=0.1)


@pytest.mark.parametrize("name", NAMES)
def test_state_round_trip_continues_bit_for_bit(name: str, digits: Dataset) -> None:
    one, other = build(name, digits), build(name, digits)
    one.losses(torch.arange(32))
    other.load_state_dict(one.state_dict())
    other.model.load_state_dict(one.model.state_dict())
    left, right = one.losses(torch.arange(32, 64)), other.losses(torch.arange(32, 64))
    assert {k: float(v.detach()) for k, v in left.items()} == {k: float(v.detach()) for k, v in right.items()}


@pytest.mark.parametrize("name", NAMES)
def test_another_seed_draws_otherwise(name: str, digits: Dataset) -> None:
    one = build(name, digits)
    torch.manual_seed(0)
    other = tasks.get(name)(replace(one.config, seed=one.config.seed + 1), digits, CPU)
    left, right = one.losses(torch.arange(32)), other.losses(torch.arange(32))
    assert any(float(left[k].detach()) != float(right[k].detach()) for k in left)


# ---- generative parts


def variant(digits: Dataset, **settings: str) -> Task:
    torch.manual_seed(0)
    return tasks.get("vae")(RunConfig(dataset="digits", task="vae", **settings), digits, CPU)


def test_vae_reports_distances_in_judging_features(digits: Dataset) -> None:
    task = variant(digits)
    found = task.evaluate("test")
    images = task.splits["test"].images.float() / 255
    noise = own_generator(task.config.seed, "samples test")
    with torch.no_grad():
        samples = task.model.eval().decoder(torch.randn(497, 8, generator=noise)).sigmoid().view(-1, 1, 8, 8)
        judge = load_features("digits", "judge").features
        one, other = judge(samples), judge(images)
    assert found["own_kid"] == pytest.approx(float(kernel_distance(one.double(), other.double())), rel=1e-4)
    assert found["own_frechet"] == pytest.approx(frechet_distance(one, other), rel=1e-4)


def test_a_split_too_small_for_a_distance_goes_without_it() -> None:
    task = variant(load(seed=0, subset=60))
    assert len(task.splits["select"]) == 7
    found = task.evaluate("select")
    assert "own_kid" in found and "own_frechet" not in found


def test_vae_on_data_without_features_reports_the_rest(digits: Dataset) -> None:
    other = Dataset("other", digits.classes, digits.train, digits.probe, digits.select, digits.test, {})
    task = tasks.get("vae")(RunConfig(task="vae"), other, CPU)
    assert set(task.evaluate("select")) == {"loss", "reconstruction", "kl", "bits_per_dim"}
    with pytest.raises(UsageError, match="no 'probe' features for 'other'"):
        tasks.get("vae")(RunConfig(task="vae", objective="sample_quality"), other, CPU)


def test_sample_quality_probes_the_probe_split_and_reaches_both_networks(digits: Dataset) -> None:
    task = variant(digits, objective="sample-quality", model="conv-vae")
    assert isinstance(task.model, ConvVAE)
    torch.testing.assert_close(task.probe.data, task.splits["probe"].images.float() / 255)
    state = task.probe.state_dict()
    first = task.probe()
    first.backward()
    for name in ("encoder", "decoder"):
        gradients = [p.grad for p in getattr(task.model, name).parameters()]
        assert all(g is not None and torch.isfinite(g).all() for g in gradients)
    task.probe.load_state_dict(state)
    assert float(task.probe().detach()) == float(first.detach())


@pytest.mark.parametrize("side", [8, 28, 32])
def test_model_of_a_vae_follows_the_size_of_the_images(side: int) -> None:
    images = torch.randint(0, 256, (20, 1, side, side), dtype=torch.uint8)
    split = Split(images, torch.arange(20) % 10)
    data = Dataset("other", tuple("0123456789"), split, split, split, split, {})
    task = tasks.get("vae")(RunConfig(task="vae"), data, CPU)
    assert type(task.model) is (VAE if side == 8 else ConvVAE)
    assert all(torch.isfinite(loss) for loss in task.losses(torch.arange(4)).values())
    assert task.generate(3, torch.Generator()).shape == (3, 1, side, side)


def test_conv_vae_takes_sides_that_halve_twice() -> None:
    with pytest.raises(ValueError, match="multiples of 4, not 8×9"):
        ConvVAE((1, 8, 9))


@pytest.mark.parametrize(("task", "choices"), [("vae", "elbo, sample_quality"), ("classify", "cross_entropy")])
def test_an_objective_or_model_that_a_task_does_not_have(task: str, choices: str, digits: Dataset) -> None:
    with pytest.raises(UsageError, match=f"--objective fid is not one of this task's; choose from: {choices}"):
        tasks.get(task)(RunConfig(task=task, objective="fid"), digits, CPU)
    with pytest.raises(UsageError, match="--model unet is not one"):
        tasks.get(task)(RunConfig(task=task, model="unet"), digits, CPU)


def test_digits_vae_learns_as_before(digits: Dataset) -> None:
    # Loss of the first batch and −ELBO after 20 Adam steps, from this test run on the commit before ConvVAE came.
    task = variant(digits)
    optimizer = torch.optim.Adam(task.model.parameters(), lr=1e-3)
    for step in range(20):
        optimizer.zero_grad()
        losses = task.losses(torch.arange(50) + 50 * (step % 20))
        if step == 0:
            assert float(sum(losses.values()).detach()) == pytest.approx(44.579186, rel=1e-5)
        sum(losses.values()).backward()
        optimizer.step()
    assert task.evaluate("test")["loss"] == pytest.approx(35.418001, rel=1e-4)
