"""Weighing losses as a Gymnasium environment: its checker, other people's learners, and the monitor's own path."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import adaptive_loss
from adaptive_loss.errors import UsageError
from adaptive_loss.meta.env import LossWeighting
from adaptive_loss.meta.families import families

gymnasium = pytest.importorskip("gymnasium")


def make(**given: object) -> LossWeighting:
    return gymnasium.make("adaptive_loss/LossWeighting-v0", **{"family": "vae", "steps": 50, **given}).unwrapped


@pytest.mark.parametrize("family", ["vae", "diffusion"])
def test_it_passes_gymnasiums_checker(family: str) -> None:
    from gymnasium.utils.env_checker import check_env

    check_env(make(family=family), skip_render_check=True)


@pytest.mark.parametrize("order", ["import adaptive_loss, gymnasium", "import gymnasium, adaptive_loss"])
def test_gymnasium_knows_it_once_the_package_is_imported(order: str) -> None:
    asked = "print(gymnasium.spec('adaptive_loss/LossWeighting-v0').id)"
    code = f"{order}, sys; {asked}; assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100)
    assert done.stdout.strip() == "adaptive_loss/LossWeighting-v0", done.stderr


@pytest.mark.parametrize(
    "hidden", ["sys.modules['gymnasium'] = None", "sys.path_importer_cache.clear(); sys.path[:] = here"]
)
def test_without_gymnasium_the_package_is_as_it_was(hidden: str) -> None:
    here = (
        f"here = [p for p in sys.path if 'site-packages' not in p] + [{str(Path(adaptive_loss.__file__).parents[1])!r}]"
    )
    code = (
        f"import sys\n{here}\n{hidden}\nimport adaptive_loss\ntry: import gymnasium\nexcept ImportError: print('none')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100)
    assert done.stdout.strip() == "none", done.stderr


@pytest.mark.parametrize("family", families.names())
def test_an_episode_is_a_run_from_reset_to_end(family: str) -> None:
    env = make(family=family, steps=40)
    observation, info = env.reset(seed=3)
    assert env.observation_space.contains(observation) and info["action_mask"][0] == 1
    over, decisions = False, 0
    while not over:
        observation, reward, over, truncated, info = env.step(0)
        decisions += 1
        assert env.observation_space.contains(observation) and not truncated and abs(reward) < 1e-3
    assert decisions == 3


def test_the_same_seed_is_the_same_run_and_another_another() -> None:
    def first(seed: int) -> tuple[np.ndarray, float]:
        env = make()
        observation, _ = env.reset(seed=seed)
        return observation, env.step(3)[1]

    one, again, other = first(1), first(1), first(2)
    assert np.array_equal(one[0], again[0]) and one[1] == again[1] != 0
    assert not np.array_equal(one[0], other[0])


def test_a_masked_action_counts_as_keep_and_is_told() -> None:
    env = make()
    env.reset(seed=1)
    assert env.action_masks().tolist() == [1, 0, 0, 1]  # nothing to reset yet; and look-aheads are against it
    *_, info = env.step(1)
    assert info["was_masked"]
    _, reward, *_, info = env.step(3)
    assert not info["was_masked"] and reward != 0
    assert info["action_mask"].tolist() == [1, 1, 0, 0]  # the term that was moved rests


def test_what_cannot_be_is_told_in_one_line() -> None:
    with pytest.raises(UsageError, match="unknown family 'vea'"):
        LossWeighting("vea")
    with pytest.raises(UsageError, match="steps is 10: give at least 20"):
        LossWeighting("vae", steps=10)
    env = make(steps=20)
    env.reset(seed=1)
    with pytest.raises(UsageError, match="action -1 is none: give 0 to 3"):
        env.step(-1)
    env.step(0)
    with pytest.raises(UsageError, match="this run has ended"):
        env.step(0)
    with pytest.raises(UsageError, match=r"call reset\(\) first"):
        LossWeighting("vae").step(0)


def test_stable_baselines3_trains_on_it_unchanged() -> None:
    sb3 = pytest.importorskip("stable_baselines3")
    env = make(steps=40)
    agent = sb3.DQN("MlpPolicy", env, learning_starts=2, train_freq=1, batch_size=4, seed=0)
    before = [value.clone() for value in agent.policy.parameters()]
    agent.learn(9)
    assert agent.num_timesteps == 9
    assert any(not torch.equal(old, new) for old, new in zip(before, agent.policy.parameters(), strict=True))
