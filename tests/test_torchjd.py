"""TorchJD's rules behind our interface: the same weights, and the state that TorchJD loses."""

from __future__ import annotations

import builtins
import copy
import io
import math
import warnings

import pytest
import torch
from torch import Tensor, nn

from adaptive_loss import LossExecutor
from adaptive_loss.errors import UsageError
from adaptive_loss.guards import Guards
from adaptive_loss.weighting import TORCHJD, weightings
from adaptive_loss.weighting.base import Weighting

pytest.importorskip("torchjd")

from torchjd import aggregation, scalarization

from adaptive_loss.weighting._torchjd_objects import own_dice
from adaptive_loss.weighting.torchjd import TorchJD, _find, bounded, rule_class, square_root, torchjd_rule

FREE = Guards(rate_limit=None, share_cap=None, spikes=False)
SHORT = sorted(TORCHJD)
SCALARIZERS = ["DWA", "GeometricMean", "IMTLL", "Mean", "Random", "STCH", "Sum", "UW"]
JACOBIAN = [[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0], [1.0, 2.0, -3.0]]


def named(values) -> dict:
    return {f"t{i}": value for i, value in enumerate(values) if value is not None}


def executor_of(rule: str | Weighting, n_terms: int = 3, **options) -> LossExecutor:
    base = {"base": "t0"} if rule == "pcd" else {}
    return LossExecutor(named([1.0] * n_terms), weighting=rule, **{"guards": FREE, **base, **options})


def linear(w: Tensor, rows: list) -> dict[str, Tensor]:
    """Terms whose gradients are the rows; None is absent. All losses are positive at w = 1 with the offset."""
    return named([None if row is None else (w * torch.as_tensor(row, dtype=w.dtype)).sum() + 9 for row in rows])


def one_step(executor: LossExecutor, w: nn.Parameter, rows: list):
    w.grad = None
    executor(linear(w, rows), tap=w).backward()
    return executor.step(torch.optim.SGD([w, *executor.parameters()], lr=0.0))


def at_one() -> nn.Parameter:
    return nn.Parameter(torch.ones(3, dtype=torch.float64))


def theirs(method: str) -> nn.Module:
    """TorchJD's own object, made as its documentation says."""
    options = {"CAGrad": {"c": 0.5}, "FairGrad": {"alpha": 1.0}, "NashMTL": {"n_tasks": 3}}.get(method, {})
    return getattr(aggregation, method)(**options)


# ---- the same weights ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("short", SHORT)
def test_the_applied_gradient_is_that_of_torchjds_aggregator(short: str) -> None:
    """Two steps, so that stateful ones are told apart from fresh ones."""
    executor, w, aggregator = executor_of(short), at_one(), theirs(TORCHJD[short])
    for draws, factor in enumerate((1.0, 3.0)):
        rows = torch.tensor(JACOBIAN, dtype=torch.float64) * torch.tensor([[1.0], [factor], [1.0]])
        with own_dice(0, draws), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            wanted = aggregator(rows)
        record = one_step(executor, w, rows.tolist())
        assert w.grad is not None and record.applied
        torch.testing.assert_close(w.grad, wanted, rtol=1e-4, atol=1e-6)
        reported = torch.tensor(list(record.weights.values()), dtype=torch.float64)
        torch.testing.assert_close(w.grad, reported @ rows, rtol=1e-9, atol=1e-12)


def test_golden_weights_of_upgrad() -> None:
    # From TorchJD's documentation of torchjd.aggregation: J = [[-4, 1, 1], [6, 1, 1]].
    assert list(one_step(executor_of("torchjd:UPGrad", 2), at_one(), JACOBIAN[:2]).weights.values()) == pytest.approx(
        [1.1109, 0.7894], abs=1e-4
    )


