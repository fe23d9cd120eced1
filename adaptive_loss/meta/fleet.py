"""Many small training runs as one: their parameters are stacked, and a step of all is a step of one batched model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import torch
from torch import Tensor
from torch.func import functional_call, stack_module_state, vmap

from adaptive_loss.meta.families import families
from adaptive_loss.meta.families.base import Family, Tensors
from adaptive_loss.meta.stacked_optimizer import StackedOptimizer
from adaptive_loss.seeding import own_generator

STEPS = 150
FALL, LEAST_RATE = 0.3, 0.01
"""The last part of a run, in which its learning rate falls in a straight line, and to what part of itself."""
RIVAL = "rival."
LOST = 30.0
"""log J of a run that was lost, and the most that any run's may be."""


class Fleet:
    """N training runs of one family, each with its own data, initialisation, order, learning rate and weights.

    What a run draws comes from generators of its own, and no operation mixes rows, so that a run's course does not
    depend on its neighbours. Rows beyond the seeds given are copies to fork into (see :meth:`copy`): row i trains run
    i mod len(seeds), on the same batches.

    Args:
        family: a draw of what the runs share.
        seeds: one a run.
        steps: length of the runs; every step's batch is drawn in advance.
        copies: rows a run.

    Attributes:
        start: [rows, K] start weights, float64.
        rate: [rows] learning rates, as they are until the last steps.
        norms: [rows] length of each row's last gradient.
        done: steps made.

    Example:
        >>> fleet = Fleet(draw_family("multitask", 0), seeds=[1, 2, 3], steps=20)
        >>> fleet.step(fleet.start).shape  # runs × terms
        torch.Size([3, 4])
    """

    def __init__(self, family: Family, seeds: Sequence[int], steps: int = STEPS, copies: int = 1) -> None:
        self.family, self.steps, self.done = family, steps, 0
        rows = list(range(len(seeds))) * copies
        dice = [own_generator(seed, f"{family.name} data") for seed in seeds]
        self.data = _stack([family.data(d) for d in dice], rows)
        self.start = torch.tensor([list(family.start(d).values()) for d in dice], dtype=torch.float64)[rows]
        self.rate = torch.tensor([family.learning_rate(d) for d in dice])[rows]
        # By time first, so that one step's draws lie side by side.
        draws = [family.draws(steps, own_generator(seed, f"{family.name} draws")) for seed in seeds]
        looks = [family.looks(steps + 1, own_generator(seed, f"{family.name} looks")) for seed in seeds]
        self.draws, self.looks = _stack(draws, rows, dim=1), _stack(looks, rows, dim=1)
        runs = [_initialised(family, seed) for seed in seeds]
        self._run = runs[0]
        stacked = {name: value.detach()[rows] for name, value in stack_module_state(runs)[0].items()}  # type: ignore[arg-type]
        self.parameters = {name: value.requires_grad_() for name, value in stacked.items()}
        own = [value for name, value in self.parameters.items() if not name.startswith(RIVAL)]
        rival = [value for name, value in self.parameters.items() if name.startswith(RIVAL)]
        self.optimizer = StackedOptimizer(own, self.rate, family.optimizer)
        self.norms = torch.zeros(len(rows))
        self.rival = StackedOptimizer(rival, self.rate, family.optimizer) if family.has_rival else None

    def __len__(self) -> int:
        return len(self.rate)

    def losses(self) -> Tensor:
        """[rows, K] the terms of this step on its batch, with their graph."""
        return self._call("losses", self.data, self._at(self.draws))

    def objective(self) -> Tensor:
        """[rows] the objective now, on this step's draw of held-out data, with its graph."""
        return self._call("objective", self.data, self._at(self.looks))

    def judged(self) -> Tensor:
        """[rows] the final numbers, infinite where a run was lost."""
        lost = self.optimizer.lost if self.rival is None else self.optimizer.lost | self.rival.lost
        with torch.no_grad():
            return self._call("judged", self.data).masked_fill(lost, torch.inf)

    def log_judged(self) -> Tensor:
        """[rows] float64, log J of the final numbers, at most 30."""
        return self.judged().double().clamp_min(1e-30).log().nan_to_num(LOST, LOST).clamp(max=LOST)

    def step(self, weights: Tensor, losses: Tensor | None = None) -> Tensor:
        """Train one step under ``weights``, [rows, K]; the losses' values, [rows, K] float64.

        Args:
            weights: of this step.
            losses: what :meth:`losses` gave for this step, where it was asked already.
        """
        live = self.losses() if losses is None else losses
        level = rate_level(self.done, self.steps)
        gradients = torch.autograd.grad((weights.to(live) * live).sum(), self.optimizer.parameters)
        if self.rival is not None:
            loss = self._call("rival_loss", self.data, self._at(self.draws)).sum()
            rival_gradients = torch.autograd.grad(loss, self.rival.parameters)
            self.rival.step(rival_gradients, level)
        self.norms = torch.stack([g.flatten(1).square().sum(1) for g in gradients]).sum(0).sqrt()
        self.optimizer.step(gradients, level)
        self.done += 1
        return live.detach().double()

    def finish(self, weights: Tensor) -> None:
        """Train to the end under ``weights``, [rows, K], held."""
        while self.done < self.steps:
            self.step(weights)

    def products(self, losses: Tensor) -> tuple[Tensor, Tensor]:
        """Gramians ⟨gᵢ, Pgⱼ⟩ of the terms' gradients and, last, the objective's, in the optimizer's metric.

        Args:
            losses: what :meth:`losses` gave; its graph is kept.

        Returns:
            [rows, K+1, K+1] float64, and the objective's values [rows].
        """
        objective = self.objective()
        wanted = [*losses.sum(0), objective.sum()]
        gradients = [
            torch.autograd.grad(one, self.optimizer.parameters, retain_graph=True, allow_unused=True) for one in wanted
        ]
        total = torch.zeros(len(self), len(wanted), len(wanted), dtype=torch.float64)
        for parts, scale in zip(zip(*gradients, strict=True), self.optimizer.metric(), strict=True):
            rows = torch.stack([torch.zeros_like(scale) if part is None else part for part in parts], dim=1).flatten(2)
            total += ((rows * scale.flatten(1)[:, None]) @ rows.mT).double()
        return total, objective.detach().double()

    def copy(self, source: Tensor, target: Tensor) -> None:
        """Make the rows ``target`` what the rows ``source`` are, optimizer's memory included; both are indices."""
        with torch.no_grad():
            for value in self.parameters.values():
                value[target] = value[source]
        for optimizer in (self.optimizer, self.rival):
            if optimizer is not None:
                optimizer.copy(source, target)

    def _call(self, what: str, *inputs: Tensors) -> Tensor:
        return vmap(partial(_called, self._run, what))(self.parameters, *inputs)

    def _at(self, drawn: Tensors) -> dict[str, Tensor]:
        return {name: value[self.done] for name, value in drawn.items()}


