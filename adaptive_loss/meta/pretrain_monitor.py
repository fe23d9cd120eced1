"""``adaptive-loss pretrain monitor``: a Deep Q-network for nudging weights, trained across many small runs.

The first round's runs keep (half of them), follow the look-ahead or act at random (a quarter each); later rounds are
played by the networks themselves, exploring, beside random runs. Rewards come from paired forks
(:class:`~adaptive_loss.meta.episodes.Episodes`), unless ``--no-forks`` says otherwise. After every round the networks
play validation runs greedily, and what they won over never nudging is a point of the learning curve. The stop rule,
written down before any run: after ``--patience`` rounds in a row without a new best of that curve the rest is not worth
its time. The last round's networks are written with ρ = 0; ``adaptive-loss evidence`` alone may raise it. The
controller below is that of the output folder where it has one, else the package's. The same seed gives the same files;
every round is kept, and the same command goes on from it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from adaptive_loss.checkpoint import FORMAT, load_file, save_file
from adaptive_loss.errors import UsageError
from adaptive_loss.meta.pretrain_flags import PretrainFlags
from adaptive_loss.meta.problems import (
    HELD_OUT_SEEDS,
    VALIDATION_SEEDS,
    Problem,
    command_of,
    draw_problems,
    summarised,
)
from adaptive_loss.meta.rollouts import TRAINED, Rollout, greedy_agent, law_beside, rollout
from adaptive_loss.policy_files import read_policy, write_policy
from adaptive_loss.records import json_dump, write_atomic
from adaptive_loss.rl.replay import Replay
from adaptive_loss.seeding import own_generator
from adaptive_loss.utils.commands import command, parse
from adaptive_loss.utils.config import core_count

PROG = "adaptive-loss pretrain monitor"
FIRST = ("keep", "keep", "look_ahead", "random")
LATER = ("exploring", "exploring", "exploring", "random")
MOST_UNITS = 10.0
"""Greatest reward either way that is learned from, in its family's unit."""


@dataclass(frozen=True, kw_only=True)
class Flags(PretrainFlags):
    """The flags of the monitor's pre-training."""

    rounds: int = 12
    """Rounds of playing and learning."""
    runs: int = 16
    """Runs of each family a round."""
    updates: int = 400
    """Learning updates a round."""
    validation: int = 16
    """Runs of each family on which every round is validated."""
    patience: int = 4
    """The stop rule: rounds in a row without a new best on them."""
    forks: bool = True
    """Pay actions by paired forks; without, by the objective's own fall, to see what forks are worth."""
    output_dir: Path = Path("results/monitor_policy")
    """Where monitor.safetensors, monitor.json, curve.json and state.pt go: a folder that --policy takes."""


