"""The physics-informed network: its terms by hand, its metrics, its runs, and the rules made for it."""

from __future__ import annotations

import json
import math
import warnings
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from adaptive_loss import cli
from adaptive_loss.data import datasets
from adaptive_loss.data.points import PointDataset
from adaptive_loss.errors import UsageError
from adaptive_loss.models.mlp import MLP
from adaptive_loss.seeding import own_generator
from adaptive_loss.tasks.pinn import PROBLEMS, PhysicsInformed, burgers_residual, helmholtz_residual
from adaptive_loss.trainer import loop, training
from adaptive_loss.trainer.training import prepare
from adaptive_loss.utils.config import RunConfig
from benchmarks.reference import pinn
from tests.reliability.bits import differences
from tests.test_loop import carried, row_of, stopped

CPU = torch.device("cpu")
NAMES = ["burgers", "helmholtz"]
PI = math.pi
CONFIG = RunConfig(task="pinn", dataset="burgers", epochs=2, batch_size=100, subset=1250, threads=1)


@cache
def data(name: str) -> PointDataset:
    return datasets.get(name)(subset=1250)


def build(name: str, **options: Any) -> PhysicsInformed:
    torch.manual_seed(0)
    return PhysicsInformed(replace(CONFIG, dataset=name), data(name), CPU, **options)


class Polynomial(nn.Module):
    """û = a²b³ at (a, b), whose derivatives are known."""

    def forward(self, points: Tensor) -> Tensor:
        return points[:, :1] ** 2 * points[:, 1:] ** 3


def test_burgers_residual_by_hand() -> None:
    # At (t, x) = (2, 3): u = 108, u_t = 2·2·27 = 108, u_x = 3·4·9 = 108, u_xx = 6·4·3 = 72.
    found = burgers_residual(Polynomial(), torch.tensor([[2.0, 3.0], [0.0, 5.0]]))
    assert found.tolist() == pytest.approx([108 + 108 * 108 - 0.01 / PI * 72, 0.0], rel=1e-6)