def rate_level(done: int, steps: int) -> float:
    """The part of its learning rate that a run has after ``done`` of its steps.

    Example:
        >>> [round(rate_level(done, 101), 3) for done in (0, 70, 85, 100)]
        [1.0, 1.0, 0.505, 0.01]
    """
    left = (steps - 1 - done) / (FALL * max(steps - 1, 1))
    return min(1.0, LEAST_RATE + (1 - LEAST_RATE) * left)


def draw_family(name: str, seed: int) -> Family:
    """The family ``name`` with the architecture, sizes and optimizer that ``seed`` draws.

    Example:
        >>> draw_family("vae", 3).terms
        ('reconstruction', 'kl')
    """
    return families.get(name)(own_generator(seed, f"{name} family"))


def trained_families() -> list[str]:
    """The names of the families that policies are trained on."""
    return [name for name in families.names() if not families.get(name).is_held_apart]


def _called(run: torch.nn.Module, what: str, parameters: Mapping[str, Tensor], *inputs: Tensors) -> Tensor:
    return functional_call(run, dict(parameters), (what, *inputs))


def _initialised(family: Family, seed: int) -> torch.nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(own_generator(seed, f"{family.name} model").initial_seed())
        return family.run()


def _stack(parts: Sequence[Mapping[str, Tensor]], rows: Sequence[int], dim: int = 0) -> dict[str, Tensor]:
    """One tensor a name with the runs along ``dim``, those of ``rows``."""
    stacked = {name: torch.stack([part[name] for part in parts], dim=dim) for name in parts[0]}
    if len(rows) == len(parts):
        return stacked
    return {name: value.index_select(dim, torch.tensor(rows)) for name, value in stacked.items()}
