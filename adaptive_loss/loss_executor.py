"""Dynamic Loss Executor: combines named losses into one safe, differentiable total with adaptive weights."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from adaptive_loss import guards as guard
from adaptive_loss.gradients import LookAhead, leaves, total_norm
from adaptive_loss.guards import REACH, Guards
from adaptive_loss.history import WeightHistory
from adaptive_loss.lookahead import GraphLost, Probe, Schedule, measure, probe_value
from adaptive_loss.losses import LossTerms, StepLosses, Terms
from adaptive_loss.modulator import Event, Modulator, SetPoint
from adaptive_loss.signals import Signals
from adaptive_loss.weighting import weightings
from adaptive_loss.weighting.base import Context, Weighting
from adaptive_loss.weighting.fixed import Fixed


@dataclass(frozen=True)
class StepRecord:
    """What became of one optimizer step.

    Args:
        step: accepted optimizer steps so far, this one included where it was applied.
        applied: whether the optimizer stepped.
        reason: why not, else None.
        term: the term that is to blame, where one is.
        weights: the weights applied, in the user's units.
        losses: the step's losses (means over accumulated batches).
        gradient_norm: Euclidean norm before clipping; NaN where it was not taken.
        events: what was done, and why.
    """

    step: int
    applied: bool
    reason: str | None
    term: str | None
    weights: Mapping[str, float]
    losses: Mapping[str, float]
    gradient_norm: float
    events: tuple[Event, ...] = ()


@dataclass
class _Window:
    """The forward passes since the last optimizer step: one, or several under gradient accumulation."""

    total: Tensor
    count: Tensor
    present: Tensor
    rejection: tuple[str, str | None] | None = None
    look: LookAhead | None = None
    train: float = math.nan
    batches: int = 0
    witness: tuple[Tensor, int] | None = None

    def means(self) -> Tensor:
        """[K] mean losses, NaN where absent in all batches."""
        return self.total / self.count


class LossExecutor(nn.Module):
    """Turns a dict of losses into one total with bounded, adaptive weights, and gates the optimizer step.

    Σᵢ wᵢLᵢ with log wᵢ = log startᵢ + log ruleᵢ + Σ_modulators gainᵢ, then bounds, rate limit and share cap. A term
    that is not finite, or jumps far above its recent values, rejects the step before any statistics see it; after
    ``guards.max_rejections`` rejections in a row the executor raises and names the term.

    Args:
        weights: name → start weight, ≥ 0, in term order; 0 stays off.
        base: the term whose weight stays put. Without it the weights keep their sum while they move.
        targets: name → target value of the terms that are constraints; a set-point law holds them there.
        weighting: a rule's name, ``"package.module:Class"``, or a :class:`Weighting` over the same K terms.
        modulators: what moves the weights above the rule (controller, monitor).
        probe: the objective on held-out data, a function that returns a differentiable scalar.
        guards: what is checked and bounded.
        total_steps: length of the run in optimizer steps, where known.
        apply: False is shadow mode: everything is computed and logged, training is as without it.
        seed: seeds the modulators' own generators.
        schedule: when to look ahead.

    Raises:
        ValueError, KeyError, TypeError: what the user got wrong, with the term and the fix.
        RuntimeError: too many rejected steps in a row.

    Example:
        >>> import torch
        >>> from adaptive_loss import LossExecutor
        >>> w = torch.nn.Parameter(torch.tensor(1.0))
        >>> optimizer = torch.optim.SGD([w], lr=0.1)
        >>> executor = LossExecutor({"fit": 1.0, "size": 0.5}, base="fit")
        >>> total = executor({"fit": (w - 3) ** 2, "size": w**2})
        >>> total.backward()
        >>> executor.step(optimizer).applied, total.item()
        (True, 4.5)
    """

    def __init__(
        self,
        weights: Mapping[str, float],
        *,
        base: str | None = None,
        targets: Mapping[str, float] | None = None,
        weighting: str | Weighting = "fixed",
        modulators: Sequence[Modulator] = (),
        probe: Probe | None = None,
        guards: Guards = Guards(),
        total_steps: int | None = None,
        apply: bool = True,
        seed: int = 0,
        schedule: Schedule = Schedule(),
    ) -> None:
        super().__init__()
        if total_steps is not None and total_steps < 1:
            raise ValueError(f"total_steps is {total_steps}: give a positive number of optimizer steps, or None")
        self.terms = Terms(dict(weights), base, dict(targets or {}))
        n_terms = len(self.terms.names)
        self.weighting = weightings.get(weighting)(n_terms) if isinstance(weighting, str) else weighting
        self.modulators = ((SetPoint(REACH),) if targets else ()) + tuple(modulators)
        self.probe, self.guards, self.total_steps, self.apply = probe, guards, total_steps, apply
        self.schedule = schedule
        for modulator in self.modulators:
            modulator.bind(self.terms, total_steps, seed)
        self.signals = Signals(n_terms, total_steps)
        self.history = WeightHistory(self.terms.names)
        self.rejected_in_row = self.skipped_steps = 0
        self._start, self._active = self.terms.start_weights, self.terms.active
        self._free = self.terms.movable | torch.tensor([name in self.terms.targets for name in self.terms.names])
        self._weights = self._start.clone()
        self._recent = torch.full((guards.spike_window, n_terms), math.nan, dtype=torch.float64)
        self._window: _Window | None = None
        self._optimizer: Optimizer | None = None
        self._can_look = probe is not None and bool(modulators)
        self._clamped: set[tuple[str, str]] = set()
        self._events: list[Event] = []
        self._told: set[str] = set()
        if modulators and probe is None:
            self._tell("no_probe", "no probe was given: monitor and controller run on training signals alone")

    @classmethod
    def adaptive(
        cls,
        weights: Mapping[str, float],
        *,
        base: str | None = None,
        targets: Mapping[str, float] | None = None,
        probe: Probe | None = None,
        weighting: str | Weighting = "fixed",
        total_steps: int | None = None,
        apply: bool = True,
        seed: int = 0,
        policy: str | Path | None = None,
    ) -> LossExecutor:
        """The whole system in one call: executor, controller, and the monitor as far as its evidence allows.

        Args:
            weights, base, targets, probe, weighting, total_steps, apply, seed: as for the class.
            policy: folder with ``controller.json`` and ``monitor.json``; None takes the ones that come with the package.
        """
        from adaptive_loss.loss_monitor import LossMonitor
        from adaptive_loss.meta_controller import MetaController

        modulators = (MetaController.from_policy(policy), LossMonitor.from_policy(policy))
        return cls(
            weights,
            base=base,
            targets=targets,
            weighting=weighting,
            modulators=modulators,
            probe=probe,
            total_steps=total_steps,
            apply=apply,
            seed=seed,
        )

    @property
    def weights(self) -> dict[str, float]:
        """The weights applied last, in the user's units (the start weights before the first step)."""
        return self._named(self._weights if self.apply else self._start)

    @property
    def suggested(self) -> dict[str, float]:
        """The weights the system would apply; they differ from ``weights`` in shadow mode only."""
        return self._named(self._weights)

    def export(self) -> dict[str, Any]:
        """The weights found: ``final``, their ``mean`` over the run, and the ``schedule`` (at most ~1,000 points)."""
        return {"final": self.weights, **self.history.export()}

    def forward(self, losses: LossTerms, *, tap: Tensor | Sequence[Tensor] | None = None) -> Tensor:
        """The weighted total of this step's losses, a scalar that ``backward()`` always accepts.

        Args:
            losses: name → 0-dim tensor; a term may be missing or None this step.
            tap: parameters (or a shared tensor) to take look-ahead gradients at; None for all the optimizer moves.
        """
        batch = self.terms.read(losses)
        if not torch.is_grad_enabled():
            return self._sum(batch, self._weights if self.apply else self._start)
        self._settle()
        window = self._window = self._window or self._new_window()
        rejection = self._examine(batch)
        if rejection is not None:
            self._reject_batch(window, rejection)
            return self._stand_in(batch) if self.apply else self._sum(batch, self._start)
        context = self._context(batch.present & self._active)
        weights = self._weigh(batch, context)
        self._weights = weights.detach()
        total = self._total(batch, weights, context)
        self._note(window, batch, total)
        if window.batches == 1:
            self._look(window, batch, total, tap)
        return total

    def step(self, optimizer: Optimizer, *, scaler: torch.amp.GradScaler | None = None) -> StepRecord:
        """Check the gradients, step the optimizer and learn from the step; or skip it and say why.

        Args:
            optimizer: the one that holds the gradients of ``backward()``.
            scaler: the GradScaler that scaled the loss; it is unscaled, stepped and updated here.
        """
        self._meet(optimizer)
        window = self._window or self._new_window()
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        if window.rejection is not None and self.apply:
            return self._skip(window, *window.rejection)
        if scaler is not None and gradients:
            scaler.unscale_(optimizer)
        norm = total_norm(gradients)
        overflow = not math.isfinite(norm)
        if overflow and scaler is None and self.apply:
            self._count_rejection("the gradient is not finite", self._largest(window))
            return self._skip(window, "the gradient is not finite", self._largest(window), norm)
        clipped = self._clip(gradients, norm)
        if scaler is not None and gradients:
            scaler.step(optimizer)
            scaler.update()
        else:
            optimizer.step()
        if overflow:
            return self._skip(window, "mixed-precision overflow" if scaler else "the gradient is not finite", None, norm)
        if window.rejection is not None or not window.batches:
            return self._skip(window, *(window.rejection or ("no loss was given since the last step", None)), norm)
        return self._accept(window, norm, clipped, float(optimizer.param_groups[0]["lr"]))

    def end_epoch(self, **metrics: float) -> None:
        """Say that an epoch has ended; ``select_loss`` and ``select_accuracy`` are measured on held-out data."""
        self._settle()
        self.weighting.end_epoch(metrics)
        context = self._context(self._active)
        for modulator in self.modulators:
            self._events += modulator.end_epoch(context, metrics)

    def drain_events(self) -> list[Event]:
        """The events since the last call, oldest first."""
        events, self._events = self._events, []
        return events

    # ---- one forward pass -------------------------------------------------------------------------------------

    def _examine(self, batch: StepLosses) -> tuple[str, str | None] | None:
        present = batch.present & self._active
        bad = guard.first_non_finite(batch.values, present)
        if bad is not None:
            return f"the loss is {float(batch.values[bad])}", self.terms.names[bad]
        if not self.guards.spikes:
            return None
        scores = guard.spike_scores(batch.values, self._recent)
        worst = int(torch.where(present, scores, torch.nan).nan_to_num(-1.0).argmax())
        if scores[worst] > 1:
            return f"the loss jumped to {float(batch.values[worst]):.6g}", self.terms.names[worst]
        return None

    def _reject_batch(self, window: _Window, rejection: tuple[str, str | None]) -> None:
        if window.rejection is None:
            window.rejection = rejection
            self._count_rejection(*rejection)

    def _weigh(self, batch: StepLosses, context: Context) -> Tensor:
        """[K] guarded weights; differentiable where the rule learns them."""
        if isinstance(self.weighting, Fixed) and not self.modulators:
            return self._start
        scaled = torch.where(context.present, batch.values * self._start, torch.nan)
        rule = self.weighting(scaled, context).to("cpu", torch.float64)
        raw = rule * self._start * self._gain()
        if self.modulators and self.terms.base is None:
            raw = raw * (self._start.sum() / raw.detach().sum())
        applied = self._guarded(raw.detach(), batch.values)
        if not raw.requires_grad:
            return applied
        return raw * torch.where(self._active, applied / raw.detach(), torch.ones_like(applied))

    def _gain(self) -> Tensor:
        gains = torch.zeros_like(self._start)
        for modulator in self.modulators:
            gains = gains + modulator.gains()
        return torch.where(self._free, gains.clamp(-REACH, REACH), torch.zeros_like(gains)).exp()

    def _guarded(self, weights: Tensor, values: Tensor) -> Tensor:
        stages = [("bounds", lambda w: guard.bound_weights(w, self.guards.bounds))]
        if self.guards.rate_limit is not None and self.signals.step > 0:
            stages.append(("rate limit", lambda w: guard.limit_rate(w, self._weights, self.guards.rate_limit or 0.0)))
        if self.guards.share_cap is not None:
            cap, capped = self.guards.share_cap, self.terms.movable
            stages.append(("share cap", lambda w: guard.cap_shares(w, self._start, values, capped, cap)))
        for name, stage in stages:
            weights = self._report_clamp(name, weights, stage(weights))
        return weights

    def _report_clamp(self, name: str, before: Tensor, after: Tensor) -> Tensor:
        """Log a guard when it begins to bind, not on every step it goes on binding."""
        moved = (before - after).abs() > 1e-9 * before.abs()
        for i, term in enumerate(self.terms.names):
            if not moved[i]:
                self._clamped.discard((name, term))
            elif (name, term) not in self._clamped:
                self._clamped.add((name, term))
                details = {"term": term, "before": float(before[i]), "after": float(after[i])}
                self._events.append(Event(self.signals.step, "clamp", f"{name} holds {term!r}", details))
        return after

    def _total(self, batch: StepLosses, weights: Tensor, context: Context) -> Tensor:
        if not self.apply:
            return self._sum(batch, self._start)
        total = self._sum(batch, weights)
        penalty = self.weighting.penalty(context)
        return total if penalty is None else total + penalty.to(total.device, total.dtype)

    def _sum(self, batch: StepLosses, weights: Tensor) -> Tensor:
        """Σᵢ wᵢLᵢ in term order over the terms that are there and on."""
        factors = list(weights) if weights.requires_grad else weights.tolist()
        total: Tensor | None = None
        for loss, factor, active in zip(batch.tensors, factors, self._active.tolist(), strict=True):
            if loss is not None and active:
                part = loss * (factor.to(loss.device, loss.dtype) if isinstance(factor, Tensor) else factor)
                total = part if total is None else total + part
        return self._stand_in(batch) if total is None else total

    def _stand_in(self, batch: StepLosses) -> Tensor:
        """A 0 that ``backward()`` accepts and that reaches no parameter: 0 · NaN would still be NaN."""
        like = next(tensor for tensor in batch.tensors if tensor is not None)
        return torch.zeros((), dtype=like.dtype, device=like.device, requires_grad=torch.is_grad_enabled())

    def _note(self, window: _Window, batch: StepLosses, total: Tensor) -> None:
        window.batches += 1
        window.present |= batch.present & self._active
        window.total += batch.values.nan_to_num(0.0)
        window.count += batch.present
        if self._optimizer is None:
            own = {id(p) for p in self.parameters()}
            witness = next((leaf for leaf in leaves(total) if id(leaf) not in own), None)
            window.witness = None if witness is None else (witness, witness._version)

    def _look(self, window: _Window, batch: StepLosses, total: Tensor, tap: Tensor | Sequence[Tensor] | None) -> None:
        if not self._can_look or not self.schedule.due(self.signals.step, self.total_steps):
            return
        live = [loss if on else None for loss, on in zip(batch.tensors, self._active.tolist(), strict=True)]
        try:
            window.look = measure(
                live, self._weights, self._probe(), self._tapped(total, tap), self._optimizer, self.terms.base_index
            )
        except GraphLost as error:
            self._can_look = False
            self._tell("graph", f"this step's graph cannot be kept for a look-ahead ({error}); training signals alone")
            return
        base = self.terms.base_index
        window.train = float(total.detach()) if base is None or batch.tensors[base] is None else float(batch.values[base])

    def _tapped(self, total: Tensor, tap: Tensor | Sequence[Tensor] | None) -> list[Tensor]:
        if tap is not None:
            return [tap] if isinstance(tap, Tensor) else list(tap)
        own = {id(p) for p in self.parameters()}
        if self._optimizer is None:
            return [leaf for leaf in leaves(total) if id(leaf) not in own]
        held = (p for group in self._optimizer.param_groups for p in group["params"])
        return [p for p in held if p.requires_grad and id(p) not in own]

    def _probe(self) -> Probe:
        assert self.probe is not None
        return self.probe

    # ---- one optimizer step -----------------------------------------------------------------------------------

    def _accept(self, window: _Window, norm: float, clipped: bool, rate: float) -> StepRecord:
        values, applied = window.means(), self.weights
        self._recent[self.signals.step % len(self._recent)] = values
        self.signals.update(values, gradient_norm=norm, clipped=clipped, learning_rate=rate)
        if window.look is not None:
            self.signals.look(window.look, window.train)
        self.history.add(self.signals.step, self._weights if self.apply else self._start)
        context = self._context(window.present, looked=window.look is not None)
        self.weighting.after_step(torch.where(window.present, values * self._start, torch.nan), context)
        for modulator in self.modulators:
            self._events += modulator.after_step(context)
        self.rejected_in_row = 0
        self._window = None
        return self._record(window, True, None, None, norm, applied)

    def _skip(self, window: _Window, reason: str, term: str | None, norm: float = math.nan) -> StepRecord:
        self._window = None
        self.skipped_steps += 1
        self._events.append(Event(self.signals.step, "skip", reason, {"term": term}))
        return self._record(window, False, reason, term, norm, self.weights)

    def _record(
        self, window: _Window, applied: bool, reason: str | None, term: str | None, norm: float, weights: dict[str, float]
    ) -> StepRecord:
        losses = {name: value for name, value in self._named(window.means()).items() if not math.isnan(value)}
        events = tuple(self._events)
        return StepRecord(self.signals.step, applied, reason, term, weights, losses, norm, events)

    def _count_rejection(self, reason: str, term: str | None) -> None:
        self.rejected_in_row += 1
        if self.rejected_in_row >= self.guards.max_rejections and self.apply:
            raise RuntimeError(
                f"{self.rejected_in_row} steps in a row were rejected, the last one because of "
                f"{'the model' if term is None else f'term {term!r}'}: {reason} at step {self.signals.step}; "
                f"last good values: {self._last_good()}; lower the learning rate or look at that term's inputs"
            )

    def _last_good(self) -> str:
        row = self._recent[(self.signals.step - 1) % len(self._recent)]
        return ", ".join(f"{name} {value:.6g}" for name, value in self._named(row).items())

    def _largest(self, window: _Window) -> str | None:
        """The term with the greatest weighted loss: the first place to look when a gradient is not finite."""
        mass = (window.means() * self._weights).abs().nan_to_num(-1.0)
        return self.terms.names[int(mass.argmax())] if window.batches else None

    def _clip(self, gradients: Sequence[Tensor], norm: float) -> bool:
        limit = self.guards.clip_norm
        if limit is None or not self.apply or not math.isfinite(norm) or norm <= limit:
            return False
        torch._foreach_mul_(list(gradients), limit / norm)
        return True

    def _meet(self, optimizer: Optimizer) -> None:
        if self._optimizer is None:
            held = {id(p) for group in optimizer.param_groups for p in group["params"]}
            if any(id(p) not in held for p in self.parameters()):
                self._tell("learned", "the rule learns its weights: give executor.parameters() to the optimizer")
        self._optimizer = optimizer

    def _settle(self) -> None:
        """Close the last window where the user stepped the optimizer himself."""
        window = self._window
        if window is None or self._optimizer is not None:
            return
        if window.rejection is not None:
            self._skip(window, *window.rejection)
        elif window.witness is not None and window.witness[0]._version != window.witness[1]:
            self._tell("own_step", "the optimizer was stepped outside executor.step(): gradients are not checked")
            self._accept(window, math.nan, False, math.nan)

    # ---- bookkeeping ------------------------------------------------------------------------------------------

    def _context(self, present: Tensor, looked: bool = False) -> Context:
        objective = None if self.probe is None else self._objective
        return Context(self.signals.step, present, self.signals, self._weights, self._start, looked, objective)

    def _objective(self) -> float:
        """The probe's value, drawn as the next look-ahead will draw it: whoever asks in between changes no look-ahead."""
        probe = self._probe()
        save, load = getattr(probe, "state_dict", None), getattr(probe, "load_state_dict", None)
        state = save() if save is not None and load is not None else None
        value = probe_value(probe)
        if load is not None and state is not None:
            load(state)
        return value

    def _new_window(self) -> _Window:
        zeros = torch.zeros_like(self._start)
        return _Window(zeros, zeros.clone(), torch.zeros_like(self._active))

    def _named(self, values: Tensor) -> dict[str, float]:
        return dict(zip(self.terms.names, values.tolist(), strict=True))

    def _tell(self, key: str, message: str) -> None:
        if key not in self._told:
            self._told.add(key)
            warnings.warn(f"adaptive_loss: {message}", stacklevel=3)

    def get_extra_state(self) -> dict[str, Any]:
        """All state besides the rule's own parameters and buffers; loads with ``weights_only=True``."""
        probe_state = getattr(self.probe, "state_dict", None)
        return {
            "names": list(self.terms.names),
            "signals": self.signals.state_dict(),
            "history": self.history.state_dict(),
            "weights": self._weights.clone(),
            "recent": self._recent.clone(),
            "rejected_in_row": self.rejected_in_row,
            "skipped_steps": self.skipped_steps,
            "can_look": self._can_look,
            "clamped": sorted(list(pair) for pair in self._clamped),
            "modulators": [modulator.state_dict() for modulator in self.modulators],
            "probe": probe_state() if callable(probe_state) else {},
        }

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Continue from :meth:`get_extra_state`; refuses the state of an executor with other terms or modulators."""
        if state["names"] != list(self.terms.names) or len(state["modulators"]) != len(self.modulators):
            raise ValueError(
                f"this state belongs to another executor: terms {', '.join(state['names'])} with "
                f"{len(state['modulators'])} modulators; here {', '.join(self.terms.names)} with {len(self.modulators)}"
            )
        self.signals.load_state_dict(state["signals"])
        self.history.load_state_dict(state["history"])
        self._weights, self._recent = state["weights"].clone(), state["recent"].clone()
        self.rejected_in_row, self.skipped_steps = state["rejected_in_row"], state["skipped_steps"]
        self._can_look = state["can_look"]
        self._clamped = {(name, term) for name, term in state["clamped"]}
        for modulator, saved in zip(self.modulators, state["modulators"], strict=True):
            modulator.load_state_dict(saved)
        if state["probe"] and hasattr(self.probe, "load_state_dict"):
            self.probe.load_state_dict(state["probe"])  # type: ignore[union-attr]
        self._window = None