def test_golden_weights_of_mgda() -> None:
    # The shortest mix of (3, 0, 0) and (0, 1, 0): α = (1, 9)/10 minimises ‖(3α, 1 − α)‖.
    found = one_step(executor_of("mgda", 2), at_one(), [[3.0, 0.0, 0.0], [0.0, 1.0, 0.0]]).weights
    assert list(found.values()) == pytest.approx([0.1, 0.9], rel=1e-6)


@pytest.mark.parametrize("name", SCALARIZERS)
def test_a_scalarizers_gradient_and_value(name: str) -> None:
    kind = getattr(scalarization, name)
    theirs = {"STCH": lambda: kind(1.0), "UW": lambda: kind(3), "IMTLL": lambda: kind(3)}.get(name, kind)()
    executor, w, v = executor_of(f"torchjd:{name}"), at_one(), at_one()
    ours = list(executor.parameters())
    for step in range(6):
        rows = [[x * (1 + i * step) for x in row] for i, row in enumerate(JACOBIAN)]
        for p in (w, v, *ours, *theirs.parameters()):
            p.grad = None
        total = executor(linear(w, rows))
        total.backward()
        with own_dice(0, step):
            wanted = theirs(torch.stack(list(linear(v, rows).values())))
        wanted.backward()
        torch.testing.assert_close(w.grad, v.grad, rtol=1e-6, atol=1e-9)
        if ours:
            assert total.item() == pytest.approx(wanted.item(), rel=1e-6)
        for p, q in zip(ours, theirs.parameters(), strict=True):
            torch.testing.assert_close(p.grad, q.grad)
            with torch.no_grad():
                p -= 0.01 * p.grad
                q -= 0.01 * q.grad
        executor.step(torch.optim.SGD([w, *ours], lr=0.0))
        if step % 2:
            executor.end_epoch()
            getattr(theirs, "step", lambda: None)()
    if name == "DWA":
        assert len(set(executor.weights.values())) > 1


def test_pcds_primary_objective_is_the_base() -> None:
    order = [1, 0, 2]
    plain = one_step(executor_of("pcd"), at_one(), JACOBIAN).weights
    moved = one_step(executor_of("torchjd:PCD", base="t1"), at_one(), [JACOBIAN[i] for i in order]).weights
    assert [moved[f"t{i}"] for i in order] == pytest.approx(list(plain.values()))
    with pytest.raises(ValueError, match=r"^weighting 'torchjd:PCD' needs base: "):
        one_step(executor_of("torchjd:PCD"), at_one(), JACOBIAN)


def test_a_root_has_the_gramian() -> None:
    rows = torch.tensor(JACOBIAN, dtype=torch.float64)
    rows[2] = rows[0] + rows[1]  # rank 2
    root = square_root(rows @ rows.T)
    torch.testing.assert_close(root @ root.T, rows @ rows.T)


# ---- options, names, errors ---------------------------------------------------------------------------------------


def test_options_reach_torchjd() -> None:
    rows = torch.tensor(JACOBIAN, dtype=torch.float64)
    w = at_one()
    one_step(executor_of(torchjd_rule(3, "CAGrad", c=0.9)), w, JACOBIAN)
    torch.testing.assert_close(w.grad, aggregation.CAGrad(c=0.9)(rows), rtol=1e-4, atol=1e-6)
    wanted = aggregation.UPGrad(pref_vector=torch.tensor([0.7, 0.2, 0.1]).double())
    for made in (wanted, aggregation.UPGradWeighting(pref_vector=torch.tensor([0.7, 0.2, 0.1]).double())):
        one_step(executor_of(torchjd_rule(3, made)), w, JACOBIAN)
        torch.testing.assert_close(w.grad, wanted(rows), rtol=1e-4, atol=1e-6)


