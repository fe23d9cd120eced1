"""Weights of noise levels: the papers' values, tensors of any shape, buckets, and EDM2's learned uncertainty."""

from __future__ import annotations

import io
import math

import pytest
import torch
from torch import Tensor, nn

from adaptive_loss import Guards, LossExecutor
from adaptive_loss.weighting import weightings
from adaptive_loss.weighting.edm2_uncertainty import EDM2Uncertainty, NoiseLogVariance, edm2_loss
from adaptive_loss.weighting.min_snr import MinSNR
from adaptive_loss.weighting.noise_levels import debiased, edm, min_snr, p2

RULES = ("debiased", "edm", "edm2_uncertainty", "min_snr", "p2")
FUNCTIONS = {"min_snr": min_snr, "p2": p2, "debiased": debiased, "edm": edm}


def live(value: float) -> Tensor:
    return torch.tensor(value, requires_grad=True)


# ---- the functions --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prediction", "expected"),
    [
        ("epsilon", [1.0, 1.0, 1.0, 0.25]),
        ("x0", [0.0, 0.5, 5.0, 5.0]),
        ("v", [0.0, 0.5 / 1.5, 5.0 / 6.0, 5.0 / 21.0]),
    ],
)
def test_min_snr_by_hand(prediction, expected):
    # Hang et al. 2023, γ = 5, at SNR 0, ½, 5 and 20.
    assert min_snr(torch.tensor([0.0, 0.5, 5.0, 20.0]), 5.0, prediction).tolist() == pytest.approx(expected)


def test_min_snr_of_one_error_is_the_same_for_every_prediction():
    # One error e of x₀ is an error e·√SNR of ε and e·√(SNR + 1)/… of v: ‖ε‖² = SNR‖x₀‖², ‖v‖² = (SNR + 1)‖x₀‖².
    snr = torch.tensor([0.01, 0.7, 5.0, 300.0], dtype=torch.float64)
    x0 = min_snr(snr, prediction="x0")
    assert torch.allclose(min_snr(snr, prediction="epsilon") * snr, x0)
    assert torch.allclose(min_snr(snr, prediction="v") * (snr + 1), x0)


@pytest.mark.parametrize("weigh", [p2, debiased])
def test_p2_and_debiased_weigh_one_error_the_same_for_every_prediction(weigh):
    snr = torch.tensor([0.01, 0.7, 5.0, 300.0], dtype=torch.float64)
    x0 = weigh(snr, prediction="x0")
    assert torch.allclose(weigh(snr) * snr, x0)
    assert torch.allclose(weigh(snr, prediction="v") * (snr + 1), x0)


