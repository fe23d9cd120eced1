"""Gramian, preconditioner and look-ahead against explicit flattened vectors."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from adaptive_loss.gradients import (
    TermGradients,
    gramian,
    leaves,
    length_ratio,
    look_ahead,
    preconditioner,
    slopes,
    term_gradients,
    total_norm,
)


def random_products(seed: int, terms: int = 4, dimension: int = 7) -> tuple[Tensor, Tensor]:
    """V [terms + 1, dimension] and its Gramian under a random diagonal metric, absorbed into V."""
    dice = torch.Generator().manual_seed(seed)
    vectors = torch.randn(terms + 1, dimension, generator=dice, dtype=torch.float64)
    return vectors, vectors @ vectors.T


def ones(terms: int) -> Tensor:
    return torch.ones(terms, dtype=torch.float64)


@given(st.integers(0, 10_000), st.integers(1, 6), st.integers(-10, 10))
@settings(max_examples=60, deadline=None)
def test_scaling_all_weights_changes_nothing(seed: int, terms: int, power: int) -> None:
    _, products = random_products(seed, terms)
    weights = ones(terms)
    for base in (None, 0):
        one, other = look_ahead(products, weights, base, 1.0), look_ahead(products, 10.0**power * weights, base, 1.0)
        for name in ("gain", "cos_base", "cos_probe", "share"):
            torch.testing.assert_close(getattr(one, name), getattr(other, name), rtol=1e-9, atol=1e-12)


@given(st.integers(0, 10_000), st.integers(1, 6))
@settings(max_examples=60, deadline=None)
def test_gains_weighted_by_length_sum_to_zero_and_stay_within_one(seed: int, terms: int) -> None:
    _, products = random_products(seed, terms)
    found = look_ahead(products, ones(terms), None, 0.0)
    lengths = products.diagonal()[:-1].sqrt()
    assert abs(float(lengths @ found.gain)) < 1e-9 * float(lengths.sum())
    # v_i less its projection on G is no longer than v_i, so Cauchy and Schwarz bound h.
    assert float(found.gain.abs().max()) <= 1 + 1e-9
    assert float(found.cos_probe.abs().max()) <= 1 + 1e-9
    assert float(found.share.sum()) == pytest.approx(1)


@given(st.integers(0, 10_000), st.integers(2, 6))
@settings(max_examples=60, deadline=None)
def test_slopes_are_those_of_the_cosine_with_the_probe_at_any_weights(seed: int, terms: int) -> None:
    vectors, products = random_products(seed, terms)
    log_weights = torch.randn(terms, generator=torch.Generator().manual_seed(seed + 1), dtype=torch.float64)
    log_weights.requires_grad_()
    whole = log_weights.exp() @ vectors[:-1]
    cosine = whole @ vectors[-1] / (whole.norm() * vectors[-1].norm())
    (wanted,) = torch.autograd.grad(cosine, log_weights)
    weights = log_weights.detach().exp()
    lengths = weights * vectors[:-1].norm(dim=1)
    found = slopes(torch.stack([products, products]), weights)
    torch.testing.assert_close(found * lengths / whole.detach().norm(), torch.stack([wanted, wanted]))


def test_slopes_leave_out_what_is_absent() -> None:
    _, products = random_products(4, terms=3)
    holed = products.clone()
    holed[1], holed[:, 1] = math.nan, math.nan
    rest = torch.tensor([0, 2, 3])
    found = slopes(holed[None], torch.tensor([1.0, 7.0, 2.0], dtype=torch.float64))[0]
    kept = slopes(products[rest[:, None], rest][None], torch.tensor([1.0, 2.0], dtype=torch.float64))[0]
    assert math.isnan(float(found[1]))
    torch.testing.assert_close(found[[0, 2]], kept)


@given(st.integers(0, 10_000), st.integers(1, 6))
@settings(max_examples=30, deadline=None)
def test_the_length_ratio_is_that_of_the_whole_gradients(seed: int, terms: int) -> None:
    vectors, products = random_products(seed, terms)
    dice = torch.Generator().manual_seed(seed)
    before, after = (torch.rand(terms, generator=dice, dtype=torch.float64) + 0.1 for _ in range(2))
    wanted = float((after @ vectors[:-1]).norm() / (before @ vectors[:-1]).norm())
    assert length_ratio(products, before, after) == pytest.approx(wanted)
    assert length_ratio(torch.zeros_like(products), before, after) == 1.0


def test_one_term_alone_has_nothing_to_gain() -> None:
    _, products = random_products(1, terms=1)
    assert abs(float(look_ahead(products, ones(1), 0, 0.0).gain)) < 1e-12


def test_golden_look_ahead() -> None:
    # By hand: v0 = (3, 0), v1 = (0, 4), g_p = (1, 1); G = (3, 4), |G|² = 25, <g_p, G> = 7.
    # h0 = (3 − 9/25·7)/(√2·3) = 0.48/(3√2), h1 = (4 − 16/25·7)/(√2·4) = −0.48/(4√2).
    vectors = torch.tensor([[3.0, 0.0], [0.0, 4.0], [1.0, 1.0]], dtype=torch.float64)
    found = look_ahead(vectors @ vectors.T, ones(2), None, 5.0)
    root = math.sqrt(2)
    assert found.gain.tolist() == pytest.approx([0.48 / (3 * root), -0.48 / (4 * root)])
    assert found.cos_probe.tolist() == pytest.approx([1 / root, 1 / root])
    assert found.cos_base.tolist() == pytest.approx([0.6, 0.8])  # with G = (3, 4) where there is no base
    assert found.share.tolist() == pytest.approx([3 / 7, 4 / 7])
    assert found.objective == 5.0
    assert look_ahead(vectors @ vectors.T, ones(2), 0, 5.0).cos_base.tolist() == pytest.approx([1.0, 0.0])


@pytest.mark.parametrize(
    "vectors",
    [
        [[0.0, 0.0], [0.0, 0.0], [1.0, 0.0]],
        [[1.0, 0.0], [-1.0, 0.0], [1.0, 0.0]],
        [[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]],
        [[0.0, 0.0], [0.0, 1.0], [0.0, 1.0]],
    ],
    ids=["no gradient", "gradients cancel", "no probe gradient", "one without gradient"],
)
def test_degenerate_gradients_give_finite_bounded_signals(vectors: list[list[float]]) -> None:
    rows = torch.tensor(vectors, dtype=torch.float64)
    for base in (None, 0):
        found = look_ahead(rows @ rows.T, ones(2), base, 0.0)
        for values in (found.gain, found.cos_base, found.cos_probe, found.share):
            assert torch.isfinite(values).all() and float(values.abs().max()) <= 1 + 1e-12


@pytest.mark.parametrize("size", [1e-30, 1e-22, 1e-10, 1e10, 1e22, 1e30])
def test_gramian_neither_underflows_nor_overflows(size: float) -> None:
    dice = torch.Generator().manual_seed(3)
    rows = torch.randn(3, 5, generator=dice)
    plain = gramian([[row] for row in rows], [1.0])
    sized = gramian([[rows[0] * size], [rows[1]], [rows[2]]], [1.0])
    factor = torch.tensor([size, 1.0, 1.0], dtype=torch.float64)
    torch.testing.assert_close(sized, plain * factor * factor[:, None], rtol=1e-5, atol=0)


def test_gramian_is_symmetric_counts_missing_parts_as_zero_and_applies_the_metric() -> None:
    a, b = torch.tensor([1.0, 2.0]), torch.tensor([[3.0]])
    gradients = [[a, None], [2 * a, b], [None, None]]
    found = gramian(gradients, [torch.tensor([1.0, 0.5]), 2.0])
    # By hand: <a, a>_P = 1 + 4/2 = 3; b·b·2 = 18.
    assert found.tolist() == [[3.0, 6.0, 0.0], [6.0, 12.0 + 18.0, 0.0], [0.0, 0.0, 0.0]]
    assert found.dtype == torch.float64


def test_gramian_reports_what_is_not_finite() -> None:
    found = gramian([[torch.tensor([1.0, math.nan])], [torch.tensor([1.0, 1.0])]], [1.0])
    assert not torch.isfinite(found).all()
    assert not torch.isfinite(gramian([[torch.tensor([math.inf])]], [1.0])).all()


def stepped(
    kind: type[torch.optim.Optimizer], steps: int = 3, **options: float
) -> tuple[torch.optim.Optimizer, nn.Parameter]:
    w = nn.Parameter(torch.tensor([1.0, -2.0, 0.5]))
    optimizer = kind([w], lr=0.1, **options)  # type: ignore[call-arg]
    for i in range(steps):
        w.grad = torch.tensor([1.0, 0.5, -3.0]) * (i + 1)
        optimizer.step()
    return optimizer, w


def test_adam_preconditioner_by_hand() -> None:
    optimizer, w = stepped(torch.optim.Adam, betas=(0.9, 0.99), eps=1e-6)
    second = torch.zeros(3, dtype=torch.float64)
    for i in range(3):
        second = 0.99 * second + 0.01 * (torch.tensor([1.0, 0.5, -3.0], dtype=torch.float64) * (i + 1)) ** 2
    wanted = 1 / ((second / (1 - 0.99**3)).sqrt() + 1e-6)
    (found,) = preconditioner(optimizer, [w])
    torch.testing.assert_close(torch.as_tensor(found).double(), wanted, rtol=1e-5, atol=0)


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.NAdam, torch.optim.RAdam])
def test_the_adam_family_is_bias_corrected(kind: type[torch.optim.Optimizer]) -> None:
    optimizer, w = stepped(kind, steps=1)
    (found,) = preconditioner(optimizer, [w])
    torch.testing.assert_close(torch.as_tensor(found), 1 / torch.tensor([1.0, 0.5, 3.0]), rtol=1e-4, atol=0)


def test_other_second_moments_and_none() -> None:
    squares = torch.tensor([1.0, 0.25, 9.0])
    (rms,) = preconditioner(*listed(*stepped(torch.optim.RMSprop, steps=1, alpha=0.9)))
    torch.testing.assert_close(torch.as_tensor(rms), 1 / (0.1 * squares).sqrt(), rtol=1e-4, atol=0)
    (adagrad,) = preconditioner(*listed(*stepped(torch.optim.Adagrad, steps=1)))
    torch.testing.assert_close(torch.as_tensor(adagrad), 1 / squares.sqrt(), rtol=1e-4, atol=0)
    assert preconditioner(*listed(*stepped(torch.optim.SGD, momentum=0.9))) == [1.0]
    assert preconditioner(None, [nn.Parameter(torch.zeros(1))] * 2) == [1.0, 1.0]


def listed(optimizer: torch.optim.Optimizer, w: nn.Parameter) -> tuple[torch.optim.Optimizer, list[nn.Parameter]]:
    return optimizer, [w]


def test_a_parameter_the_optimizer_has_not_moved_counts_as_one() -> None:
    optimizer, w = stepped(torch.optim.Adam)
    assert preconditioner(optimizer, [nn.Parameter(torch.zeros(1)), w])[0] == 1.0


def test_term_gradients_keep_the_graph_and_write_no_grad() -> None:
    w, v = nn.Parameter(torch.tensor(2.0)), nn.Parameter(torch.tensor(3.0))
    losses = [w**2, w * v]
    found = term_gradients(losses, [w, v])
    assert [None if g is None else float(g) for g in found[0]] == [4.0, None]
    assert [float(g) for g in found[1] if g is not None] == [3.0, 2.0]
    assert w.grad is None and v.grad is None
    sum(losses[1:], losses[0]).backward()
    assert w.grad is not None and float(w.grad) == 7.0


def test_leaves_finds_every_parameter_once() -> None:
    w, v, constant = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2)), torch.ones(2)
    assert {id(leaf) for leaf in leaves((w * v + w * constant).sum())} == {id(w), id(v)}
    assert len(leaves((w * w + w).sum())) == 1
    assert leaves(torch.zeros(())) == []
    deep = w
    for _ in range(20_000):  # deeper than Python's recursion limit
        deep = deep + 1
    assert leaves(deep.sum()) == [w] or leaves(deep.sum())[0] is w


def test_total_norm() -> None:
    assert total_norm([]) == 0.0
    assert total_norm([torch.tensor([3.0]), torch.tensor([[4.0]])]) == pytest.approx(5.0)
    assert math.isnan(total_norm([torch.tensor([math.nan])]))


def test_a_scalar_parameter_counts_like_any_other() -> None:
    """Found by a benchmark: a 0-dim parameter's gradients could not be laid out as rows."""
    a, b = torch.tensor(2.0), torch.tensor(3.0)
    products = gramian([[a], [b]], [1.0])
    assert products.tolist() == [[4.0, 6.0], [6.0, 9.0]]


def test_a_gramian_over_parameters_of_several_precisions() -> None:
    kinds = (torch.float16, torch.float32, torch.float64)
    rows = [[torch.tensor([a, 2.0 * a], dtype=kind) for kind in kinds] for a in (1.0, -3.0)]
    assert gramian(rows, [1.0, 1.0, 2.0]).tolist() == [[20.0, -60.0], [-60.0, 180.0]]


def test_norms_and_cosines_are_taken_once() -> None:
    w = torch.tensor([3.0, 4.0], requires_grad=True)
    found = TermGradients([(w**2).sum() / 2, w.sum()], torch.ones(2), [w])
    assert found.norms is found.norms and found.cosines is found.cosines and found.gramian is found.gramian