def test_helmholtz_residual_by_hand() -> None:
    # At (½, ⅛): u = ¼/512, u_xx = 2/512, u_yy = 6·¼·⅛, and q = (1 − 17π²)·sin(π/2)·sin(π/2).
    found = helmholtz_residual(Polynomial(), torch.tensor([[0.5, 0.125]]))
    assert float(found.detach()) == pytest.approx(2.25 / 512 + 6 / 32 - (1 - 17 * PI**2), rel=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_the_known_solution_leaves_nothing_over(name: str) -> None:
    problem, task = PROBLEMS[name], build(name)
    task.model.forward = problem.solution  # type: ignore[method-assign]
    inputs = task.splits["train"].inputs.double()
    assert float(problem.residual(problem.solution, inputs).detach().abs().max()) < 1e-8
    losses = task.losses(torch.arange(1))
    assert all(float(losses[name].detach()) < 1e-8 for name in losses if name != "residual")
    assert task.evaluate("test")["relative_l2"] < 1e-4  # float32


def test_borders_lie_where_they_should() -> None:
    generator = torch.Generator().manual_seed(0)
    sides = PROBLEMS["burgers"].boundary(7, generator)
    assert sides[:, 1].tolist() == [-1, 1] * 3 + [-1] and len(sides[:, 0].unique()) == 7
    assert (sides[:, 0] >= 0).all() and (sides[:, 0] <= 1).all()
    edges = PROBLEMS["helmholtz"].boundary(8, generator)
    assert [edges[0, 0], edges[1, 0], edges[2, 1], edges[3, 1]] == [-1, 1, -1, 1]
    assert ((edges.abs() == 1).sum(1) == 1).all() and (edges.abs() <= 1).all()
    begins = PROBLEMS["burgers"].beginning(50, generator)
    assert (begins[:, 0] == 0).all() and begins[:, 1].min() < -0.8 and begins[:, 1].max() > 0.8


def test_terms_from_their_formulas() -> None:
    task = build("burgers")
    boundary = task.problem.boundary(100, own_generator(42, "boundary"))
    begins = task.problem.beginning(100, own_generator(42, "initial"))
    rows = torch.arange(32)
    found = task.losses(rows)
    assert list(found) == list(task.terms)
    left_over = burgers_residual(task.model, task.splits["train"].inputs[rows])
    wanted = {
        "residual": sum(float(r) ** 2 for r in left_over.detach()) / 32,
        "boundary": sum(float(u) ** 2 for u in task.model(boundary).detach()) / 100,
        "initial": float((task.model(begins)[:, 0] + torch.sin(PI * begins[:, 1])).detach().square().mean()),
    }
    assert {name: float(loss.detach()) for name, loss in found.items()} == pytest.approx(wanted, rel=1e-5)


def test_helmholtz_has_no_initial_term() -> None:
    assert list(build("helmholtz").losses(torch.arange(8))) == ["residual", "boundary"]


@pytest.mark.parametrize("name", NAMES)
def test_terms_reach_the_whole_tap_draw_from_own_generators_and_stand_alone(name: str) -> None:
    task = build(name)
    before = torch.get_rng_state()
    whole = task.losses(torch.arange(32))
    assert torch.equal(before, torch.get_rng_state())
    for term, loss in whole.items():
        assert loss.dim() == 0 and torch.isfinite(loss)
        # Every parameter; but the residual of Burgers' equation feels the last bias through u·u_x alone.
        gradients = torch.autograd.grad(loss, list(task.tap), retain_graph=True)
        assert all(torch.isfinite(part).all() and part.abs().max() > 0 for part in gradients)
        alone = build(name, wanted=[term]).losses(torch.arange(32))
        assert {key: float(value.detach()) for key, value in alone.items()} == {term: float(loss.detach())}


@pytest.mark.parametrize("name", NAMES)
def test_everything_stays_on_the_device_it_is_given(name: str) -> None:
    task = PhysicsInformed(replace(CONFIG, dataset=name), data(name), torch.device("meta"))
    losses = task.losses(torch.arange(32))
    sum(losses.values()).backward()
    assert {loss.device.type for loss in (*losses.values(), task.probe())} == {"meta"}


def test_no_term_reads_what_is_known_at_the_points() -> None:
    task = build("burgers", train=data("burgers").held_in)  # NaN and measured points alike
    assert len(task.splits["train"]) == 1250
    losses = task.losses(torch.arange(1250))
    assert all(torch.isfinite(loss) for loss in losses.values())


@pytest.mark.parametrize("name", NAMES)
def test_the_probe_reads_the_probe_split_and_reaches_all_that_is_trained(name: str) -> None:
    task = build(name)
    assert task.probe.data[0] is task.splits["probe"].inputs
    state = task.probe.state_dict()
    first = task.probe()
    first.backward()
    assert all(part.grad is not None and part.grad.abs().max() > 0 for part in task.network.parameters())
    error = (task.model(data(name).probe.inputs) - data(name).probe.targets).square().mean()
    torch.testing.assert_close(first, error)  # a batch larger than the split takes all of it
    task.probe.load_state_dict(state)
    assert float(task.probe().detach()) == float(first.detach())


@pytest.mark.parametrize("name", NAMES)
def test_metrics_by_hand(name: str) -> None:
    task = build(name)
    one, two = task.evaluate("test"), task.evaluate("test")
    assert one == two and task.model.training
    points = data(name).test
    with torch.no_grad():
        error, known = (task.model(points.inputs) - points.targets).flatten().double(), points.targets.double()
    assert one["loss"] == pytest.approx(sum(float(e) ** 2 for e in error) / len(error), rel=1e-6)
    assert one["relative_l2"] == pytest.approx(math.sqrt(float((error**2).sum() / (known**2).sum())), rel=1e-6)
    task.model.forward = lambda points: torch.zeros(len(points), 1)  # type: ignore[method-assign]
    assert task.evaluate("select")["relative_l2"] == 1.0


def test_pictures_show_the_field_upright_and_its_error() -> None:
    task = build("burgers")
    task.model.forward = lambda points: task.problem.solution(points)  # type: ignore[method-assign]
    pictures = task.pictures()
    assert {name: tuple(image.shape) for name, image in pictures.items()} == dict.fromkeys(
        ["solution", "field", "error"], (1, 1, 100, 100)
    )
    torch.testing.assert_close(pictures["field"], pictures["solution"], rtol=0, atol=1e-4)
    assert float(pictures["solution"].min()) == 0 and float(pictures["solution"].max()) == 1
    assert float(pictures["error"].max()) == 0  # below 10⁻⁴ of the range
    # −sin πx at t = 0: above the middle, where x > 0, dark; below it bright.
    first_column = pictures["field"][0, 0, :, 0]
    assert float(first_column[25]) < 0.05 and float(first_column[75]) > 0.95
    task.model.forward = lambda points: task.problem.solution(points) + 0.02  # type: ignore[method-assign]
    assert float(task.pictures()["error"].mean()) == pytest.approx(0.5, abs=1e-3)  # 10⁻² of a range of 2


def test_pictures_of_any_network_are_images_and_read_no_split() -> None:
    task = build("helmholtz")
    task.splits.clear()
    assert all(float(image.min()) >= 0 and float(image.max()) <= 1 for image in task.pictures().values())


def test_mlp_is_xavier_normal_with_biases_0() -> None:
    torch.manual_seed(0)
    model = MLP(2, 3, width=400, depth=2)
    layers = [layer for layer in model.layers if isinstance(layer, nn.Linear)]
    assert [tuple(layer.weight.shape) for layer in layers] == [(400, 2), (400, 400), (3, 400)]
    for layer in layers:
        wanted = math.sqrt(2 / sum(layer.weight.shape))
        assert float(layer.weight.detach().std()) == pytest.approx(wanted, rel=4 / math.sqrt(2 * layer.weight.numel()))
        assert not layer.bias.detach().any()


# ---- runs


def test_the_objective_dataset_and_precision_are_checked() -> None:
    for change, told in (
        ({"objective": "elbo"}, "--objective elbo is not one of this task's; choose from: measured"),
        ({"dataset": "digits"}, "--dataset digits is not one of this task's; choose from: burgers, helmholtz"),
        ({"precision": "bf16"}, "--precision bf16 is not one of this task's; choose from: auto, fp32"),
    ):
        with pytest.raises(UsageError, match=told):
            PhysicsInformed(replace(CONFIG, **change), data("burgers"), CPU)
    outside = replace(data("burgers"), name="heat")
    with pytest.raises(UsageError, match="--dataset heat is not one of this task's; choose from: burgers, helmholtz"):
        PhysicsInformed(replace(CONFIG, dataset="mine:load"), outside, CPU)


def test_auto_precision_computes_second_derivatives_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "has_bf16", lambda device: True)
    for precision in ("auto", "fp32"):
        run = prepare(replace(CONFIG, precision=precision), data("burgers"))
        with run.autocast:
            assert not torch.is_autocast_enabled("cpu")
            assert run.task.losses(torch.arange(8))["residual"].dtype == torch.float32
    with prepare(replace(CONFIG, task="vae", dataset="digits", precision="auto"), datasets.get("digits")()).autocast:
        assert torch.is_autocast_enabled("cpu")  # another task takes what the processor has


