"""TorchJD's rules behind our interface: ``weighting="torchjd:UPGrad"``, or a short name such as ``"upgrad"``."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from adaptive_loss.errors import UsageError
from adaptive_loss.losses import Terms
from adaptive_loss.weighting._torchjd_objects import (
    INSTALL,
    State,
    fresh_copy,
    key_of,
    make,
    own_dice,
    read_state,
    with_state,
    write_state,
)
from adaptive_loss.weighting._torchjd_scalarized import Scalarized
from adaptive_loss.weighting.base import Context, Weighting
from adaptive_loss.weighting.gradient_rule import GradientRule

_UNSUITED = {
    "FAMO": "takes the losses again after every step: use weighting='famo'",
    "MoDo": "needs gradients on two independent batches",
    "SDMGrad": "needs gradients on two independent batches",
    "ExcessMTL": "needs whole gradients, not their Gramian",
    "ConFIG": "gives a direction, not weights",
    "GradDrop": "gives a direction, not weights",
    "TrimmedMean": "gives a direction, not weights",
}
_SCALE_FREE = {"UPGrad", "DualProj", "CAGrad", "AlignedMTL", "MGDA", "IMTLG", "PCGrad", "GradVac"}
"""Rules that a common factor of all gradients leaves alone, but for constants in TorchJD such as 1e−4."""
_LIMIT, _LIMITS = 1e4, {"IMTLG": 10.0}
"""Bound of a weight; IMTL-G's add up to 1, but with either sign, so they have no bound of their own."""


@functools.cache
def rule_class(method: str) -> type[TorchJD] | type[Scalarized]:
    """The rule that holds TorchJD's ``method``, by its name there without "Weighting".

    Raises:
        UsageError: TorchJD is not installed, has no such method, or one that cannot serve as weights.
    """
    kind = _find(method)
    from torchjd.scalarization import Scalarizer

    parent = Scalarized if issubclass(kind, Scalarizer) else TorchJD
    needs = ("epochs",) if hasattr(kind, "step") else ("gradients", "base") if method == "PCD" else parent.needs
    body = {"method": method, "kind": kind, "needs": needs, "__doc__": _doc(method, kind, parent)}
    return cast("type[TorchJD] | type[Scalarized]", type(method, (parent,), {**body, "__module__": __name__}))


def torchjd_rule(n_terms: int, method: str | nn.Module, **options: Any) -> TorchJD | Scalarized:
    """A rule of TorchJD's with options, or around an object of TorchJD's that is made already.

    Args:
        n_terms: K.
        method: TorchJD's name for it, or one of its weightings, aggregators with a Gramian, or scalarizers.
        options: of the method, and ``at``, ``every`` and ``limit`` of :class:`TorchJD`.

    Example:
        >>> torchjd_rule(2, "CAGrad", c=0.4, every=4).name
        'torchjd:CAGrad'
    """
    if isinstance(method, str):
        return rule_class(method)(n_terms, **options)
    made = getattr(method, "gramian_weighting", method)
    kind = rule_class(type(made).__name__.removesuffix("Weighting"))
    if not isinstance(made, kind.kind):
        raise UsageError(f"a {type(made).__module__}.{type(made).__name__} cannot be used: give a {kind.kind.__name__}")
    return kind(n_terms, made=made, **options)


def bounded(weights: Tensor, limit: float) -> Tensor:
    """Weights below 0 as 0, then all scaled down together until none is above ``limit``. [m] → [m].

    Example:
        >>> bounded(torch.tensor([-1.0, 2.0, 40.0]), 10.0)
        tensor([ 0.0000,  0.5000, 10.0000])
    """
    weights = weights.clamp_min(0)
    return weights * (limit / weights.detach().max().clamp_min(limit))


def square_root(gramian: Tensor) -> Tensor:
    """R with R·Rᵀ = G: K rows that have the Gramian G, for a rule that wants a Jacobian. [m, m] → [m, m]."""
    values, vectors = torch.linalg.eigh(gramian)
    return vectors * values.clamp_min(0).sqrt()


