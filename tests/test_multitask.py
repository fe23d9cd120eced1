"""Two overlapping pictures: the pairs, the terms by hand, and the run."""

from __future__ import annotations

import math
import warnings
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from adaptive_loss.checkpoint import load_file
from adaptive_loss.data import digits as digits_module
from adaptive_loss.data.base import Dataset
from adaptive_loss.errors import Stopped, UsageError
from adaptive_loss.probes import held_out
from adaptive_loss.tasks.multitask import MultiTask, overlay, shift_of, squared_error
from adaptive_loss.trainer import loop, study
from adaptive_loss.trainer.arms import mode_arm
from adaptive_loss.trainer.stopping import StopRequest
from adaptive_loss.trainer.training import prepare
from adaptive_loss.utils.config import RunConfig, Settings
from tests.reliability.bits import differences

CPU = torch.device("cpu")
CONFIG = RunConfig(
    task="multitask", dataset="digits", epochs=1, batch_size=50, threads=1, precision="fp32", device="cpu"
)


@pytest.fixture(autouse=True)
def read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Read the digits once for all runs."""
    monkeypatch.setattr(loop, "_load", lambda config: data())


@cache
def data() -> Dataset:
    return digits_module.load(seed=0)


def build(config: RunConfig = CONFIG, **options: object) -> MultiTask:
    torch.manual_seed(0)
    return MultiTask(config, data(), CPU, **options)


def test_overlay_by_hand() -> None:
    left = torch.tensor([[1, 2], [3, 4]], dtype=torch.uint8)[None, None]
    right = torch.tensor([[9, 1], [1, 1]], dtype=torch.uint8)[None, None]
    assert overlay(left, right, 1)[0, 0].tolist() == [[1, 2, 0], [3, 9, 1], [0, 1, 1]]
    assert overlay(left, right, 2)[0, 0].tolist() == [[1, 2, 0, 0], [3, 4, 0, 0], [0, 0, 9, 1], [0, 0, 1, 1]]


@pytest.mark.parametrize("side", [8, 12, 28, 32])
def test_pairs_overlap_and_halve_twice(side: int) -> None:
    assert side / 4 <= shift_of(side) < side and shift_of(side) % 4 == 0


def test_squared_error_by_hand() -> None:
    # (0.5² + 1²) and 0: their mean.
    pixels = torch.tensor([[0.5, 1.0], [0.0, 0.0]])[:, None, None]
    assert float(squared_error(torch.zeros(2, 1, 1, 2), pixels)) == pytest.approx(1.25 / 2)


def test_terms_by_hand() -> None:
    task = build()
    rows, again = torch.arange(20), torch.Generator()
    again.set_state(task.pairing.get_state())
    losses = task.losses(rows)
    partners = torch.randint(1000, (20,), generator=again)
    images, labels = task.splits["train"].images, task.splits["train"].labels
    pixels = overlay(images[rows], images[partners], 4).float() / 255
    features = task.network(pixels)
    torch.testing.assert_close(losses["left"], F.cross_entropy(task.network.left(features), labels[rows]))
    torch.testing.assert_close(losses["right"], F.cross_entropy(task.network.right(features), labels[partners]))
    error = (task.network.decoder(features) - pixels).square().sum() / 20
    torch.testing.assert_close(losses["reconstruction"], error)
    assert list(losses) == list(task.terms)


def test_every_term_reaches_the_trunk_through_the_tap() -> None:
    task = build()
    for loss in task.losses(torch.arange(10)).values():
        (slope,) = torch.autograd.grad(loss, task.tap, retain_graph=True)  # type: ignore[arg-type]
        assert torch.isfinite(slope).all() and slope.any()


def test_terms_left_out_change_no_other_term_and_nothing_global_is_drawn() -> None:
    whole = build().losses(torch.arange(32))
    for name in whole:
        task = build(wanted=[name])
        state = torch.get_rng_state()
        alone = task.losses(torch.arange(32))
        assert set(alone) == {name} and torch.equal(alone[name], whole[name])
        assert torch.equal(state, torch.get_rng_state())


def test_pairs_are_fixed_by_the_data_s_seed_and_drawn_anew_in_training() -> None:
    one, other, elsewhere = build(), build(replace(CONFIG, seed=7)), build(replace(CONFIG, data_seed=1))
    for name in ("probe", "select", "test"):
        assert torch.equal(one.pairs[name].images, other.pairs[name].images)
        assert not torch.equal(one.pairs[name].images, elsewhere.pairs[name].images)
        assert torch.equal(one.pairs[name].left, one.splits[name].labels)
        assert torch.equal(one.pairs[name].right.sort().values, one.splits[name].labels.sort().values)
    first, second = (float(one.losses(torch.arange(32))["right"].detach()) for _ in range(2))
    assert first != second  # the same rows with other partners
    assert first != float(other.losses(torch.arange(32))["right"].detach())


def test_the_probe_is_the_mean_cross_entropy_of_both_heads_on_probe_pairs() -> None:
    task = build()
    assert isinstance(task.probe, held_out)
    images, left, right = list(task.probe.data)
    assert images is task.pairs["probe"].images and len(images) == 150
    whole = task._objective(images, left, right)
    features = task.network(images.float() / 255)
    heads = F.cross_entropy(task.network.left(features), left), F.cross_entropy(task.network.right(features), right)
    torch.testing.assert_close(whole, (heads[0] + heads[1]) / 2)
    task.probe().backward()
    for part in (task.network.trunk, task.network.left, task.network.right):
        assert all(p.grad is not None and p.grad.any() for p in part.parameters())


def test_evaluation_by_hand_repeats_and_leaves_the_model() -> None:
    task = build()
    found = task.evaluate("test")
    assert found == task.evaluate("test") and task.model.training
    pairs = task.pairs["test"]
    with torch.no_grad():
        features = task.network(pairs.images.float() / 255)
        for head, labels in (("left", pairs.left), ("right", pairs.right)):
            logits = getattr(task.network, head)(features)
            assert found[f"{head}_accuracy"] == pytest.approx(float((logits.argmax(1) == labels).double().mean()))
            assert found[f"{head}_loss"] == pytest.approx(float(F.cross_entropy(logits, labels)), rel=1e-5)
        error = squared_error(task.network.decoder(features), pairs.images.float() / 255)
    assert found["reconstruction"] == pytest.approx(float(error), rel=1e-5)
    assert found["loss"] == pytest.approx((found["left_loss"] + found["right_loss"]) / 2)
    assert found["accuracy"] == pytest.approx((found["left_accuracy"] + found["right_accuracy"]) / 2)


def test_pictures_are_pairs_and_what_is_made_of_them() -> None:
    shown = build().pictures()
    assert set(shown) == {"pairs", "reconstructions"}
    for images in shown.values():
        assert images.shape == (16, 1, 12, 12) and images.min() >= 0 and images.max() <= 1


def test_everything_stays_on_the_device_it_is_given() -> None:
    task = MultiTask(CONFIG, data(), torch.device("meta"))
    losses = task.losses(torch.arange(32))
    sum(losses.values()).backward()  # type: ignore[union-attr]
    assert {loss.device.type for loss in (*losses.values(), task.probe())} == {"meta"}


def test_no_base_so_the_weights_keep_their_sum(tmp_path: Path) -> None:
    result = loop.run(replace(CONFIG, mode="lookahead_only"), tmp_path, quiet=True)
    final = result["weights"]["final"]  # type: ignore[index]
    assert sum(final.values()) == pytest.approx(3.0) and final["reconstruction"] < 1.0


def test_training_on_the_base_alone_is_refused_where_there_is_none(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="mode base_only: task multitask has no base term"):
        prepare(replace(CONFIG, mode="base_only"), data())
    settings = Settings(task="multitask", dataset="digits")
    arms = tuple(mode_arm(name) for name in ("baseline", "base_only"))
    refused = study.Study(settings, arms, (1,), tmp_path / "x.csv", tmp_path / "x")
    with pytest.raises(UsageError, match="mode base_only: task multitask has no base term; leave that mode out"):
        study.check(refused)


@pytest.mark.parametrize("rule", ["uncertainty", "dwa", "gradnorm"])
def test_classic_rules_run_without_a_warning(rule: str, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = loop.run(replace(CONFIG, weighting=rule, epochs=2), tmp_path, quiet=True)
    assert result["status"] == "ok" and result["skipped_steps"] == 0


@pytest.mark.parametrize("rule", ["upgrad", "mgda"])
def test_rules_on_gramians_run_at_the_shared_features(rule: str, tmp_path: Path) -> None:
    pytest.importorskip("torchjd")
    result = loop.run(replace(CONFIG, weighting=rule), tmp_path, quiet=True)
    assert result["status"] == "ok" and math.isfinite(result["test_loss"])  # type: ignore[arg-type]


def test_a_run_that_was_stopped_goes_on_to_the_last_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = replace(CONFIG, mode="full")
    loop.run(config, tmp_path / "whole", quiet=True)
    with monkeypatch.context() as patch:
        asked = iter([None] * 6 + [Stopped("stopped by a test", 143)])
        patch.setattr(StopRequest, "asked", lambda self: next(asked))
        with pytest.raises(Stopped):
            loop.run(config, tmp_path / "cut", quiet=True)
    torch.manual_seed(99)  # another process
    loop.run(config, tmp_path / "cut", quiet=True)
    whole, cut = (load_file(tmp_path / name / "checkpoint.pt") for name in ("whole", "cut"))
    del whole["counters"]["seconds"], cut["counters"]["seconds"]
    assert differences(cut, whole) == []
    for name in ("metrics.csv", "events.jsonl", "tb/scalars.jsonl"):
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_permuted_test_labels_change_only_test_columns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = replace(CONFIG, epochs=3, lr=2e-3)  # past chance, where no accuracy would change
    plain = loop.run(config, tmp_path / "plain", quiet=True)
    test = data().test
    permuted = replace(data(), test=replace(test, labels=test.labels.roll(1)))
    monkeypatch.setattr(loop, "_load", lambda config: permuted)
    other = loop.run(config, tmp_path / "permuted", quiet=True)
    timing = {"train_seconds", "peak_memory_mb", "steps_per_second"}
    changed = {name for name in plain if plain[name] != other[name]} - timing
    wanted = {f"test_{head}{what}" for head in ("left_", "right_", "") for what in ("accuracy", "loss")}
    assert changed == wanted


def test_it_learns(tmp_path: Path) -> None:
    # Chance is 0.1. The quick form is compared with a plain script in benchmarks/reference/multitask.py.
    short = replace(CONFIG, epochs=8, lr=2e-3, weights=dict(MultiTask.customary))
    assert loop.run(short, tmp_path, quiet=True)["test_accuracy"] > 0.6  # type: ignore[operator]