RULES = ["lr_annealing", "relobralo", "softadapt", "gradnorm", "upgrad"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("rule", RULES)
def test_rules_for_it_run_without_a_warning_and_move_the_weights(rule: str, name: str, tmp_path: Path) -> None:
    if rule == "upgrad":
        pytest.importorskip("torchjd")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = loop.run(replace(CONFIG, dataset=name, weighting=rule), tmp_path, quiet=True)
    weights = result["weights"]["final"]  # type: ignore[index]
    assert result["steps"] == 20 and all(math.isfinite(weight) for weight in weights.values())
    assert weights["boundary"] != 1


def test_lr_annealing_finds_the_ratio_of_the_gradients() -> None:
    # λ = .9 + .1·max|g_residual|/mean|g_boundary| over all parameters after one step (Wang et al. 2021, alg. 1).
    run = prepare(replace(CONFIG, dataset="helmholtz", weighting="lr_annealing"), data("helmholtz"))
    rows, other = torch.arange(100), build("helmholtz")
    other.network.load_state_dict(run.task.model.state_dict())
    flat = {
        name: torch.cat([part.flatten() for part in torch.autograd.grad(loss, list(other.tap))]).abs()
        for name, loss in other.losses(rows).items()
    }
    run.learner.learn(run.task.losses(rows), run.task.tap)
    wanted = 0.9 + 0.1 * float(flat["residual"].max() / flat["boundary"].mean())
    assert run.executor.weights["boundary"] == pytest.approx(wanted, rel=1e-4)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("mode", ["lookahead_only", "full"])
def test_the_look_ahead_differentiates_the_live_graph(mode: str, name: str, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = loop.run(replace(CONFIG, dataset=name, mode=mode), tmp_path, quiet=True)
    # A graph that is lost, or a probe that reaches nothing, would be a warning, and the weights would stay.
    assert result["weights"]["final"]["boundary"] != 1  # type: ignore[index]
    assert result["skipped_steps"] == 0 and result["precision"] == "fp32"


@pytest.mark.parametrize(
    ("name", "mode", "weighting"), [("burgers", "full", "fixed"), ("helmholtz", "baseline", "lr_annealing")]
)
@pytest.mark.parametrize("step", [3, 10])  # in an epoch, and at its edge
def test_a_run_that_was_stopped_goes_on_to_the_last_bit(
    name: str, mode: str, weighting: str, step: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = replace(CONFIG, dataset=name, mode=mode, weighting=weighting)
    whole = loop.run(config, tmp_path / "whole", quiet=True)
    stopped(config, tmp_path / "cut", step, monkeypatch)
    torch.manual_seed(99)  # another process
    again = loop.run(config, tmp_path / "cut", quiet=True)
    assert row_of(again) == row_of(whole) and again["test_relative_l2"] == whole["test_relative_l2"]
    assert differences(carried(tmp_path / "cut"), carried(tmp_path / "whole")) == []
    for file in ("metrics.csv", "events.jsonl", "tb/scalars.jsonl"):
        assert (tmp_path / "cut" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()


@pytest.mark.parametrize("name", NAMES)
def test_it_learns_as_the_plain_script_does(name: str, tmp_path: Path) -> None:
    result = loop.run(replace(CONFIG, dataset=name), tmp_path, quiet=True)
    assert result["test_relative_l2"] == pytest.approx(pinn.train(data(name), 42, epochs=2, batch=100), rel=1e-3)


def test_another_seed_draws_otherwise_and_the_test_split_is_read_for_test_columns_alone(tmp_path: Path) -> None:
    one = loop.run(replace(CONFIG, epochs=1), tmp_path / "one", quiet=True)
    other = loop.run(replace(CONFIG, epochs=1, seed=7), tmp_path / "other", quiet=True)
    blind = loop.run(replace(CONFIG, epochs=1, read_test=False), tmp_path / "blind", quiet=True)
    assert one["test_loss"] != other["test_loss"] and blind["test_loss"] is None
    assert one["select_relative_l2"] == blind["select_relative_l2"]


def test_the_command_and_its_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--smoke", "--dataset", "helmholtz", "--subset", "1250", "--output-dir", str(tmp_path), "--json"]
    assert cli.main(["train", "pinn", *flags]) == 0
    row = json.loads(capsys.readouterr().out)
    assert row["status"] == "ok" and row["test_relative_l2"] > 0
    pytest.importorskip("matplotlib")
    assert cli.main(["picture", row["folder"]]) == 0
