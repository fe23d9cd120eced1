"""Weights that stay at a bound: one alarm that names the term, where its weight stands, and what is observed."""

from __future__ import annotations

import io
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

from adaptive_loss import Guards, LossExecutor, weigher
from adaptive_loss.events import Event
from adaptive_loss.weighting.balancing import Balancing
from adaptive_loss.weighting.base import Weighting
from adaptive_loss.weighting.db_mtl import DBMTL
from adaptive_loss.weighting.encodec import EnCodec
from adaptive_loss.weighting.fixed import Fixed
from adaptive_loss.weighting.geco import GECO
from adaptive_loss.weighting.gradnorm import GradNorm
from adaptive_loss.weighting.imtl_l import IMTLL
from adaptive_loss.weighting.inverse_ema import InverseEMA
from adaptive_loss.weighting.lr_annealing import LRAnnealing
from adaptive_loss.weighting.optimal_sigma import OptimalSigma
from adaptive_loss.weighting.vqgan import VQGAN

PLAIN = [[3.0, 0.0], [0.0, 3.0]]
FAR = [[3.0, 0.0], [0.0, 1e-9]]  # b's gradient, and its loss, are next to nothing


class Run:
    """Terms a and b whose gradients, and losses, are given; the weights move freely."""

    def __init__(self, rule: Weighting) -> None:
        guards = Guards(rate_limit=None, share_cap=None, spikes=False)
        self.executor = LossExecutor({"a": 1.0, "b": 1.0}, base="a", weighting=rule, guards=guards)
        self.w = nn.Parameter(torch.ones(2, dtype=torch.float64))
        self.optimizer = torch.optim.SGD([{"params": [self.w], "lr": 0.0}])
        if learned := list(self.executor.parameters()):
            self.optimizer.add_param_group({"params": learned, "lr": 1.0})

    def step(self, rows: Sequence[Sequence[float] | None]) -> list[Event]:
        self.optimizer.zero_grad()
        live: dict[str, Tensor | None] = {
            name: None if row is None else (self.w * torch.tensor(row, dtype=torch.float64)).sum()
            for name, row in zip("ab", rows, strict=True)
        }
        self.executor(live, tap=self.w).backward()  # type: ignore[arg-type]
        record = self.executor.step(self.optimizer)
        assert record.applied
        return [event for event in record.events if event.kind == "alarm"]


@pytest.mark.parametrize(
    ("rule", "term"),
    [
        (IMTLL(2, bound=3.0), "b"),
        (InverseEMA(2, decay=0.1), "b"),
        (VQGAN(2), "b"),
        (LRAnnealing(2, 0.9), "b"),
        (EnCodec(2, decay=0.1), "b"),
        (DBMTL(2, limit=1e3), None),
        (GradNorm(2, alpha=0.0, rate=0.2), "a"),
        (VQGAN(2) * Fixed(2), "b"),
    ],
    ids=lambda value: value.name if isinstance(value, Weighting) else None,
)
def test_a_weight_at_its_rules_own_bound_raises_one_alarm(
    rule: Weighting, term: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weigher, "ALARM_AFTER", 6)
    run = Run(rule)
    assert [event for _ in range(15) for event in run.step(PLAIN)] == []
    found = [event for _ in range(15) for event in run.step(FAR)]
    # DB-MTL's gradients are of logarithms: b's is as long as a's, whatever its loss.
    assert [event.details["term"] for event in found] == ([] if term is None else [term])
    for alarm in found:
        weight, loss = alarm.details["weight"], alarm.details["loss"]
        assert weight == pytest.approx(run.executor.weights[alarm.details["term"]], rel=0.1)
        assert alarm.reason == (
            f"weighting {rule.name!r} has held {term!r} at a bound of its own for 6 steps, "
            f"at a weight of {weight:.6g} and a loss of {loss:.6g}: look at that term"
        )


