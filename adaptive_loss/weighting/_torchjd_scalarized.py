"""TorchJD's scalarizers as rules."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from adaptive_loss.losses import Terms
from adaptive_loss.weighting._torchjd_objects import (
    State,
    fresh_copy,
    key_of,
    make,
    own_dice,
    read_state,
    with_state,
    write_state,
)
from adaptive_loss.weighting.base import Context, Weighting, ones


class Scalarized(Weighting):
    """A scalarizer f of TorchJD's as weights wᵢ = ∂f/∂(startᵢ·Lᵢ), at the values of the terms that are there.

    The gradient applied is then that of f itself. Where the scalarizer learns parameters, its value less Σ wᵢ·startᵢLᵢ
    is the penalty, so that the total is f and they learn from it.

    Reference: each method's own is in TorchJD's documentation.

    Choose it when you want TorchJD's version of a rule from loss values alone. Metrics it logs: the weights.
    Deviations: derivatives below 0 count as 0; where one is not finite, or the scalarizer refuses the losses, the
    weights hold. State is kept for each set of present terms. Draws come from the executor's seed.

    Args:
        n_terms: K.
        made: an object of TorchJD's to use, instead of making one.
        options: the method's own.

    Raises:
        UsageError: the method wants other options.

    Example:
        >>> import torch
        >>> from adaptive_loss import LossExecutor
        >>> executor = LossExecutor({"a": 1.0, "b": 1.0}, weighting="torchjd:GeometricMean")
        >>> a, b = torch.tensor(1.0, requires_grad=True), torch.tensor(4.0, requires_grad=True)
        >>> total = executor({"a": a, "b": b})
        >>> executor.weights  # ∂√(ab)/∂a = √(b/a)/2
        {'a': 1.0, 'b': 0.25}
    """

    jumps = True
    method = ""
    kind: type[nn.Module]
    held: Tensor
    draws: Tensor

    def __init__(self, n_terms: int, *, made: nn.Module | None = None, **options: Any) -> None:
        super().__init__(n_terms)
        self.scalarizer = make(self.method, self.kind, n_terms, options) if made is None else made
        self.learns = any(True for _ in self.scalarizer.parameters())
        self.states: dict[str, State] = {}
        self.register_buffer("held", ones(n_terms))
        self.register_buffer("draws", torch.tensor(0))
        self._penalty: Tensor | None = None

    @property
    def name(self) -> str:
        """What ``weighting=`` takes."""
        return f"torchjd:{self.method}"

    def bind(self, terms: Terms, seed: int) -> None:
        """Meet the terms and the seed."""
        super().bind(terms, seed)
        self._seed = seed

    def forward(self, losses: Tensor, context: Context) -> Tensor:
        """[K] weights, differentiable where the scalarizer learns."""
        weights, self._penalty, _ = self._scalarize(losses)
        return weights

    def penalty(self, context: Context) -> Tensor | None:
        """What is left of the scalarizer's value, where it learns."""
        return self._penalty

    def after_step(self, losses: Tensor, context: Context) -> None:
        """Let the scalarizer see the step's losses."""
        weights, _, state = self._scalarize(losses)
        self.held, self._penalty = weights.detach(), None
        self.states = with_state(self.states, _present(losses), state)
        self.draws = self.draws + 1

    def end_epoch(self, metrics: Mapping[str, float]) -> None:
        """Tell a scalarizer that counts epochs."""
        if hasattr(self.scalarizer, "step"):
            self.states = {key: self._stepped(key, state) for key, state in self.states.items()}

    def _stepped(self, key: str, state: State) -> State:
        rows = [int(row) for row in key.split(",")]
        fresh, used = self._restored(rows, {}), self._restored(rows, state)
        used.step()  # type: ignore[operator]
        return read_state(fresh, used)

    def _restored(self, rows: list[int], state: State) -> nn.Module:
        made = fresh_copy(self.scalarizer, rows, self.n_terms)
        write_state(made, state)
        return made

    def _scalarize(self, losses: Tensor) -> tuple[Tensor, Tensor | None, State]:
        """[K] weights, the penalty where it learns, and the scalarizer's state after it saw the losses."""
        rows = _present(losses)
        if not rows:
            return self.held, None, {}
        fresh, used = self._restored(rows, {}), self._restored(rows, self.states.get(key_of(rows), {}))
        values = losses[rows].detach().clone().requires_grad_()
        own = {name: p[rows] if p.shape == (self.n_terms,) else p for name, p in self.scalarizer.named_parameters()}
        try:
            with torch.enable_grad(), own_dice(self._seed, int(self.draws)):
                total = torch.func.functional_call(used, own, (values,))
                (slopes,) = torch.autograd.grad(total, values, create_graph=self.learns)
        except ValueError as error:
            if int(self.draws) == 0:
                raise ValueError(f"weighting {self.name!r} cannot weigh these losses: {error}") from error
            return self.held, None, self.states.get(key_of(rows), {})
        if not torch.isfinite(slopes).all():
            return self.held, None, read_state(fresh, used)
        slopes = slopes.clamp_min(0)
        weights = self.held.index_put((torch.tensor(rows),), slopes)
        return weights, total - (slopes * values.detach()).sum() if self.learns else None, read_state(fresh, used)

    def get_extra_state(self) -> dict[str, State]:
        """TorchJD's state, by set of present terms."""
        return self.states

    def set_extra_state(self, state: dict[str, State]) -> None:
        """Continue from :meth:`get_extra_state`."""
        self.states = dict(state)


def _present(losses: Tensor) -> list[int]:
    return (~torch.isnan(losses)).nonzero().flatten().tolist()