def test_a_preference_is_cut_down_to_the_terms_that_are_there() -> None:
    preference = torch.tensor([0.7, 0.2, 0.1], dtype=torch.float64)
    w = at_one()
    one_step(executor_of(torchjd_rule(3, "UPGrad", pref_vector=preference)), w, [JACOBIAN[0], None, JACOBIAN[2]])
    two = torch.tensor([JACOBIAN[0], JACOBIAN[2]], dtype=torch.float64)
    torch.testing.assert_close(w.grad, aggregation.UPGrad(preference[[0, 2]])(two), rtol=1e-4, atol=1e-6)


def test_names() -> None:
    assert weightings.resolve("upgrad") == "torchjd:UPGrad"
    assert executor_of("nash_mtl").weighting.name == "torchjd:NashMTL"
    assert "upgrad" not in weightings.names() and "torchjd" not in weightings.names()
    assert rule_class("UPGrad") is rule_class("UPGrad") and rule_class("UPGrad").__name__ == "UPGrad"
    assert (weightings.get("mgda").needs, weightings.get("pcd").needs) == (("gradients",), ("gradients", "base"))
    assert (weightings.get("torchjd:STCH").needs, weightings.get("torchjd:DWA").needs) == ((), ("epochs",))
    with pytest.raises(UsageError, match=r"choose from: .*upgrad"):
        weightings.resolve("upgrade")


def test_every_weighting_and_scalarizer_of_torchjd_is_either_usable_or_refused_with_a_reason() -> None:
    names = {name.removesuffix("Weighting") for name in aggregation.__all__ if name.endswith("Weighting")}
    for name in sorted((names | set(scalarization.__all__)) - {"", "Scalarizer"}):
        try:
            assert issubclass(rule_class(name), Weighting)
        except UsageError as error:
            assert str(error).startswith(f"TorchJD's {name} cannot be used as weighting: it ")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: rule_class("Foo"), "^TorchJD has no 'Foo'; choose from: .*AlignedMTL.*UPGrad"),
        (lambda: rule_class("FAMO"), "use weighting='famo'"),
        (lambda: rule_class("MoDo"), "two independent batches"),
        (
            lambda: executor_of("torchjd:Krum"),
            r"takes options n_byzantine, n_selected .*torchjd_rule\(3, 'Krum', \.\.\.",
        ),
        (lambda: torchjd_rule(3, "UPGrad", c=1.0), "takes options pref_vector, projector"),
        (lambda: torchjd_rule(2, aggregation.Mean()), "cannot be used"),
    ],
)
def test_what_cannot_be_had_is_one_line(make, message: str) -> None:
    with pytest.raises(UsageError, match=message) as error:
        make()
    assert "\n" not in str(error.value)


def test_a_missing_extra_gives_the_line_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *args, **kwargs):
        if name.split(".")[0] == "torchjd":
            raise ModuleNotFoundError("No module named 'torchjd'", name="torchjd")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    rule_class.cache_clear()
    with pytest.raises(UsageError, match=r"needs TorchJD, which is not installed; run: pip install 'adaptive-loss\[to"):
        LossExecutor({"a": 1.0}, weighting="upgrad")


def test_a_missing_solver_gives_the_line_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_find("FairGrad"), "_REQUIRED_DEPS", ["no_such_solver"])
    with pytest.raises(UsageError, match=r"needs packages that are not installed; run: pip install 'adaptive-loss\["):
        executor_of("fairgrad")


@pytest.mark.parametrize("short", SHORT)
def test_without_a_tap_it_is_one_line(short: str) -> None:
    with pytest.raises(ValueError, match=rf"^weighting 'torchjd:{TORCHJD[short]}' needs gradients: call executor"):
        executor_of(short)(linear(at_one(), JACOBIAN))


# ---- state --------------------------------------------------------------------------------------------------------

STATEFUL = ["gradvac", "pcd", "nash_mtl", "pcgrad"]


def crmogm() -> Weighting:
    return torchjd_rule(3, aggregation.CRMOGMWeighting(aggregation.UPGradWeighting(), alpha=0.8))


