"""What a weighting rule is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from adaptive_loss.events import Event
from adaptive_loss.gradients import TermGradients
from adaptive_loss.losses import Terms
from adaptive_loss.parallel import Group, is_split
from adaptive_loss.signals import Signals

NEEDS = {
    "gradients": "call executor(losses, tap=features), or make the rule with at=parameters",
    "base": "say which term is the base: LossExecutor(..., base=name)",
    "targets": "say what to hold: LossExecutor(..., targets={name: value}), or --targets name=value on a command line",
    "epochs": "call executor.end_epoch() after every epoch; without it nothing it waits for comes",
}
"""What a rule may need of its user, and how to give it. Without gradients, base or targets it cannot go on."""
PATIENCE = 1000
"""Steps without an ``end_epoch()`` after which a rule that needs them is said to wait in vain."""


LEAST = 1e-6
"""Part of its start weight at or below which a term counts as waiting: no evidence about it can be had."""


@dataclass(frozen=True)
class Context:
    """What a rule or modulator may look at besides the losses.

    Args:
        step: accepted optimizer steps so far.
        present: [K] bool, the terms that are there this step and on at all.
        signals: the shared running statistics.
        weights: [K] the weights applied last, in the user's units: in ``forward`` those of the step before.
        start: [K] the start weights.
        looked: whether this step brought a new look-ahead.
        objective: gives the probe's value on fresh held-out data; None without a probe.
        gradients: of startᵢ·Lᵢ at the tap, taken when asked for; None without a tap, and outside ``forward``.
        first: whether this is the first batch of its optimizer step, and not one more under gradient accumulation.
        group: the ranks that train together, of which losses, signals and objective are means; None for one process.
        rescale: tells the optimizer's memory by which factor the whole gradient has grown; None where none is known.
    """

    step: int
    present: Tensor
    signals: Signals
    weights: Tensor
    start: Tensor
    looked: bool = False
    objective: Callable[[], float] | None = None
    gradients: TermGradients | None = None
    first: bool = True
    group: Group = None
    rescale: Callable[[float], None] | None = None

    @property
    def on(self) -> Tensor:
        """[K] bool, the terms that are there and have a weight to speak of: not off, not waiting at 0."""
        has_weight = self.weights.numpy() > LEAST * self.start.numpy()
        return torch.from_numpy(self.present.numpy() & has_weight)


class Weighting(nn.Module, ABC):
    """A rule that gives K terms their weights.

    A rule sees startᵢ·Lᵢ, so start weights mean what the user thinks under every rule, and its weights multiply the
    start weights. Buffers are allocated in ``__init__`` and never None, so that ``state_dict`` carries all state.
    ``forward`` reads state and changes none: a step may yet be rejected. ``after_step`` writes it, draws included.

    Class attributes say what the catalogue shows: ``family`` (where the rule's evidence comes from), ``needs`` (keys of
    :data:`NEEDS`, or in words what its constructor wants), ``jumps`` (weights may leap from one step to the next by
    design, so no rate limit holds them) and ``holds_targets`` (it is itself the law of the terms with a target).

    Args:
        n_terms: K.
    """

    family: str = "loss values"
    needs: tuple[str, ...] = ()
    jumps: bool = False
    holds_targets: bool = False

    def __init__(self, n_terms: int) -> None:
        super().__init__()
        self.n_terms = n_terms
        self.at: Sequence[Tensor] | None = None

    @property
    def name(self) -> str:
        """The rule's name, which is its file's."""
        return type(self).__module__.rpartition(".")[2]

    def bind(self, terms: Terms, seed: int) -> None:
        """Meet the terms; called once by the executor. A rule that draws seeds its own generator here.

        Raises:
            ValueError: it belongs to an executor already; two would overwrite each other's state.
        """
        if hasattr(self, "terms"):
            raise ValueError(f"this weighting {self.name!r} belongs to another executor: make one for each")
        self.terms = terms

    def unmet(self, context: Context) -> str | None:
        """The need this step cannot meet, with the fix, or None."""
        gradients = context.gradients
        if "gradients" in self.needs and gradients is not None and any(is_split(tensor) for tensor in gradients.at):
            return (
                f"weighting {self.name!r} cannot take gradients at parameters that fully_shard has split: "
                "give features or the output as tap"
            )
        met = {
            "gradients": gradients is not None,
            "base": self.terms.base is not None,
            "targets": bool(self.terms.targets),
        }
        need = next((need for need in self.needs if not met.get(need, True)), None)
        return None if need is None else f"weighting {self.name!r} needs {need}: {NEEDS[need]}"

    def __mul__(self, other: Weighting) -> Weighting:
        """The rule whose weights are the product of both: see :class:`~adaptive_loss.weighting.compose.Product`."""
        from adaptive_loss.weighting.compose import Product

        return Product(self, other) if isinstance(other, Weighting) else NotImplemented

    @abstractmethod
    def forward(self, losses: Tensor, context: Context) -> Tensor:
        """The weights, [K] float64, detached unless the rule learns them.

        Args:
            losses: [K] float64 values of startᵢ·Lᵢ, NaN where a term is absent or off.
            context: what else there is to see.
        """

    def let_through(self, weights: Tensor, context: Context) -> Tensor:
        """What the rule lets through of the [K] weights that it, alone or in a product, has given; detached."""
        return weights

    def saturated(self) -> Tensor | None:
        """[K] bool, the weights that stand at a bound of the rule's own; None where it has none, or sees to it."""
        return None

    def unreached(self) -> Mapping[str, str]:
        """The terms that no weight of the rule brings to their target, each with the reason in one line."""
        return {}

    def penalty(self, context: Context) -> Tensor | None:
        """What the rule adds to the total (½Σs for uncertainty weighting), or None."""
        return None

    def after_step(self, losses: Tensor, context: Context) -> Sequence[Event] | None:
        """Called once an accepted optimizer step, with the same losses (their means over accumulated batches).

        Returns:
            What it has to report, if anything.
        """

    def end_epoch(self, metrics: Mapping[str, float]) -> None:
        """Called at the end of an epoch, where the user says so; what it decides is reported after the next step."""


def ones(n_terms: int) -> Tensor:
    """[K] weights of 1."""
    return torch.ones(n_terms, dtype=torch.float64)