@dataclass
class Training:
    """What a round leaves to the next: networks with their optimizer, a replay a family, the curve."""

    seed: int
    names: list[str]
    curve: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.agent = greedy_agent({}, seed=own_generator(self.seed, "pretrain monitor").initial_seed())
        self.replays: dict[str, Replay] = {}
        self.units: dict[str, float] = {}

    @property
    def network(self) -> dict[str, Tensor]:
        """The networks' parameters."""
        return {name: value.detach().clone() for name, value in self.agent.online.state_dict().items()}

    def take_in(self, family: str, found: Rollout) -> None:
        """Store a problem's episodes, one after the other, rewards in the family's unit.

        That is the median size of the first round's rewards that are not 0: families whose losses move much would drown
        the others. No decision depends on it, as it is one for all actions of a family.
        """
        _, runs, size = found.observations.shape
        unit = self.units.setdefault(family, _usual_size(found.rewards))
        rewards = (found.rewards / unit).clamp(-MOST_UNITS, MOST_UNITS)
        replay = self.replays.setdefault(family, self._replay(family, size, found.masks.shape[2]))
        last = len(found.actions) - 1
        for n in range(runs):
            for t in range(last + 1):
                seen, then = found.observations[t, n], found.observations[t + 1, n]
                reward = float(rewards[t, n])
                replay.add(seen, int(found.actions[t, n]), reward, then, found.masks[t + 1, n], t == last, False)

    def _replay(self, family: str, size: int, n_actions: int) -> Replay:
        config = TRAINED.dqn
        return Replay(
            20_000, size, n_actions, own_generator(self.seed, f"replay {family}"), config.n_step, config.gamma
        )

    def learn(self, updates: int) -> float:
        """Make updates from the families' replays in turn; the mean loss."""
        replays = [self.replays[name] for name in self.names]
        return sum(self.agent.learn_from(replays[i % len(replays)]) for i in range(updates)) / max(updates, 1)

    def state_dict(self) -> dict[str, Any]:
        """Everything a later round depends on."""
        replays = {name: replay.state_dict() for name, replay in self.replays.items()}
        return {"agent": self.agent.state_dict(), "replays": replays, "units": self.units, "curve": self.curve}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from :meth:`state_dict`."""
        self.agent.load_state_dict(state["agent"])
        for name, saved in state["replays"].items():
            sizes = (saved["columns"][column].shape[1] for column in ("obs", "next_mask"))
            self.replays[name] = self._replay(name, *sizes)
            self.replays[name].load_state_dict(saved)
        self.units, self.curve = state["units"], state["curve"]


def _usual_size(rewards: Tensor) -> float:
    """The median of those that are not 0; 1 where all are."""
    sizes = rewards[rewards != 0].abs()
    return float(sizes.median()) if len(sizes) else 1.0


def play(problems: Sequence[Problem], behaviours: tuple[str, ...], training: Training, flags: Flags) -> list[Rollout]:
    """All problems, on all cores."""
    from joblib import Parallel, delayed

    network, law = training.network, law_beside(flags.output_dir)
    workers = Parallel(n_jobs=flags.jobs or core_count())
    calls = (delayed(rollout)(problem, behaviours, network, law, flags.steps, flags.forks) for problem in problems)
    return list(workers(calls))  # pyright: ignore[reportArgumentType, reportReturnType]


def one_round(training: Training, flags: Flags) -> None:
    """Play, learn, validate; a point of the curve."""
    done = len(training.curve)
    first_seed = (flags.seed * flags.rounds + done) * flags.runs
    problems = draw_problems(training.names, flags.runs, first_seed)
    for problem, found in zip(problems, play(problems, LATER if done else FIRST, training, flags), strict=True):
        training.take_in(problem.family, found)
    loss = training.learn(flags.updates)
    training.curve.append({"round": done + 1, "loss": loss, **validate(training, flags)})


def validate(training: Training, flags: Flags) -> dict[str, Any]:
    """What the networks win on runs that nothing learns from, in log J, and how often they act at all."""
    problems = draw_problems(training.names, flags.validation, VALIDATION_SEEDS)
    played = play(problems, ("greedy",), training, flags)
    gains = {problem.family: found.gains.tolist() for problem, found in zip(problems, played, strict=True)}
    acts = [float((found.actions != 0).double().mean()) for found in played]
    return {"gain": summarised(gains), "acts": sum(acts) / len(acts)}


def has_stalled(curve: Sequence[dict[str, Any]], patience: int) -> bool:
    """The stop rule: the best of the last ``patience`` rounds is no better than the best before them.

    Example:
        >>> has_stalled([{"gain": {"all": {"mean": mean}}} for mean in (0.1, 0.3, 0.2, 0.3)], patience=2)
        True
    """
    means = [point["gain"]["all"]["mean"] for point in curve]
    return len(means) > patience and max(means[-patience:]) <= max(means[:-patience])


def run(flags: Flags) -> int:
    """All rounds that are not done yet, then the policy; the exit code."""
    _check(flags)
    training = Training(flags.seed, flags.names)
    state = flags.output_dir / "state.pt"
    if state.exists():
        _go_on(training, state, flags)
    while len(training.curve) < flags.rounds and not has_stalled(training.curve, flags.patience):
        one_round(training, flags)
        settings = _settings(flags)
        save_file(state, {"format": FORMAT, "settings": settings, "training": training.state_dict()})
        write_atomic(flags.output_dir / "curve.json", json_dump({"settings": settings, "rounds": training.curve}))
        print(_told(training.curve[-1], flags.rounds), flush=True)
    if _is_written(training, flags):
        print(f"{flags.output_dir / 'monitor.json'} holds these networks already, with what evidence there is")
        return 0
    _write(training, flags)
    print(f"written: {flags.output_dir / 'monitor.json'}, with rho 0 until adaptive-loss evidence says otherwise")
    return 0


def _is_written(training: Training, flags: Flags) -> bool:
    """Whether the policy holds these networks already: its card may have earned a ρ since."""
    try:
        _, tensors = read_policy(flags.output_dir, "monitor")
    except ValueError:
        return False
    network = training.network
    return network.keys() == tensors.keys() and all(torch.equal(tensors[name], network[name]) for name in network)


def _told(point: dict[str, Any], rounds: int) -> str:
    gain = point["gain"]["all"]
    low, high = gain["interval95"] or (math.nan, math.nan)
    won = f"wins {gain['mean']:+.4f} [{low:+.4f}, {high:+.4f}] in log J"
    return f"round {point['round']}/{rounds}: loss {point['loss']:.4f}, {won}, acts in {point['acts']:.0%} of decisions"


def _write(training: Training, flags: Flags) -> None:
    stalled = has_stalled(training.curve, flags.patience)
    card = {
        "rho": 0.0,
        "families": training.names,
        "seeds": [flags.seed],
        "made_by": command_of(PROG, {n: v for n, v in _settings(flags).items() if n != "law"}),
        "settings": _settings(flags),
        "stopped": f"the stop rule, after {len(training.curve)} rounds" if stalled else "all rounds",
        "learning_curve": training.curve,
        "evidence": "none yet: rho stays 0 until `adaptive-loss evidence` finds a gain on runs that it never saw",
    }
    write_policy(flags.output_dir, "monitor", training.network, card)


def _go_on(training: Training, state: Path, flags: Flags) -> None:
    saved = load_file(state)
    if saved.get("settings") != _settings(flags):
        raise UsageError(f"{state} is of a training with other settings; choose another --output-dir")
    training.load_state_dict(saved["training"])


def _settings(flags: Flags) -> dict[str, Any]:
    return {**flags.settings(), "law": json.loads(json_dump(asdict(law_beside(flags.output_dir))))}


def _check(flags: Flags) -> None:
    least = {"rounds": 1, "runs": 1, "updates": 0, "validation": 2, "patience": 1, "steps": 40}
    flags.check(least, seeds=VALIDATION_SEEDS // max(flags.rounds * flags.runs, 1))
    if flags.validation > HELD_OUT_SEEDS - VALIDATION_SEEDS:
        raise UsageError(f"--validation is {flags.validation}; give at most {HELD_OUT_SEEDS - VALIDATION_SEEDS}")


@command
def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    flags = parse(Flags, argv, PROG, "Train the monitor's networks across many small runs.")
    return run(flags)