def train(executor: LossExecutor, w: nn.Parameter, steps: range, epoch: int = 3) -> list[dict[str, float]]:
    seen = []
    for step in steps:
        dice = torch.Generator().manual_seed(step)
        rows: list = torch.randn(3, 3, generator=dice, dtype=torch.float64).tolist()
        if step % 4 == 2:
            rows[2] = None
        seen.append(one_step(executor, w, rows).weights)
        if step % epoch == epoch - 1:
            executor.end_epoch()
    return seen


@pytest.mark.parametrize("rule", [*STATEFUL, "crmogm", "torchjd:DWA", "torchjd:Random", "torchjd:UW", "upgrad"])
def test_save_load_continue_is_bit_equal(rule: str) -> None:
    """In TorchJD 0.18 DWA().state_dict() is empty after two epochs, and CRMOGMWeighting cannot load into another."""

    def make() -> LossExecutor:
        return executor_of(crmogm() if rule == "crmogm" else rule)

    straight = train(make(), at_one(), range(16))
    executor = make()
    train(executor, at_one(), range(9))
    file = io.BytesIO()
    torch.save(executor.state_dict(), file)
    file.seek(0)
    torch.manual_seed(99)  # its draws are its own
    resumed = make()
    resumed.load_state_dict(torch.load(file, weights_only=True))
    assert train(resumed, at_one(), range(9, 16)) == straight[9:]
    assert len({str(weights) for weights in straight}) > 2 or rule == "torchjd:UW"  # no optimizer moves it here


def test_torchjd_itself_still_loses_its_state() -> None:
    """If this fails, TorchJD has mended it, and the adapter may be made simpler."""
    dwa = scalarization.DWA()
    for _ in range(2):
        dwa(torch.ones(2))
        dwa.step()
    assert not dwa.state_dict()
    smooth = aggregation.CRMOGMWeighting(aggregation.UPGradWeighting())
    smooth(torch.eye(2))
    with pytest.raises(RuntimeError, match="Unexpected key"):
        aggregation.CRMOGMWeighting(aggregation.UPGradWeighting()).load_state_dict(smooth.state_dict())


def test_smoothed_weights_are_torchjds() -> None:
    executor, smooth = executor_of(crmogm()), aggregation.CRMOGMWeighting(aggregation.UPGradWeighting(), alpha=0.8)
    for step in range(4):
        rows = torch.tensor(JACOBIAN, dtype=torch.float64) * torch.tensor([[1.0], [1.0 + step], [1.0]])
        found = one_step(executor, at_one(), rows.tolist()).weights
        assert list(found.values()) == pytest.approx(smooth(rows @ rows.T).tolist(), rel=1e-5)


@pytest.mark.parametrize("rule", [*STATEFUL, "crmogm", "torchjd:DWA"])
def test_a_rejected_step_leaves_no_trace(rule: str) -> None:
    executor, w = executor_of(crmogm() if rule == "crmogm" else rule), at_one()
    train(executor, w, range(7))
    before = copy.deepcopy(executor.weighting.state_dict())
    other = [[5 * x for x in row] for row in JACOBIAN]
    for _ in range(2):
        losses = linear(w, other)
        losses["t1"] = losses["t1"] + (w[0] * 0).sqrt()  # a finite loss without a finite gradient
        executor(losses, tap=at_one() * 0 + w).backward()
        assert not executor.step(torch.optim.SGD([w], lr=0.0)).applied
    assert str(executor.weighting.state_dict()) == str(before)


def test_another_methods_state_is_refused_and_changes_nothing() -> None:
    saved = executor_of("mgda").state_dict()
    executor = executor_of("upgrad")
    before = str(executor.state_dict())
    with pytest.raises(ValueError, match="its weighting are 'torchjd:MGDA', here 'torchjd:UPGrad'"):
        executor.load_state_dict(saved)
    assert str(executor.state_dict()) == before