def alone(gramian: Tensor, greatest: float) -> Tensor:
    """Nash-MTL's weight of a single term: 1, but ‖αg‖ at most ``greatest`` where that is not 0. [1, 1] → [1]."""
    norms = gramian.diagonal().sqrt()
    return (greatest / norms).clamp_max(1) if greatest > 0 else torch.ones_like(norms)


class TorchJD(GradientRule):
    """A rule of TorchJD's that turns the Gramian G of the terms' gradients into weights.

    G = [⟨gᵢ, gⱼ⟩] is of the terms that are there and have a gradient at the tap, gᵢ that of startᵢ·Lᵢ. The weights are
    what the rule gives, at least 0, scaled down together where one is above ``limit``.

    Reference: Quinton & Rey, "Jacobian Descent for Multi-Objective Optimization", 2024; each method's own is in
    TorchJD's documentation.

    Choose it when terms conflict, so that lowering one raises another. Metrics it logs: the weights. Deviations: a
    weight below 0 (IMTL-G, Aligned-MTL) counts as 0. A term whose gradient is 0 is left out like an absent one, and
    keeps its weight: MGDA would stop there for good, Nash-MTL and FairGrad have no solution. Where a common factor
    should not matter the gradients are brought to a mean square of 1, as TorchJD takes ones with Σ‖gᵢ‖² < 1e−4 for
    none. State is kept for each set of present terms. PCD's primary objective is the base. Draws come from the
    executor's seed. Where the solver fails in mid-run the weights hold, and a warning says so once.

    Args:
        n_terms: K.
        at, every: as for :class:`~adaptive_loss.weighting.gradient_rule.GradientRule`.
        limit: greatest weight; None for 1e4 (10 for IMTL-G).
        made: an object of TorchJD's to use, instead of making one.
        options: the method's own.

    Raises:
        UsageError: the method's own packages are not installed, or it wants other options.
        ValueError: the first Gramian cannot be weighed.

    Example:
        >>> import torch
        >>> from adaptive_loss import LossExecutor
        >>> w = torch.nn.Parameter(torch.tensor([1.0, 1.0]))
        >>> executor = LossExecutor({"a": 1.0, "b": 1.0}, weighting="torchjd:MGDA")
        >>> executor({"a": 4 * w[0], "b": w[1]}, tap=w).backward()
        >>> {name: round(weight, 3) for name, weight in executor.weights.items()}  # the shortest mix of the two
        {'a': 0.059, 'b': 0.941}
    """

    jumps = True
    method = ""
    kind: type[nn.Module]
    draws: Tensor

    def __init__(
        self,
        n_terms: int,
        *,
        at: Tensor | Sequence[Tensor] | None = None,
        every: int = 1,
        limit: float | None = None,
        made: nn.Module | None = None,
        **options: Any,
    ) -> None:
        super().__init__(n_terms, at=at, every=every)
        template = make(self.method, self.kind, n_terms, options) if made is None else made
        # No submodule: TorchJD's buffers are None until they are used, which no fresh object can load.
        self._bargains = self.method == "NashMTL"
        self._template: tuple[Any] = (template.weighting if self._bargains else template,)
        parts = {type(part).__name__.removesuffix("Weighting") for part in template.modules()}
        self.limit = min(_LIMITS.get(part, _LIMIT) for part in parts) if limit is None else limit
        self._scale_free = bool(parts & _SCALE_FREE)
        self.states: dict[str, State] = {}
        self.register_buffer("draws", torch.tensor(0))
        self._warned = False

    @property
    def name(self) -> str:
        """What ``weighting=`` takes."""
        return f"torchjd:{self.method}"

    def bind(self, terms: Terms, seed: int) -> None:
        """Meet the terms and the seed."""
        super().bind(terms, seed)
        self._seed = seed

    def saturated(self) -> Tensor:
        """[K] bool, the weights at the limit."""
        return self.held >= self.limit

    def observe(self, losses: Tensor, context: Context) -> Mapping[str, Any]:
        """Weigh the terms that are there and have a gradient."""
        assert context.gradients is not None
        gramian = context.gradients.gramian
        rows = self._rows(gramian, context.present)
        if not rows:
            return {}
        try:
            weights, state = self._weigh(gramian[rows][:, rows], rows)
        except Exception as error:  # a solver's, of whatever kind
            return self._failed(error)
        held = self.held.clone()
        held[rows] = bounded(weights, self.limit)
        return {"held": held, "states": with_state(self.states, rows, state), "draws": self.draws + 1}

    def _rows(self, gramian: Tensor, present: Tensor) -> list[int]:
        norms = gramian.diagonal()
        rows = (present & (norms > 0) & torch.isfinite(norms)).nonzero().flatten().tolist()
        base = self.terms.base_index
        if self.method != "PCD" or base is None:
            return rows
        return [base, *(row for row in rows if row != base)] if base in rows else []

    def _weigh(self, gramian: Tensor, rows: list[int]) -> tuple[Tensor, State]:
        (template,) = self._template
        if self._bargains and len(rows) == 1:  # α = 1 solves it, but TorchJD cannot write the problem down
            return alone(gramian, template.max_norm), {}
        fresh = fresh_copy(template, rows, self.n_terms)
        used = fresh_copy(template, rows, self.n_terms)
        write_state(used, self.states.get(key_of(rows), {}))
        if self._scale_free:
            gramian = gramian / gramian.diagonal().mean()
        with torch.no_grad(), own_dice(self._seed, int(self.draws)), warnings.catch_warnings():
            # NashMTL's problem is solved once and thrown away, so that it could not be reused faster is no news.
            warnings.filterwarnings("ignore", message=".*not DPP.*")
            # Its step is one of several towards the solution, and what it gives is checked and bounded here.
            warnings.filterwarnings("ignore", message=".*may be inaccurate.*")
            warnings.filterwarnings("ignore", category=RuntimeWarning, module="cvxpy")
            weights = used(square_root(gramian) if self._bargains else gramian)
        return weights.to("cpu", torch.float64), read_state(fresh, used)

    def _failed(self, error: Exception) -> Mapping[str, Any]:
        if int(self.draws) == 0:
            raise ValueError(f"weighting {self.name!r} cannot weigh these terms: {error}") from error
        if not self._warned:
            self._warned = True
            warnings.warn(f"adaptive_loss: {self.name} failed, its weights hold: {error}", stacklevel=2)
        return {}

    def get_extra_state(self) -> dict[str, State]:
        """TorchJD's state, by set of present terms."""
        return self.states

    def set_extra_state(self, state: dict[str, State]) -> None:
        """Continue from :meth:`get_extra_state`."""
        self.states = dict(state)


