"""The feature networks that come with the package: whole, frozen, two a dataset, and made again by their command."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from adaptive_loss.data.digits import load as load_digits
from adaptive_loss.errors import RunError, UsageError
from adaptive_loss.metrics import features
from adaptive_loss.metrics.features import DESIGNS, RECIPES, WEIGHTS, has_features, load_features
from adaptive_loss.models.feature_cnn import FeatureCNN

SHAPES = {"digits": (1, 8, 8), "fashion_mnist": (1, 28, 28)}
CASES = [(dataset, role) for dataset in RECIPES for role in DESIGNS]


@pytest.mark.parametrize(("dataset", "role"), CASES)
def test_shipped_networks_are_small_frozen_and_differentiable(dataset: str, role: features.Role) -> None:
    assert has_features(dataset)
    assert (WEIGHTS / f"{dataset}_{role}.safetensors").stat().st_size < 1_000_000
    network = load_features(dataset, role)
    images = torch.rand(3, *SHAPES[dataset], requires_grad=True)
    found = network.features(images)
    assert found.shape == (3, RECIPES[dataset].features) and torch.isfinite(found).all()
    found.square().sum().backward()
    assert images.grad is not None and images.grad.abs().sum() > 0
    assert not network.training and not any(p.requires_grad for p in network.parameters())


@pytest.mark.parametrize(("dataset", "role"), CASES)
def test_cards_say_what_a_network_is(dataset: str, role: features.Role) -> None:
    card = json.loads((WEIGHTS / f"{dataset}_{role}.json").read_text(encoding="utf-8"))
    assert card["role"] == role and card["seed"] == 0 and "not comparable" in card["what"]
    assert card["made_by"] == f"{features.PROG} --dataset {dataset} --seed 0"
    assert 0.85 < card["test_accuracy"] <= 1
    assert len(card["sha256"]) == 64 and len(card["data"]["sha256"]) == 64


def test_accuracy_on_the_card_is_the_network_s() -> None:
    card = json.loads((WEIGHTS / "digits_judge.json").read_text(encoding="utf-8"))
    network = load_features("digits", "judge")
    assert features.accuracy(network, load_digits(seed=0).test) == pytest.approx(card["test_accuracy"], abs=0.003)


def test_features_are_standardised_over_the_training_images() -> None:
    network = load_features("digits", "probe")
    found = network.features(features.pixels(load_digits(seed=0).held_in.images))
    torch.testing.assert_close(found.mean(0), torch.zeros(32), atol=1e-3, rtol=0)
    torch.testing.assert_close(found.std(0), torch.ones(32), atol=1e-3, rtol=0)


@pytest.mark.parametrize(("dataset", "role"), CASES)
def test_no_feature_is_dead(dataset: str, role: features.Role) -> None:
    # A plain ReLU left 25 of 64 of a judge that never fired: such a one is left as it is, by a deviation of exactly 1.
    network = load_features(dataset, role)
    assert not (network.feature_std == 1).any()
    images = torch.rand(200, *SHAPES[dataset], generator=torch.Generator().manual_seed(0))
    assert float(network.features(images).std(0).min()) > 1e-3


@pytest.mark.parametrize("role", DESIGNS)
def test_every_feature_of_the_digits_moves_over_the_images(role: features.Role) -> None:
    found = load_features("digits", role).features(features.pixels(load_digits(seed=0).held_in.images))
    torch.testing.assert_close(found.std(0), torch.ones(32), atol=1e-3, rtol=0)


def test_probe_and_judge_see_different_things() -> None:
    images = torch.rand(40, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    one, other = (load_features("digits", role).features(images) for role in DESIGNS)
    assert DESIGNS["probe"] != DESIGNS["judge"]
    assert not torch.allclose(torch.cdist(one, one), torch.cdist(other, other), atol=0.5)


def test_a_dead_feature_is_not_blown_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(features, "DEAD", 1e9)  # take all for dead
    network = features.train(load_digits(subset=200), "judge", replace(RECIPES["digits"], epochs=1), 0)
    assert torch.equal(network.feature_std, torch.ones(32))


def test_the_command_makes_the_same_files_from_the_same_seed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(RECIPES, "digits", replace(RECIPES["digits"], subset=200, epochs=1))
    before = torch.get_num_threads()
    for folder, seed in (("a", "1"), ("b", "1"), ("c", "2")):
        assert features.main(["--dataset", "digits", "--seed", seed, "--output", str(tmp_path / folder)]) == 0
    torch.set_num_threads(before)
    assert "digits judge: test accuracy" in capsys.readouterr().out
    made = [sorted((file.name, file.read_bytes()) for file in (tmp_path / part).iterdir()) for part in "abc"]
    assert made[0] == made[1] and len(made[0]) == 4
    assert dict(made[0])["digits_probe.safetensors"] != dict(made[2])["digits_probe.safetensors"]
    card = json.loads((tmp_path / "a" / "digits_judge.json").read_text(encoding="utf-8"))
    loaded = load_features("digits", "judge", tmp_path / "a")
    assert features.accuracy(loaded, load_digits(seed=1).test) == card["test_accuracy"]


def test_what_is_missing_or_damaged_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UsageError, match="no 'judge' features for 'cifar10'; choose a dataset from: digits, fash"):
        load_features("cifar10", "judge")
    assert features.main(["--dataset", "cifar10"]) == 2
    assert "choose from: digits, fashion_mnist" in capsys.readouterr().err
    for file in WEIGHTS.glob("digits_judge.*"):
        shutil.copy(file, tmp_path)
    weights = tmp_path / "digits_judge.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x55")
    with pytest.raises(RunError, match="is damaged"):
        load_features("digits", "judge", tmp_path)
    weights.unlink()
    with pytest.raises(RunError, match="cannot read"):
        load_features("digits", "judge", tmp_path)


def test_images_too_small_to_halve() -> None:
    with pytest.raises(ValueError, match="2 halvings need images of 4 pixels, not 3×8"):
        FeatureCNN((1, 3, 8))