def test_state_of_each_set_of_terms_is_kept_apart_and_bounded() -> None:
    """TorchJD's CR-MOGM raises where the number of terms changes, its GradVac forgets."""
    rule = torchjd_rule(7, "GradVac")
    executor, w = executor_of(rule, 7), at_one()
    rows = [[1.0, float(i), -float(i % 3)] for i in range(7)]
    assert isinstance(rule, TorchJD)
    for mask in range(1, 128):
        one_step(executor, w, [row if mask >> i & 1 else None for i, row in enumerate(rows)])
    assert len(rule.states) == 64
    state = str(rule.states["0,1,2,3,4,5,6"])
    one_step(executor, w, [*rows[:6], None])
    assert str(rule.states["0,1,2,3,4,5,6"]) == state


def test_the_global_generator_is_left_alone_and_the_seed_decides() -> None:
    rows = torch.randn(6, 3, generator=torch.Generator().manual_seed(2)).tolist()
    found = []
    for seed in (0, 0, 1):
        torch.manual_seed(5)
        executor = executor_of("pcgrad", 6, seed=seed)
        found.append([one_step(executor, at_one(), rows).weights for _ in range(3)])
        assert torch.rand(()).item() == torch.rand((), generator=torch.Generator().manual_seed(5)).item()
    assert found[0] == found[1] != found[2]
    assert found[0][0] != found[0][1]


def test_a_refresh_every_few_steps() -> None:
    executor = executor_of(torchjd_rule(3, "UPGrad", every=3))
    seen = train(executor, at_one(), range(7))
    assert [a != b for a, b in zip(seen, seen[1:], strict=False)] == [False, False, True, False, False, True]


# ---- degenerate input ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("short", SHORT)
@pytest.mark.parametrize(
    "steps",
    [
        [[[1.0, 0.0, 0.0]]],
        [[[0.0] * 3, [0.0] * 3]],
        [[[1.0, 0.0, 0.0], [0.0] * 3], [[1.0, 0.0, 0.0], [0.0, 2.0, 0.0]]],
        [[[1.0, 0.0, 0.0], None], [[1.0, 0.0, 0.0], [-1.0, 2.0, 0.0]], [None, [0.0, 1.0, 0.0]]],
        [[[1e10, 0.0, 0.0], [1e-10, 0.0, 0.0]], [[1e-10, 0.0, 0.0], [1e10, 0.0, 0.0]]],
        [[[1e-30, 0.0, 0.0], [1e-30, 1e-30, 0.0]]],
        [[[1.0, 1.0, 0.0], [-1.0, -1.0, 0.0]]],
        [[[1.0, 1.0, 0.0], [1.0, 1.0, 0.0]]],
        [[[1.0, i / 50, -i % 7] for i in range(50)]],
    ],
    ids=["one term", "no gradient", "one without", "missing", "1e±10", "tiny", "opposed", "the same", "K=50"],
)
def test_degenerate_gradients(short: str, steps: list) -> None:
    executor, w = executor_of(short, len(steps[0])), at_one()
    for rows in steps * 2:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*its weights hold.*|.*may be inaccurate.*")
            record = one_step(executor, w, rows)
        assert record.applied
        assert all(math.isfinite(weight) and weight >= 0 for weight in record.weights.values())
        assert max(record.weights.values()) <= 1e4


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_every_precision(dtype: torch.dtype) -> None:
    w = nn.Parameter(torch.ones(3, dtype=dtype))
    found = one_step(executor_of("upgrad"), w, JACOBIAN).weights
    exact = one_step(executor_of("upgrad"), at_one(), JACOBIAN).weights
    assert found == pytest.approx(exact, rel=1e-2)


@pytest.mark.parametrize("size", [1e-6, 1e6])
@pytest.mark.parametrize("short", ["upgrad", "dualproj", "cagrad", "mgda", "aligned_mtl", "imtl_g", "gradvac"])
def test_small_gradients_are_not_taken_for_none(short: str, size: float) -> None:
    """TorchJD's projector sets gradients with Σ‖g‖² < 1e−4 to 0, and UPGrad then resolves no conflict."""
    plain = one_step(executor_of(short), at_one(), JACOBIAN).weights
    sized = one_step(executor_of(short), at_one(), [[x * size for x in row] for row in JACOBIAN]).weights
    assert sized == pytest.approx(plain, rel=1e-4)