@pytest.mark.parametrize(
    "rule", [OptimalSigma(2, floor=0.1), Balancing(2, floor=0.1, decay=0.5)], ids=lambda rule: rule.name
)
def test_a_variance_at_its_floor_raises_one_alarm(rule: Weighting, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weigher, "ALARM_AFTER", 6)
    run = Run(rule)
    assert [event for _ in range(8) for event in run.step(PLAIN)] == []
    found = [event for _ in range(25) for event in run.step([[1e-3, 0.0], [0.0, 1.0]])]
    assert [event.details["term"] for event in found] == ["a"] and found[0].details["loss"] == pytest.approx(1e-3)


def test_torchjds_weights_at_their_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torchjd")
    from adaptive_loss.weighting.torchjd import torchjd_rule

    monkeypatch.setattr(weigher, "ALARM_AFTER", 4)
    run = Run(torchjd_rule(2, "UPGrad", limit=0.25))
    found = [event for _ in range(9) for event in run.step(PLAIN)]
    assert [event.details["term"] for event in found] == ["a", "b"]


def test_the_count_waits_while_the_term_is_absent_and_begins_anew_when_it_was_free(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(weigher, "ALARM_AFTER", 4)
    run = Run(VQGAN(2))
    steps = [FAR, FAR, [FAR[0], None], [FAR[0], None], FAR, PLAIN, PLAIN, *[FAR] * 5]
    told = [i for i, rows in enumerate(steps) for _ in run.step(rows)]
    # The rule's weights of a step are known to stand after it: the first of the four is one step late.
    assert told == [11]


def test_the_count_survives_a_restart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weigher, "ALARM_AFTER", 6)
    first, second = (Run(InverseEMA(2, decay=0.0)) for _ in range(2))
    for _ in range(4):
        assert first.step(FAR) == []
    file = io.BytesIO()
    torch.save(first.executor.state_dict(), file)
    second.executor.load_state_dict(torch.load(io.BytesIO(file.getvalue()), weights_only=True))
    left = [[len(run.step(FAR)) for _ in range(4)] for run in (first, second)]
    assert left[0] == left[1] and sum(left[0]) == 1


def test_a_target_that_no_weight_reaches_raises_an_alarm() -> None:
    """The law that holds targets by default stands at 10^4 times the start weight: 93 steps to it, 1,000 more."""
    executor = LossExecutor({"a": 1.0, "b": 0.5}, base="a", targets={"b": 2.0}, guards=Guards(share_cap=None))
    w = nn.Parameter(torch.ones(()))
    optimizer = torch.optim.SGD([w], lr=0.0)
    told = []
    for step in range(1110):
        # Given up where a tenth of the steps was spent at the bound: a short run has no thousand of them.
        assert bool(executor.unreached) == (step > 102)
        executor({"a": w, "b": 1000 * w}).backward()
        told += [(step, event) for event in executor.step(optimizer).events if event.kind == "alarm"]
    ((step, alarm),) = told
    assert 1085 <= step <= 1100 and executor.weights["b"] == pytest.approx(5000)
    assert alarm.details["observed"] == pytest.approx(1000) and alarm.details["target"] == 2.0
    assert alarm.reason.startswith("the log-weight of 'b', from its start has been at its bound 9.21034 for 1000 steps")
    assert list(executor.unreached) == ["b"] and "1000 is observed and 2 is wanted" in executor.unreached["b"]


@pytest.mark.parametrize("weighting", ["geco", Fixed(2) * GECO(2)], ids=["geco", "a product"])
def test_a_rules_own_target_that_no_weight_reaches(weighting: str | Weighting) -> None:
    guards = Guards(spikes=False)
    executor = LossExecutor({"a": 1.0, "b": 1.0}, base="a", targets={"b": 2.0}, weighting=weighting, guards=guards)
    w = nn.Parameter(torch.ones(()))
    optimizer = torch.optim.SGD([w], lr=0.0)
    found = []
    for loss in [1e6] * 150 + [-1e9]:
        executor({"a": w, "b": loss * w}).backward()
        executor.step(optimizer)
        found.append(executor.unreached)
    assert found[0] == {} and list(found[149]) == ["b"] and "2 is wanted" in found[149]["b"]
    assert found[150] == {}, "a law that no longer pushes has given nothing up"
