"""A student under labels, a teacher and a reference: the terms by hand, the frozen networks, and the run."""

from __future__ import annotations

import warnings
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.distributions import Categorical, kl_divergence

from adaptive_loss.checkpoint import load_file
from adaptive_loss.data import digits as digits_module
from adaptive_loss.data.base import Dataset
from adaptive_loss.errors import Stopped
from adaptive_loss.models.feature_cnn import FeatureCNN
from adaptive_loss.probes import held_out
from adaptive_loss.tasks import distill
from adaptive_loss.tasks.distill import Distill, Size, divergence, soft_target_divergence
from adaptive_loss.trainer import loop
from adaptive_loss.trainer.stopping import StopRequest
from adaptive_loss.utils.config import RunConfig
from tests.reliability.bits import differences

CPU = torch.device("cpu")
CONFIG = RunConfig(task="distill", dataset="digits", epochs=1, batch_size=50, threads=1, precision="fp32", device="cpu")


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Read the digits once for all runs, and let a small teacher learn a little."""
    monkeypatch.setattr(loop, "_load", lambda config: data())
    monkeypatch.setattr(distill, "TEACHER", Size((16, 32), features=64, steps=40))
    monkeypatch.setattr(distill, "STUDENT", Size((4, 8), features=16, steps=10))


@cache
def data() -> Dataset:
    return digits_module.load(seed=0)


def build(config: RunConfig = CONFIG, **options: Any) -> Distill:
    return Distill(config, data(), CPU, **options)


def equal(one: FeatureCNN | None, other: FeatureCNN | None) -> bool:
    assert one is not None and other is not None
    pairs = zip(one.state_dict().values(), other.state_dict().values(), strict=True)
    return all(torch.equal(p, q) for p, q in pairs)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_distillation_against_torch_distributions(temperature: float) -> None:
    student, teacher = torch.randn(6, 5, dtype=torch.double), torch.randn(6, 5, dtype=torch.double)
    soft, hard = Categorical(logits=student / temperature), Categorical(logits=teacher / temperature)
    wanted = temperature**2 * kl_divergence(hard, soft).mean()
    torch.testing.assert_close(soft_target_divergence(student, teacher, temperature), wanted)


def test_reference_is_the_other_way_round() -> None:
    # p = (1/4, 3/4) of the student, q = (1/2, 1/2) of the reference: Σ p log(p/q) = log 2 − H(p).
    p, q = torch.tensor([[0.25, 0.75]]).log(), torch.zeros(1, 2)
    assert float(divergence(p, q)) == pytest.approx(0.130812, rel=1e-5)
    assert float(divergence(q, p)) == pytest.approx(0.143841, rel=1e-5)  # ½ log(4/3)


def test_equal_logits_cost_nothing_and_pull_nowhere() -> None:
    for loss in (soft_target_divergence, divergence):
        student = torch.randn(4, 3, dtype=torch.double).requires_grad_()
        value = loss(student, student.detach())
        value.backward()
        assert float(value.detach()) == pytest.approx(0, abs=1e-12)
        assert student.grad is not None and student.grad.abs().max() < 1e-12


def test_the_gradient_keeps_its_size_as_the_temperature_grows() -> None:
    # Hinton et al., eq. 4: for large T and logits of mean 0, T² times the gradient nears (s − t)/C an example.
    student, teacher = torch.randn(1, 5, dtype=torch.double), torch.randn(1, 5, dtype=torch.double)
    student, teacher = (student - student.mean()).requires_grad_(), teacher - teacher.mean()
    soft_target_divergence(student, teacher, 1000.0).backward()
    torch.testing.assert_close(student.grad, (student.detach() - teacher) / 5, rtol=5e-3, atol=5e-4)


def test_terms_by_hand() -> None:
    task = build(replace(CONFIG, augment="none"))
    rows = torch.arange(30)
    losses = task.losses(rows)
    pixels = task.splits["train"].images[rows].float() / 255
    assert task.teacher is not None and task.reference is not None
    logits, theirs, before = (network(pixels) for network in (task.network, task.teacher, task.reference))
    torch.testing.assert_close(losses["cross_entropy"], F.cross_entropy(logits, task.splits["train"].labels[rows]))
    torch.testing.assert_close(losses["distillation"], soft_target_divergence(logits, theirs, 4.0))
    torch.testing.assert_close(losses["reference"], divergence(logits, before))
    assert list(losses) == list(task.terms) and task.terms[0] == task.base


def test_the_reference_is_where_the_student_begins_and_stays_there() -> None:
    task = build()
    assert equal(task.reference, task.network)
    assert float(task.losses(torch.arange(50))["reference"].detach()) == pytest.approx(0, abs=1e-6)
    with torch.no_grad():
        next(task.network.parameters()).add_(1.0)
    losses = task.losses(torch.arange(50))
    assert losses["reference"] > 0.01
    sum(losses.values()).backward()  # type: ignore[union-attr]
    assert task.teacher is not None and task.reference is not None
    for network in (task.teacher, task.reference):
        assert not network.training and all(p.grad is None for p in network.parameters())
    assert all(p.grad is not None for p in task.network.parameters())


def test_the_teacher_is_the_data_s_and_the_student_the_seed_s() -> None:
    one, other, elsewhere = build(), build(replace(CONFIG, seed=7)), build(replace(CONFIG, data_seed=1))
    assert equal(one.teacher, other.teacher) and not equal(one.teacher, elsewhere.teacher)
    assert not equal(one.reference, other.reference) and equal(one.reference, elsewhere.reference)


def test_nothing_global_is_drawn() -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    build().losses(torch.arange(32))
    assert torch.equal(before, torch.get_rng_state())


def test_terms_left_out_change_no_other_term_and_cost_no_teacher() -> None:
    whole = build().losses(torch.arange(32))
    for name in whole:
        task = build(wanted=[name])
        alone = task.losses(torch.arange(32))
        assert set(alone) == {name} and torch.equal(alone[name], whole[name])
        assert (task.teacher is None) == (name != "distillation")
        assert (task.reference is None) == (name != "reference")


def test_the_probe_is_cross_entropy_on_the_probe_split_and_reaches_the_student() -> None:
    task = build()
    assert isinstance(task.probe, held_out)
    images, labels = list(task.probe.data)
    assert images is task.splits["probe"].images and labels is task.splits["probe"].labels
    torch.testing.assert_close(task._objective(images, labels), F.cross_entropy(task.network(images / 255), labels))
    task.probe().backward()
    assert all(p.grad is not None and p.grad.any() for p in task.network.parameters())


def test_evaluation_by_hand_repeats_and_leaves_the_model() -> None:
    task = build()
    with torch.no_grad():
        next(task.network.parameters()).mul_(1.5)
    found, split = task.evaluate("test"), task.splits["test"]
    assert found == task.evaluate("test") and task.model.training
    pixels = split.images.float() / 255
    assert task.teacher is not None and task.reference is not None
    with torch.no_grad():
        logits, theirs, before = (network(pixels).double() for network in (task.network, task.teacher, task.reference))
    said, meant = logits.argmax(1), theirs.argmax(1)
    assert found["accuracy"] == pytest.approx(float((said == split.labels).double().mean()))
    assert found["teacher_accuracy"] == pytest.approx(float((meant == split.labels).double().mean()))
    assert found["agreement"] == pytest.approx(float((said == meant).double().mean()))
    assert found["loss"] == pytest.approx(float(F.cross_entropy(logits, split.labels)), rel=1e-5)
    assert found["reference"] == pytest.approx(float(divergence(logits, before)), rel=1e-5)
    assert set(build(wanted=["cross_entropy"]).evaluate("select")) == {"accuracy", "loss"}


def test_everything_stays_on_the_device_it_is_given() -> None:
    task = Distill(CONFIG, data(), torch.device("meta"))
    losses = task.losses(torch.arange(32))
    sum(losses.values()).backward()  # type: ignore[union-attr]
    assert {loss.device.type for loss in (*losses.values(), task.probe())} == {"meta"}


@pytest.mark.parametrize("rule", ["uncertainty", "dwa", "gradnorm"])
def test_classic_rules_run_without_a_warning(rule: str, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = loop.run(replace(CONFIG, weighting=rule, epochs=2), tmp_path, quiet=True)
    assert result["status"] == "ok" and result["skipped_steps"] == 0


@pytest.mark.parametrize("rule", ["adaptive_kl", "geco", "fixed"])
def test_a_target_in_nats_moves_the_reference_s_weight(rule: str, tmp_path: Path) -> None:
    # The student leaves its reference by far more than 0.001 nats within three epochs, and by far less than 100.
    final = {}
    for target in (1e-3, 100.0):
        config = replace(CONFIG, epochs=3, lr=3e-3, weighting=rule, targets={"reference": target})
        final[target] = loop.run(config, tmp_path / str(target), quiet=True)["weights"]["final"]["reference"]  # type: ignore[index]
    assert final[1e-3] > 1.0 > final[100.0]


@pytest.mark.parametrize("mode", ["full", "lookahead_only"])
def test_a_run_that_was_stopped_goes_on_to_the_last_bit(
    mode: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = replace(CONFIG, mode=mode)
    loop.run(config, tmp_path / "whole", quiet=True)
    with monkeypatch.context() as patch:
        asked = iter([None] * 6 + [Stopped("stopped by a test", 143)])
        patch.setattr(StopRequest, "asked", lambda self: next(asked))
        with pytest.raises(Stopped):
            loop.run(config, tmp_path / "cut", quiet=True)
    torch.manual_seed(99)  # another process
    # On another machine the frozen networks might come out otherwise; those of the checkpoint count.
    monkeypatch.setattr(distill, "FITTING_RATE", 1e-3)
    loop.run(config, tmp_path / "cut", quiet=True)
    whole, cut = (load_file(tmp_path / name / "checkpoint.pt") for name in ("whole", "cut"))
    del whole["counters"]["seconds"], cut["counters"]["seconds"]
    assert differences(cut, whole) == []
    for name in ("metrics.csv", "events.jsonl", "tb/scalars.jsonl"):
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_it_learns(tmp_path: Path) -> None:
    # Chance is 0.1. The quick form is compared with a plain script in benchmarks/reference/distill.py.
    short = replace(CONFIG, epochs=8, lr=3e-3, weights=dict(Distill.customary))
    assert loop.run(short, tmp_path, quiet=True)["test_accuracy"] > 0.6  # type: ignore[operator]