def test_imtl_gs_weights_are_bounded() -> None:
    """Kurin 2022: IMTL's unbounded coefficients overflowed in every reinforcement-learning run."""
    # G⁻¹d/Σ of rows (1, 0) and (3, .1) is (1.55, −.55)-like; along rows it has no bound.
    rows = [[1.0, 0.0, 0.0], [3.0, 1e-3, 0.0], [2.0, -1e-4, 1e-4]]
    gramian = torch.tensor(rows, dtype=torch.float64) @ torch.tensor(rows, dtype=torch.float64).T
    assert aggregation.IMTLGWeighting()(gramian).abs().max() > 1
    record = one_step(executor_of("imtl_g"), at_one(), rows)
    assert record.applied and 0 < max(record.weights.values()) <= 10
    assert bounded(torch.tensor([-1e9, 1e9]), 10.0).tolist() == [0.0, 10.0]


def test_nash_mtl_trains_without_a_word_of_its_solver() -> None:
    executor, w = executor_of("nash_mtl"), at_one()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for step in range(6):
            rows = [[x * 10.0 ** (i * (step % 3)) for x in row] for i, row in enumerate(JACOBIAN)]
            assert one_step(executor, w, rows).applied


def test_a_solver_that_fails_in_mid_run_is_told_once_and_the_weights_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    executor, w = executor_of("upgrad"), at_one()
    before = one_step(executor, w, JACOBIAN).weights

    def fail(*args):
        raise ValueError("Failed to solve the quadratic programming problem.")

    monkeypatch.setattr(aggregation.UPGradWeighting, "forward", fail)
    with pytest.warns(UserWarning, match="torchjd:UPGrad failed, its weights hold: Failed to solve"):
        assert one_step(executor, w, JACOBIAN[::-1]).weights == before
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert one_step(executor, w, JACOBIAN[::-1]).weights == before
    with pytest.raises(ValueError, match=r"^weighting 'torchjd:UPGrad' cannot weigh these terms: Failed to solve"):
        one_step(executor_of("upgrad"), w, JACOBIAN)


@pytest.mark.parametrize("name", SCALARIZERS)
def test_scalarizers_with_a_missing_term_and_with_losses_of_zero(name: str) -> None:
    executor, w = executor_of(f"torchjd:{name}"), nn.Parameter(torch.ones(3))
    for values in ([1.0, 2.0, 3.0], [1.0, None, 3.0], [0.0, 0.0, 0.0], [1e10, 1e-10, 1.0], [1.0, 2.0, 3.0]):
        losses = named([None if value is None else w.sum() * value for value in values])
        executor(losses).backward()
        record = executor.step(torch.optim.SGD([w, *executor.parameters()], lr=0.0))
        executor.end_epoch()
        assert record.applied and all(math.isfinite(x) and x >= 0 for x in record.weights.values())


def test_a_learned_scale_rests_while_its_term_is_absent() -> None:
    executor, w = executor_of("torchjd:UW"), at_one()
    executor(linear(w, [JACOBIAN[0], None, JACOBIAN[2]])).backward()
    (learned,) = executor.parameters()
    assert learned.grad is not None and learned.grad[1] == 0 and learned.grad[0] != 0


def test_a_scalarizer_that_refuses_the_first_losses_says_so() -> None:
    executor, w = executor_of("torchjd:GeometricMean"), at_one()
    with pytest.raises(ValueError, match=r"^weighting 'torchjd:GeometricMean' cannot weigh these losses: Geometric"):
        executor(named([-w.sum(), w.sum(), w.sum()]))
