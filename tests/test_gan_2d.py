"""The point GAN: its losses by hand, its metrics, and a run that trains two networks."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from adaptive_loss.data.gaussians_25 import STD, centres, load
from adaptive_loss.data.points import PointDataset, Points
from adaptive_loss.errors import UsageError
from adaptive_loss.metrics.fourier_features import FourierFeatures
from adaptive_loss.metrics.kid import kernel_distance
from adaptive_loss.metrics.modes import mode_coverage
from adaptive_loss.seeding import own_generator
from adaptive_loss.tasks._adversarial import (
    PATIENCE,
    Watch,
    feature_matching,
    frozen,
    gradient_penalty,
    hinge,
    logistic,
    non_saturating,
)
from adaptive_loss.tasks.gan_2d import PointGAN, density
from adaptive_loss.trainer import loop
from adaptive_loss.trainer.training import Training, prepare
from adaptive_loss.utils.config import RunConfig

CPU = torch.device("cpu")
LOG = math.log
CONFIG = RunConfig(task="gan_2d", dataset="gaussians_25", epochs=2, batch_size=100, subset=1000, precision="fp32")


@pytest.fixture(scope="module")
def points() -> PointDataset:
    """With a fifth of the test points, whose distance from samples takes the square of their number."""
    whole = load(seed=0, subset=1000)
    return replace(whole, test=Points(whole.test.inputs[:1000], whole.test.targets[:1000]))


def build(points: PointDataset, **options: object) -> PointGAN:
    torch.manual_seed(0)
    return PointGAN(CONFIG, points, CPU, **options)


# ---- losses by hand -


def test_logistic_losses_by_hand() -> None:
    # softplus(−log 3) = log 4/3, softplus(log 3) = log 4; at 0 both are log 2.
    logits = torch.tensor([LOG(3), 0.0])
    assert float(non_saturating(logits)) == pytest.approx((LOG(4 / 3) + LOG(2)) / 2)
    assert float(logistic(logits, logits)) == pytest.approx((LOG(4 / 3) + LOG(4) + 2 * LOG(2)) / 2)


def test_hinge_by_hand() -> None:
    # max(0, 1 − D): 0, 0.5; max(0, 1 + D): 0, 3.
    found = hinge(torch.tensor([2.0, 0.5]), torch.tensor([-1.5, 2.0]))
    assert float(found) == pytest.approx((0.25 + 1.5) / 2)


def test_r1_of_a_linear_critic_is_half_its_squared_slope() -> None:
    critic = nn.Linear(2, 1)
    with torch.no_grad():
        critic.weight.copy_(torch.tensor([[3.0, 4.0]]))
    penalty = gradient_penalty(critic, torch.randn(7, 2))
    assert float(penalty.detach()) == pytest.approx(12.5)
    penalty.backward()
    torch.testing.assert_close(critic.weight.grad, critic.weight.detach())  # d(½‖w‖²)/dw


def test_feature_matching_by_hand() -> None:
    real, fake = torch.tensor([[1.0, 0.0], [3.0, 0.0]]), torch.tensor([[0.0, 1.0]])
    assert float(feature_matching(real, fake)) == pytest.approx(5.0)


def test_what_is_frozen_passes_gradients_and_keeps_none() -> None:
    critic, x = nn.Linear(2, 1), torch.randn(3, 2, requires_grad=True)
    with frozen(critic):
        loss = critic(x).sum()
    loss.backward()
    assert x.grad is not None and critic.weight.grad is None and critic.weight.requires_grad


# ---- the watch -


def watched(real: float, fake: float, steps: int) -> Watch:
    watch = Watch("critic")
    for _ in range(steps):
        watch.see(torch.full((8,), real), torch.full((8,), fake))
    return watch


@pytest.mark.parametrize(("real", "fake", "said"), [(5.0, -5.0, "told real"), (0.3, 0.3, "the same score")])
def test_a_critic_that_teaches_nothing_is_named_once_after_its_patience(real: float, fake: float, said: str) -> None:
    assert watched(real, fake, PATIENCE - 1).collapsed is None
    watch = watched(real, fake, PATIENCE)
    (event,) = watch.events()
    assert said in (watch.collapsed or "") and said in event.reason and "'critic'" in event.reason
    assert event.kind == "alarm" and event.step == PATIENCE
    watch.see(torch.full((8,), real), torch.full((8,), fake))
    assert watch.events() == [] and watch.collapsed is not None
    watch.see(torch.tensor([1.0]), torch.tensor([1.0 + PATIENCE]))
    assert watch.collapsed is None  # it teaches again


def test_a_critic_that_errs_on_a_few_has_not_won() -> None:
    watch = Watch("critic")
    for _ in range(PATIENCE):
        watch.see(torch.tensor([1.0] * 98 + [-1.0] * 2), torch.full((100,), -1.0))
    assert watch.collapsed is None


def test_the_watch_goes_on_from_its_state() -> None:
    one, other = watched(1.0, -1.0, 50), Watch("critic")
    other.load_state_dict(one.state_dict())
    for _ in range(PATIENCE - 50):
        other.see(torch.ones(4), -torch.ones(4))
    assert len(other.events()) == 1


# ---- metrics and data -


def test_the_grid_has_25_modes_and_its_own_points_are_of_high_quality() -> None:
    data = load(seed=0)
    assert centres().shape == (25, 2) and centres().unique(dim=0).shape == (25, 2)
    found = mode_coverage(data.test.inputs, centres(), STD)
    assert found["modes"] == 25
    # P(‖x‖ ≤ 3σ) in the plane is 1 − exp(−9/2) = 0.98889; three standard errors of 5,000 draws are 0.0045.
    assert found["high_quality"] == pytest.approx(1 - math.exp(-4.5), abs=0.0045)


def test_seeds_draw_other_points_and_the_test_points_stay() -> None:
    one, two, again = load(seed=0, subset=100), load(seed=1, subset=100), load(seed=0, subset=100)
    assert torch.equal(one.train.inputs, again.train.inputs) and one.provenance == again.provenance
    assert not torch.equal(one.train.inputs, two.train.inputs)
    assert torch.equal(one.test.inputs, two.test.inputs)
    assert [len(part) for part in (one.train, one.probe, one.select, one.test)] == [80, 10, 10, 5000]
    with pytest.raises(UsageError, match="--subset 9 is too small"):
        load(subset=9)


def test_mode_coverage_at_its_edges() -> None:
    grid = torch.tensor([[0.0, 0.0], [2.0, 0.0]])
    on_the_rim, beyond = torch.tensor([[0.3, 0.0]]), torch.tensor([[0.301, 0.0]])
    assert mode_coverage(on_the_rim, grid, 0.1 + 1e-7) == {"modes": 1.0, "high_quality": 1.0}
    assert mode_coverage(beyond, grid, 0.1) == {"modes": 0.0, "high_quality": 0.0}
    assert mode_coverage(torch.full((2, 2), math.nan), grid, 0.1)["modes"] == 0
    with pytest.raises(ValueError, match="at least 1 sample"):
        mode_coverage(torch.empty(0, 2), grid, 0.1)


def test_fourier_features_approximate_the_gaussian_kernel() -> None:
    features = FourierFeatures(2, [0.5], 20_000, torch.Generator().manual_seed(0))
    x, y = torch.tensor([[0.0, 0.0]]), torch.tensor([[0.3, 0.4]])
    kernel = float((features(x) * features(y)).mean())
    assert kernel == pytest.approx(math.exp(-0.25 / (2 * 0.25)), abs=0.02)  # four standard errors


def test_density_has_one_bright_spot_where_the_points_are() -> None:
    image = density(torch.tensor([[4.9, 4.9], [4.9, 4.9], [-4.9, 4.9], [99.0, 0.0]]))
    assert float(image[0, -1]) == 1 and float(image[0, 0]) == pytest.approx(0.5**0.5)
    assert int((image > 0).sum()) == 2


# ---- the task -


def test_terms_are_live_scalars_that_move_their_own_network_alone(points: PointDataset) -> None:
    task = build(points)
    state = torch.get_rng_state()
    theirs, own = task.opponent_losses("critic", torch.arange(32)), task.losses(torch.arange(32))
    assert torch.equal(state, torch.get_rng_state())
    assert (*own, *theirs) == task.all_terms()
    sum(theirs.values()).backward()
    assert all(p.grad is None for p in task.generator.parameters())
    assert all(p.grad is not None for p in task.critic.parameters())
    task.critic.zero_grad()
    sum(own.values()).backward()
    assert all(p.grad is not None and p.grad.any() for p in task.generator.parameters())
    assert all(p.grad is None for p in task.critic.parameters())


def test_terms_left_out_change_no_other(points: PointDataset) -> None:
    rows = torch.arange(32)
    whole, bare = build(points), build(points, wanted=["adversarial", "logistic"])
    for task in (whole, bare):
        task.seen = {**task.opponent_losses("critic", rows), **task.losses(rows)}  # type: ignore[attr-defined]
    assert set(bare.seen) == {"adversarial", "logistic"}  # type: ignore[attr-defined]
    for name, loss in bare.seen.items():  # type: ignore[attr-defined]
        assert torch.equal(loss, whole.seen[name])  # type: ignore[attr-defined]


def test_the_probe_reads_the_probe_split_and_reaches_the_whole_generator(points: PointDataset) -> None:
    task = build(points)
    assert task.probe.data is task.splits["probe"].inputs
    task.probe().backward()
    assert all(p.grad is not None and p.grad.any() for p in task.generator.parameters())
    assert all(p.grad is None for p in task.critic.parameters())


def test_evaluation_is_of_the_averaged_generator_and_repeats(points: PointDataset) -> None:
    task = build(points)
    with torch.no_grad():
        for parameter in task.generator.parameters():
            parameter.zero_()
    found = task.evaluate("test")
    latents = torch.randn(1000, 8, generator=own_generator(CONFIG.seed, "samples test"))
    samples, data = task.averaged.module(latents), points.test.inputs
    with torch.no_grad():
        distance = kernel_distance(task.judge(samples).double(), task.judge(data).double())
    assert found["loss"] == pytest.approx(float(distance)) and found == task.evaluate("test")
    assert found["collapsed"] == 1.0 and found["modes"] < 13


def test_samples_like_the_data_are_at_distance_0_and_not_collapsed() -> None:
    task = build(load(seed=0, subset=1000))
    other = load(seed=7, subset=7000).train.inputs
    task.samples = lambda count, purpose: other[:count]  # type: ignore[method-assign]
    found = task.evaluate("test")
    assert abs(found["loss"]) < 0.01 and found["modes"] == 25 and found["collapsed"] == 0.0


def test_pictures_are_the_same_at_every_call(points: PointDataset) -> None:
    task = build(points)
    (images,) = task.pictures().values()
    assert images.shape == (2, 1, 96, 96) and float(images.min()) >= 0 and float(images.max()) == 1
    assert torch.equal(images, task.pictures()["samples"])


def test_losses_and_probe_stay_on_the_device(points: PointDataset) -> None:
    task = PointGAN(CONFIG, points, torch.device("meta"))
    task.watch.see = lambda real, fake: None  # type: ignore[method-assign] - numbers are what it is for
    found = {**task.opponent_losses("critic", torch.arange(8)), **task.losses(torch.arange(8)), "p": task.probe()}
    assert {loss.device.type for loss in found.values()} == {"meta"}


# ---- two networks in one run -


def trained(points: PointDataset, steps: int, **changes: object) -> Training:
    training = prepare(replace(CONFIG, **changes), points)  # type: ignore[arg-type]
    for rows in list(training.batches)[:steps]:
        loop._step(training, rows)
    return training


def test_each_network_is_stepped_by_its_own_optimizer_and_executor(points: PointDataset) -> None:
    training = trained(points, 1)
    critic = training.opponents["critic"]
    held = [
        {id(p) for group in learner.optimizer.param_groups for p in group["params"]} for learner in training.learners
    ]
    assert not held[0] & held[1]
    assert held[0] == {id(p) for p in training.task.model.parameters()}
    assert [learner.executor.signals.step for learner in training.learners] == [1, 1]
    assert critic.executor.terms.base == "logistic" and critic.executor.terms.names == ("logistic", "r1")


def test_a_step_is_that_of_a_bare_loop(points: PointDataset) -> None:
    training = trained(points, 3, weights={"feature_matching": 0.5, "r1": 0.1})
    torch.manual_seed(CONFIG.seed)
    bare = PointGAN(CONFIG, points, CPU)
    optimizers = [bare.optimizer(list(net.parameters())) for net in (bare.critic, bare.generator)]
    schedules = [bare.scheduler(optimizer, 16) for optimizer in optimizers]
    batches = prepare(CONFIG, points).batches
    for rows in list(batches)[:3]:
        for kind, optimizer, schedule in zip(("critic", None), optimizers, schedules, strict=True):
            losses = bare.opponent_losses(kind, rows) if kind else bare.losses(rows)
            optimizer.zero_grad()
            weights = {"feature_matching": 0.5, "r1": 0.1}
            total: Tensor = sum(weights.get(name, 1.0) * loss for name, loss in losses.items())  # type: ignore[assignment]
            total.backward()
            optimizer.step()
            schedule.step()
    for mine, theirs in zip(bare.generator.parameters(), training.task.model.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6)
    critic = training.opponents["critic"].network
    for mine, theirs in zip(bare.critic.parameters(), critic.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6)


def test_a_network_whose_loss_jumps_because_the_other_moved_still_steps(points: PointDataset) -> None:
    # The plain switch-on of a VQGAN ended here: ten steps of a surprised discriminator rejected in a row.
    training = trained(points, 0)
    for learner in training.learners:
        leaf = next(learner.network.parameters())
        for step in range(40):
            level = 1.4 + 0.01 * (step % 2) if step < 39 else 500.0
            record = learner.learn({name: 0 * leaf.sum() + level for name in learner.executor.terms.names})
            assert record.applied


def test_points_are_no_bf16_even_where_the_processor_has_it(
    points: PointDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("adaptive_loss.trainer.training.has_bf16", lambda device: True)
    training = prepare(replace(CONFIG, precision="auto"), points)
    with training.autocast:
        assert training.task.opponent("critic")(torch.zeros(1, 2)).dtype == torch.float32


def test_shares_are_within_each_network(points: PointDataset) -> None:
    training = trained(points, 1)
    shares = training.shares({"adversarial": 3.0, "feature_matching": 1.0, "logistic": 1.0, "r1": 1.0})
    assert shares == {"adversarial": 0.75, "feature_matching": 0.25, "logistic": 0.5, "r1": 0.5}


@pytest.mark.parametrize("term", ["adversarial", "logistic"])
def test_the_base_term_of_either_network_cannot_be_switched_off(points: PointDataset, term: str) -> None:
    with pytest.raises(UsageError, match=f"--weights {term}=0"):
        prepare(replace(CONFIG, weights={term: 0.0}), points)


@pytest.mark.parametrize("mode", ["baseline", "lookahead_only", "full", "base_only"])
def test_a_run_in_each_mode(points: PointDataset, mode: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "_load", lambda config: points)
    result = loop.run(replace(CONFIG, mode=mode), tmp_path, quiet=True)
    assert result["status"] == "ok" and result["steps"] == 16 and result["test_modes"] in range(26)
    assert result["collapsed_opponents"] == {}
    header = (tmp_path / "metrics.csv").read_text().splitlines()[0].split(",")
    wanted = {f"loss_{term}" for term in PointGAN.all_terms()} | {"select_loss", "select_modes", "select_collapsed"}
    assert wanted <= set(header)
    assert [file.name for file in (tmp_path / "pictures").iterdir()] == ["samples_000016.png"]


def test_a_collapsed_critic_is_in_the_events_and_in_the_result(
    points: PointDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "_load", lambda config: points)
    monkeypatch.setattr("adaptive_loss.tasks._adversarial.PATIENCE", 3)
    monkeypatch.setattr("adaptive_loss.tasks._adversarial._teaching", lambda real, fake: "won")
    result = loop.run(CONFIG, tmp_path, quiet=True)
    assert "'critic' told real from generated for 16 steps" in result["collapsed_opponents"]["critic"]  # type: ignore[index]
    events = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    assert [(event["kind"], event["step"]) for event in events if event["kind"] == "alarm"] == [("alarm", 3)]