def test_p2_debiased_and_edm_by_hand():
    snr = torch.tensor([0.0, 0.25, 3.0, 99.0])
    # Choi et al. 2022: 1/(k + SNR)^γ.
    assert p2(snr).tolist() == pytest.approx([1.0, 0.8, 0.25, 0.01])
    assert p2(snr, k=1.0, gamma=0.5).tolist() == pytest.approx([1.0, math.sqrt(0.8), 0.5, 0.1])
    # Yu et al. 2023: 1/√SNR.
    assert debiased(torch.tensor([0.25, 4.0, 100.0])).tolist() == pytest.approx([2.0, 0.5, 0.1])
    # Karras et al. 2022, table 1: (σ² + σd²)/(σ·σd)²; σ_min = 0.002 and σ_max = 80 are the sampler's ends.
    sigma = torch.tensor([0.002, 0.3, 80.0], dtype=torch.float64)
    assert edm(sigma).tolist() == pytest.approx([((s**2 + 0.25) / (s * 0.5) ** 2) for s in (0.002, 0.3, 80.0)])
    assert edm(torch.tensor(0.3), sigma_data=2.0).item() == pytest.approx((0.09 + 4) / 0.36)


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("shape", [(), (1,), (8, 1, 1, 1), (2, 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_functions_keep_shape_and_type_and_stay_finite(name, shape, dtype):
    for level in (1e-10, 1.0, 1e10):
        weights = FUNCTIONS[name](torch.full(shape, level, dtype=dtype))
        assert weights.shape == shape and weights.dtype == dtype
        assert torch.isfinite(weights).all() and (weights >= 0).all()


@pytest.mark.parametrize("name", ["min_snr", "p2", "debiased"])
def test_pure_noise_and_no_noise_have_a_finite_weight(name):
    assert torch.isfinite(FUNCTIONS[name](torch.tensor([0.0, math.inf]))).all()


def test_a_denoiser_that_knows_nothing_but_the_data_starts_every_level_at_one():
    # EDM's λ is made for it: D = c_skip·x has the error σ²σd²/(σ² + σd²), the inverse of λ.
    sigma = torch.logspace(-2, 2, 9, dtype=torch.float64)
    assert torch.allclose(edm(sigma) * sigma**2 * 0.25 / (sigma**2 + 0.25), torch.ones(9, dtype=torch.float64))


# ---- the rules ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("n_terms", [1, 3, 1000])
def test_every_rule_weighs_its_levels(name, n_terms):
    levels = torch.logspace(-3, 3, n_terms, dtype=torch.float64)
    names = [f"bucket {i}" for i in range(n_terms)]
    rule = weightings.get(name)(n_terms, levels=levels)
    executor = LossExecutor(dict.fromkeys(names, 2.0), weighting=rule, guards=Guards(share_cap=None))
    p = nn.Parameter(torch.tensor(1.0))
    executor(dict.fromkeys(names, p * 0.5)).backward()
    expected = 2 * FUNCTIONS.get(name, edm)(levels)
    assert list(executor.weights.values()) == pytest.approx(expected.tolist(), rel=1e-12)
    assert math.isfinite(p.grad.item())


@pytest.mark.parametrize("name", RULES)
def test_without_levels_one_clear_line(name):
    executor = LossExecutor({"a": 1.0, "b": 1.0}, weighting=name)
    with pytest.raises(ValueError, match=rf"^weighting '{name}' needs noise levels: make it with levels=\[...\], one"):
        executor({"a": live(1.0), "b": live(1.0)})


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("levels", [[1.0], [1.0, -1.0], [1.0, math.nan], [1.0, math.inf], [[1.0, 2.0]]])
def test_levels_that_cannot_be(name, levels):
    with pytest.raises(ValueError, match="give 2 finite numbers"):
        weightings.get(name)(2, levels=levels)


def test_zero_is_an_snr_but_no_standard_deviation():
    assert MinSNR(2, levels=[0.0, 1.0]).levels.tolist() == [0.0, 1.0]
    with pytest.raises(ValueError, match="above 0"):
        weightings.get("edm")(2, levels=[0.0, 1.0])


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("min_snr", {"gamma": 0.0}),
        ("min_snr", {"prediction": "noise"}),
        ("p2", {"k": 0.0}),
        ("p2", {"gamma": -1.0}),
        ("p2", {"prediction": "noise"}),
        ("debiased", {"prediction": "noise"}),
        ("debiased", {"floor": 0.0}),
        ("edm", {"sigma_data": 0.0}),
        ("edm2_uncertainty", {"channels": 0}),
    ],
)
def test_settings_that_cannot_be(name, wrong):
    with pytest.raises(ValueError, match=r"give|choose"):
        weightings.get(name)(1, levels=[1.0], **wrong)


def test_an_absent_bucket_is_no_trouble():
    executor = LossExecutor({"a": 1.0, "b": 1.0}, weighting=MinSNR(2, levels=[1.0, 10.0]))
    assert executor({"b": live(3.0)}).item() == pytest.approx(1.5)


# ---- EDM2 -----------------------------------------------------------------------------------------------------------


def test_edm2_in_closed_form():
    # Karras et al. 2024, eq. 21: (λ/e^u)·L + u, so ∂/∂u = 1 − λL/e^u; away from u = 0.
    rule = EDM2Uncertainty(2, levels=[0.3, 2.0], channels=16)
    with torch.no_grad():
        rule.u.weight.copy_(torch.linspace(-1, 1, 16))
    u = rule.u(torch.tensor([0.3, 2.0])).tolist()
    weights = [((s**2 + 0.25) / (0.5 * s) ** 2) * math.exp(-v) for s, v in zip((0.3, 2.0), u, strict=True)]
    executor = LossExecutor({"a": 1.0, "b": 3.0}, weighting=rule)
    total = executor({"a": live(0.7), "b": live(0.2)})
    assert min(abs(v) for v in u) > 0.01
    assert total.item() == pytest.approx(weights[0] * 0.7 + 3 * weights[1] * 0.2 + sum(u), rel=1e-5)
    assert executor.weights == pytest.approx({"a": weights[0], "b": 3 * weights[1]}, rel=1e-5)


def test_edm2_features_by_hand():
    # √2·cos(ω·ln(σ)/4 + φ), as in NVlabs/edm2 MPFourier on c_noise; Σ wⱼfⱼ/√C as in its MPConv.
    u = NoiseLogVariance(channels=2)
    with torch.no_grad():
        u.weight.copy_(torch.tensor([0.5, -2.0]))
    level = math.log(3.0) / 4
    angles = [f * level + p for f, p in zip(u.frequencies.tolist(), u.phases.tolist(), strict=True)]
    expected = (0.5 * math.cos(angles[0]) - 2.0 * math.cos(angles[1])) * math.sqrt(2) / math.sqrt(2)
    assert u(torch.tensor(3.0)).item() == pytest.approx(expected, rel=1e-4)
    assert u(torch.ones(4, 1, 1, 1)).shape == (4, 1, 1, 1)


def test_edm2_finds_the_weighted_losses():
    # At the optimum e^u = λL at every level, so every weighted loss is 1.
    levels, losses = [0.05, 0.5, 5.0], [0.002, 0.1, 0.4]
    rule = EDM2Uncertainty(3, levels=levels)
    names = ["low", "middle", "high"]
    executor = LossExecutor(dict.fromkeys(names, 1.0), weighting=rule, guards=Guards(share_cap=None))
    optimizer = torch.optim.Adam(executor.parameters(), lr=0.03)
    for _ in range(150):
        optimizer.zero_grad()
        executor({n: live(loss) for n, loss in zip(names, losses, strict=True)}).backward()
        executor.step(optimizer)
    weighted = [w * loss for w, loss in zip(executor.weights.values(), losses, strict=True)]
    assert weighted == pytest.approx([1.0, 1.0, 1.0], rel=0.02)


def test_edm2_leaves_an_absent_level_without_penalty():
    rule = EDM2Uncertainty(2, levels=[0.3, 2.0], channels=4)
    with torch.no_grad():
        rule.u.weight.fill_(1.0)
    executor = LossExecutor({"a": 1.0, "b": 1.0}, weighting=rule)
    both = executor({"a": live(0.7), "b": live(0.2)}).item()
    alone = executor({"a": live(0.7)}).item()
    assert alone == pytest.approx(both - executor.weights["b"] * 0.2 - rule.u(torch.tensor(2.0)).item(), rel=1e-5)


def test_edm2_per_sample_is_the_rule_with_one_level_a_sample():
    levels, errors = torch.tensor([0.1, 0.9, 7.0]), torch.tensor([0.5, 0.2, 0.9])
    rule = EDM2Uncertainty(3, levels=levels)
    with torch.no_grad():
        rule.u.weight.normal_(generator=torch.Generator().manual_seed(0))
    executor = LossExecutor(dict.fromkeys("abc", 1.0), weighting=rule, guards=Guards(share_cap=None))
    total = executor({n: live(e) for n, e in zip("abc", errors.tolist(), strict=True)})
    assert edm2_loss(errors, levels, rule.u(levels)).sum().item() == pytest.approx(total.item(), rel=1e-5)


def test_edm2_draws_from_its_own_dice():
    torch.manual_seed(3)
    before = torch.get_rng_state()
    one, other = NoiseLogVariance(seed=1), NoiseLogVariance(seed=1)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(one.frequencies, other.frequencies)
    assert not torch.equal(one.phases, NoiseLogVariance(seed=2).phases)


@pytest.mark.parametrize("name", RULES)
def test_a_loaded_executor_continues_bit_for_bit(name):
    def fresh():
        p = nn.Parameter(torch.tensor([1.0, 2.0]))
        executor = LossExecutor({"a": 1.0, "b": 2.0}, weighting=weightings.get(name)(2, levels=[0.4, 3.0]))
        return p, executor, torch.optim.Adam([p, *executor.parameters()], lr=0.01)

    def go(p: nn.Parameter, executor: LossExecutor, optimizer: torch.optim.Optimizer, steps: int) -> None:
        for _ in range(steps):
            optimizer.zero_grad()
            executor({"a": (p[0] - 3) ** 2, "b": (p[0] * p[1]) ** 2}).backward()
            executor.step(optimizer)

    whole = fresh()
    go(*whole, 12)
    first, second = fresh(), fresh()
    go(*first, 5)
    file = io.BytesIO()
    torch.save([first[0].detach(), first[1].state_dict(), first[2].state_dict()], file)
    file.seek(0)
    parameters, state, optimizer = torch.load(file, weights_only=True)
    with torch.no_grad():
        second[0].copy_(parameters)
    second[1].load_state_dict(state)
    second[2].load_state_dict(optimizer)
    go(*second, 7)
    assert torch.equal(second[0], whole[0]) and second[1].weights == whole[1].weights