def _find(method: str) -> type[nn.Module]:
    """TorchJD's class: a scalarizer where there is one of that name, as it needs no gradients; else a weighting."""
    try:
        from torchjd import aggregation, scalarization
    except ImportError as error:
        raise UsageError(f"weighting 'torchjd:{method}' needs TorchJD, which is not installed; {INSTALL}") from error
    if method in _UNSUITED:
        raise UsageError(f"TorchJD's {method} cannot be used as weighting: it {_UNSUITED[method]}")
    known = {name: getattr(scalarization, name) for name in scalarization.__all__ if name != "Scalarizer"}
    for name in aggregation.__all__:
        if name.endswith("Weighting") and name != "Weighting":
            known.setdefault(name.removesuffix("Weighting"), getattr(aggregation, name))
    known.setdefault("NashMTL", aggregation.NashMTL)
    if method not in known:
        raise UsageError(f"TorchJD has no {method!r}; choose from: {', '.join(sorted(set(known) - set(_UNSUITED)))}")
    return known[method]


def _doc(method: str, kind: type[nn.Module], parent: type[Weighting]) -> str:
    summary = f"{method} as TorchJD computes it: its class is {kind.__module__.rpartition('.')[0]}.{kind.__name__}."
    return f"{summary}\n\n    {(parent.__doc__ or '').partition('    Example:')[0].strip()}\n    "
