"""Dynamic Loss Executor: combines named losses into one safe, differentiable total with adaptive weights."""

from __future__ import annotations

import math
import warnings
from collections import deque
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from adaptive_loss import parallel as ranks
from adaptive_loss.buckets import Buckets
from adaptive_loss.diagnosis import diagnosis
from adaptive_loss.errors import UsageError
from adaptive_loss.events import Event
from adaptive_loss.foreign_steps import watch_steps
from adaptive_loss.gradient_gate import GradientGate, note_norms
from adaptive_loss.gradients import TermGradients, leaves
from adaptive_loss.guards import REACH, Guards
from adaptive_loss.history import WeightHistory
from adaptive_loss.identity import check_identity, identity
from adaptive_loss.live_look import Objective, measure_later, moved
from adaptive_loss.lookahead import GraphLost, Probe, Schedule, measure
from adaptive_loss.losses import LossTerms, StepLosses, Terms
from adaptive_loss.modulator import Modulator, SetPoint
from adaptive_loss.optimizer_memory import rescale_memory
from adaptive_loss.signals import Signals
from adaptive_loss.step_record import Named, Rejection, StepRecord, Window
from adaptive_loss.term_gate import TermGate
from adaptive_loss.units import Reduction
from adaptive_loss.weigher import Weigher
from adaptive_loss.weighting import weightings
from adaptive_loss.weighting.base import NEEDS, PATIENCE, Context, Weighting

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

_KEPT_EVENTS = 10_000
_NO_LOSS = "no loss was given since the last step"
_OVERFLOW = Rejection("mixed-precision overflow", None, "overflow")
_ELSEWHERE = Rejection("another rank rejected the step", None, "weight")
_Method = TypeVar("_Method", bound=Callable[..., Any])


def _uncompiled(method: _Method) -> _Method:
    """Keep ``torch.compile`` out: numbers decide what is done, so it would compile anew at every step."""
    return cast("_Method", torch.compiler.disable(method))


class LossExecutor(nn.Module):
    """Turns a dict of losses into one total with bounded, adaptive weights, and gates the optimizer step.

    Σᵢ wᵢLᵢ with log wᵢ = log startᵢ + log ruleᵢ + Σ_modulators gainᵢ, then bounds, rate limit and share cap. A term
    that is not finite, or jumps far above its recent values, rejects the step before any statistics see it; after
    ``guards.max_rejections`` rejections in a row the executor raises and names the term.

    Args:
        weights: name → start weight, ≥ 0, in term order; 0 stays off.
        base: the term that controller and monitor leave alone, and whose share has no cap; a rule may weigh it like any
            other. Without it the weights keep their sum while modulators move them.
        targets: name → target value of the terms that are constraints; a set-point law holds them there.
        weighting: a rule's name, ``"package.module:Class"``, or a :class:`Weighting` over the same K terms.
        modulators: what moves the weights above the rule (controller, monitor).
        probe: the objective on held-out data, a function that returns a differentiable scalar.
        guards: what is checked and bounded.
        total_steps: length of the run in optimizer steps, where known.
        apply: False is shadow mode: everything is computed and logged, training is as without it.
        seed: seeds the modulators' own generators.
        schedule: when to look ahead; None asks the first modulator.
        reductions: name → how that term's loss was reduced; the term then counts in nats per example, so that its
            weight means the same at every image and batch size.
        parallel: which ranks find the weights together where torch.distributed runs: True for all, a process group for
            its own, False for none but this one.
        pinned: auxiliaries whose weights monitor and controller leave alone; needs a base.

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
        schedule: Schedule | None = None,
        reductions: Mapping[str, Reduction] | None = None,
        parallel: bool | ProcessGroup = True,
        pinned: Collection[str] = (),
    ) -> None:
        super().__init__()
        if total_steps is not None and not total_steps >= 1:
            raise ValueError(f"total_steps is {total_steps}: give a positive number of optimizer steps, or None")
        if isinstance(pinned, str):
            raise TypeError(f"pinned is {pinned!r}: give a list of names, [{pinned!r}]")
        self.terms = Terms(weights, base, dict(targets or {}), dict(reductions or {}), tuple(pinned))
        n_terms = len(self.terms.names)
        self.weighting = _rule(weighting, n_terms)
        self.weighting.bind(self.terms, seed)
        holds = bool(targets) and not self.weighting.holds_targets
        self.modulators = ((SetPoint(REACH),) if holds else ()) + tuple(modulators)
        self._objective = None if probe is None else Objective(probe)
        self.guards, self.total_steps, self.applies = guards, total_steps, apply
        self.schedule = schedule or next((modulator.schedule for modulator in modulators), Schedule())
        self.parallel = ranks.checked(parallel)
        for modulator in self.modulators:
            modulator.bind(self.terms, total_steps, seed)
        self.signals = Signals(n_terms, total_steps)
        self.history = WeightHistory(self.terms.names)
        self.rejected_in_row = self.skipped_steps = self._epochs = 0
        self._start, self._active = self.terms.start_weights, self.terms.active
        self._weigher = Weigher(self.terms, self.weighting, self.modulators, guards)
        self._weights = self._start.clone()
        self._gate = TermGate(self.terms, guards, leaves_out=apply)
        self._window: Window | None = None
        self._optimizer: Optimizer | None = None
        self._can_look = probe is not None and bool(modulators)
        self._events: deque[Event] = deque(maxlen=_KEPT_EVENTS)
        self._fresh: list[Event] = []
        self._told: set[str] = set()
        watch_steps(self, LossExecutor._settle)
        if not apply and any(True for _ in self.weighting.parameters()):
            self._tell(
                "shadow", f"in shadow mode {self.weighting.name!r} learns nothing: its weights stay at the start"
            )
        if modulators and probe is None:
            signals = "monitor and controller run on training signals alone, by which the shipped ones move no weight"
            self._tell("no_probe", f"no probe was given: {signals}")

    @classmethod
    def adaptive(
        cls,
        weights: Mapping[str, float],
        *,
        base: str | None = None,
        targets: Mapping[str, float] | None = None,
        probe: Probe | None = None,
        weighting: str | Weighting = "fixed",
        guards: Guards = Guards(),
        total_steps: int | None = None,
        apply: bool = True,
        seed: int = 0,
        policy: str | Path | None = None,
        reductions: Mapping[str, Reduction] | None = None,
        parallel: bool | ProcessGroup = True,
        pinned: Collection[str] = (),
    ) -> LossExecutor:
        """The whole system in one call: executor, controller, and the monitor as far as its evidence allows.

        Args:
            weights, base, targets, probe, weighting, total_steps, apply, seed, reductions, parallel, pinned: as for the
                class.
            guards: what is checked and bounded.
            policy: folder with ``controller.json`` and ``monitor.json``, with their tensors; None is the package's.
        """
        from adaptive_loss.loss_monitor import LossMonitor
        from adaptive_loss.meta_controller import MetaController

        modulators = (MetaController.from_policy(policy), LossMonitor.from_policy(policy))
        return cls(
            weights,
            base=base,
            targets=targets,
            weighting=weighting,
            guards=guards,
            modulators=modulators,
            probe=probe,
            total_steps=total_steps,
            apply=apply,
            seed=seed,
            reductions=reductions,
            parallel=parallel,
            pinned=pinned,
        )

    @property
    def probe(self) -> Probe | None:
        """The objective on held-out data, or None."""
        return None if self._objective is None else self._objective.probe

    @property
    def weights(self) -> dict[str, float]:
        """The weights applied last, in the user's units (the start weights before the first step)."""
        return dict(self._applied)

    @property
    def suggested(self) -> dict[str, float]:
        """The weights the system would apply; they differ from ``weights`` in shadow mode only."""
        return dict(Named(self.terms.names, self._weights))

    @property
    def quarantined(self) -> tuple[str, ...]:
        """The terms that are left out now, where ``Guards(quarantine=...)`` allows it."""
        return self._gate.left_out

    @property
    def unreached(self) -> dict[str, str]:
        """The terms whose target cannot be reached: their law has long stood at a bound, as each one's line says."""
        return {
            name: reason for part in (self.weighting, *self.modulators) for name, reason in part.unreached().items()
        }

    def export(self) -> dict[str, Any]:
        """The weights found: ``final``, their ``mean`` over the run, and the ``schedule`` (at most ~1,000 points)."""
        return {"final": self.weights, **self.history.export()}

    @_uncompiled
    def forward(self, losses: LossTerms | Buckets, *, tap: Tensor | Sequence[Tensor] | None = None) -> Tensor:
        """The weighted total of this step's losses, a scalar that ``backward()`` always accepts.

        Args:
            losses: name → 0-dim tensor; a term may be missing or None this step. Or all K terms in one tensor, from
                :func:`~adaptive_loss.buckets.bucket_means`.
            tap: the output, shared features or parameters at which a rule takes the terms' gradients; None for those it
                was made with. Parameters serve the look-ahead too, which else takes all that the optimizer moves: the
                probe's own graph does not pass through this step's features.

        Raises:
            UsageError: the rule needs what it was not given.
        """
        batch = self.terms.read(losses)
        if not torch.is_grad_enabled():
            return batch.total(self._weights if self.applies else self._start, self._active)
        group = self._group
        if group is not None:
            batch = batch.with_all_ranks(*ranks.mean_where(batch.values, batch.present, group))
        window = self._window = self._window or Window.opened(self._weights)
        given, batch = batch, self._gate.sift(batch, window)
        if self._optimizer is None:
            window.leaves |= {id(leaf) for loss in batch.roots for leaf in leaves(loss)}
        context = self._context(
            batch.present & self._active, gradients=self._gradients(batch, tap), first=window.weights is None
        )
        self._check_needs(context)
        weights = self._agreed(
            self._gate.examine(batch, context.present) or self._weigher.weigh(batch, context, window)
        )
        if isinstance(weights, Rejection):
            self._reject_batch(window, weights)
            return given.stand_in() if self.applies else given.total(self._start, self._active)
        self._weights = weights.detach()
        total = self._total(batch, weights, context)
        window.add(batch, context.present)
        if self._gate.doubts_gradient:
            note_norms(window, batch.live(self._active), self._weights, group)
        if window.batches == 1:
            self._look(window, batch, total, tap)
        return total

    @_uncompiled
    def step(self, optimizer: Optimizer, *, scaler: torch.amp.GradScaler | None = None) -> StepRecord:
        """Check the gradients, step the optimizer and learn from the step; or skip it and say why.

        Args:
            optimizer: the one that holds the gradients of ``backward()``.
            scaler: the GradScaler that scaled the loss; it is unscaled, stepped and updated here.
        """
        self._meet(optimizer)
        window, self._window = self._window or Window.opened(self._weights), None
        if window.rejection is not None and self.applies:
            return self._skip(window, window.rejection)
        self._finish_look(window, optimizer)
        gate = GradientGate(optimizer, scaler, self.guards.clip_norm if self.applies else None, self._group)
        rejection = gate.rejection(window, self.terms.names, self._weights)
        if rejection is not None and not gate.overflow and self.applies:
            gate.hold()
            self._count_rejection(window, rejection)
            return self._skip(window, rejection, gate.norm)
        gate.step()
        if rejection is not None and gate.overflow:
            if not gate.exhausted:
                return self._skip(window, _OVERFLOW, gate.norm)
            self._count_rejection(window, rejection)
            return self._skip(window, rejection, gate.norm)
        rejection = rejection or window.rejection
        if rejection is not None:
            return self._skip(window, rejection, gate.norm, stepped=True)
        if not window.batches:
            return self._record(window, True, None, gate.norm, self._applied)
        return self._accept(window, gate.norm, gate.clipped, float(optimizer.param_groups[0]["lr"]))

    def end_epoch(self, **metrics: float) -> None:
        """Say that an epoch has ended; ``select_loss`` and ``select_accuracy`` are measured on held-out data.

        Of several ranks all must call it; the two are then means over the ranks that give them.
        """
        self._epochs += 1
        metrics = ranks.mean_metrics(metrics, self._group)
        self.weighting.end_epoch(metrics)
        context = self._context(self._active)
        for modulator in self.modulators:
            self._emit(modulator.end_epoch(context, metrics))

    def drain_events(self) -> list[Event]:
        """The events since the last call, oldest first (at most the last 10,000)."""
        events = list(self._events)
        self._events.clear()
        return events

    def report(self, event: Event) -> None:
        """Enter what was done from outside, as by a rollback, among the events."""
        self._emit([event])

    # ---- one forward pass -------------------------------------------------------------------------------------

    def _gradients(self, batch: StepLosses, tap: Tensor | Sequence[Tensor] | None) -> TermGradients | None:
        at = _as_list(tap) or self.weighting.at
        for place, tensor in enumerate(at or ()):
            if not isinstance(tensor, Tensor):
                kind = type(tensor).__name__
                raise TypeError(f"tap[{place}] is a {kind}: give tensors: the output, shared features or parameters")
            if not tensor.requires_grad:
                shape = f"tap[{place}], of shape {list(tensor.shape)},"
                raise ValueError(f"{shape} needs no gradient: give features or parameters that are trained")
        return None if at is None else TermGradients(batch.live(self._active), self._start, at, self._group)

    def _check_needs(self, context: Context) -> None:
        unmet = self.weighting.unmet(context)
        if unmet is not None:
            raise UsageError(unmet)
        if "epochs" in self.weighting.needs and context.step == PATIENCE and not self._epochs:
            self._tell("epochs", f"weighting {self.weighting.name!r} needs epochs: {NEEDS['epochs']}")

    def _agreed(self, found: Tensor | Rejection) -> Tensor | Rejection:
        """The weights, where every rank has found them; else why the step is rejected, which it is on every rank."""
        own = None if isinstance(found, Rejection) else found.detach()
        accepted = ranks.all_accept(own, len(self.terms.names), self._group)
        return found if accepted or own is None else _ELSEWHERE

    def _reject_batch(self, window: Window, rejection: Rejection) -> None:
        # While nobody is known to step the optimizer, no later batch shows that the window has ended.
        if window.rejection is None or self._optimizer is None:
            window.rejection = window.rejection or rejection
            self._count_rejection(window, rejection)

    def _total(self, batch: StepLosses, weights: Tensor, context: Context) -> Tensor:
        if not self.applies:
            return batch.total(self._start, self._active)
        penalty = self.weighting.penalty(context)
        if weights.requires_grad:
            learned = _learned(weights, batch.values)
            penalty = learned if penalty is None else penalty + learned
        return batch.total(self._weights, self._active, penalty)

    def _look(self, window: Window, batch: StepLosses, total: Tensor, tap: Tensor | Sequence[Tensor] | None) -> None:
        if self._objective is None or not self._can_look or not self._is_due:
            return
        live, probe = batch.live(self._active), self._objective.probe
        tapped, base = _as_list(tap), self.terms.base_index
        tapped = tapped if tapped and all(isinstance(tensor, nn.Parameter) for tensor in tapped) else None
        window.probe_state = self._objective.state_dict()
        try:
            if self._optimizer is None:
                window.look_later = measure_later(live, self._weights, probe, tapped, base, self._group)
            else:
                at = tapped or self._moved(self._optimizer)
                window.look = measure(live, self._weights, probe, at, self._optimizer, base, self._group)
        except GraphLost as error:
            return self._stop_looking(error)
        by_base = base is not None and bool(batch.present[base])
        window.train = float(batch.values[base]) if by_base else ranks.mean(float(total.detach()), self._group)

    @property
    def _is_due(self) -> bool:
        return self.schedule.due(self.signals.step, self.total_steps, self.signals.newest)

    def _stop_looking(self, error: GraphLost) -> None:
        self._can_look = False
        self._tell("graph", f"this step's graph cannot be kept for a look-ahead ({error}); training signals alone")

    def _moved(self, optimizer: Optimizer) -> list[Tensor]:
        """The model's parameters."""
        own = {id(p) for p in self.parameters()}
        return [p for p in moved(optimizer) if id(p) not in own]

    def _finish_look(self, window: Window, optimizer: Optimizer) -> None:
        if window.look_later is not None:
            try:
                window.look = window.look_later(self._moved(optimizer), optimizer)
            except GraphLost as error:
                self._stop_looking(error)
            window.look_later = None

    # ---- one optimizer step -----------------------------------------------------------------------------------

    def _accept(self, window: Window, norm: float, clipped: bool, rate: float) -> StepRecord:
        values, applied = window.means() * self.terms.unit, self._applied
        self._emit(self._weigher.clamps(window, self.signals.step + 1))
        self._emit(self._gate.admit(values, window, self.signals.step + 1))
        self.signals.update(values, gradient_norm=norm, clipped=clipped, learning_rate=rate)
        if window.look is not None:
            self.signals.look(window.look, window.train)
            if not window.look.cos_probe.nan_to_num().any():
                self._tell("no_reach", "the probe's gradient is 0: it must depend on the parameters that are trained")
        self.history.add(self.signals.step, self._weights if self.applies else self._start)
        rescale = self._rescale if self.applies and self._optimizer is not None else None
        context = self._context(window.present, looked=window.look is not None, rescale=rescale)
        self._emit(self.weighting.after_step(values * self._start, context) or ())
        for modulator in self.modulators:
            self._emit(modulator.after_step(context))
        self.rejected_in_row = 0
        return self._record(window, True, None, norm, applied)

    def _rescale(self, ratio: float) -> None:
        assert self._optimizer is not None
        rescale_memory(self._optimizer, self._moved(self._optimizer), ratio)

    def _skip(
        self, window: Window, rejection: Rejection, norm: float = math.nan, *, stepped: bool = False
    ) -> StepRecord:
        """Go back to the state before the step; ``stepped``: shadow mode let the optimizer step all the same."""
        self._revert(window)
        self.skipped_steps += not stepped
        self._emit([Event(self.signals.step, "skip", rejection.reason, {"term": rejection.term, "shadow": stepped})])
        return self._record(window, stepped, rejection, norm, self._applied)

    def _record(
        self, window: Window, applied: bool, rejection: Rejection | None, norm: float, weights: Named
    ) -> StepRecord:
        losses = Named(self.terms.names, window.means())
        events = tuple(self._fresh)
        self._fresh.clear()
        if rejection is None:
            reason = None if window.batches else _NO_LOSS
            return StepRecord(self.signals.step, applied, reason, None, weights, losses, norm, events)
        reason, term, cause = rejection.reason, rejection.term, rejection.cause
        return StepRecord(self.signals.step, applied, reason, term, weights, losses, norm, events, cause)

    def _emit(self, events: Sequence[Event]) -> None:
        self._events.extend(events)
        self._fresh.extend(events)

    def _count_rejection(self, window: Window, rejection: Rejection) -> None:
        left_out = self._gate.strike(rejection, self.signals.step)
        self._emit(left_out)
        # Without the terms that are left out now the next step may well be good.
        self.rejected_in_row = 0 if left_out else self.rejected_in_row + 1
        if self.rejected_in_row >= self.guards.max_rejections and self.applies:
            # Whoever catches the error and goes on starts a new step.
            self._window = None
            self._revert(window)
            why = diagnosis(rejection, self.signals.step, self._gate.last())
            raise RuntimeError(f"{self.rejected_in_row} steps in a row were rejected, the last one because of {why}")

    def _meet(self, optimizer: Optimizer) -> None:
        if optimizer is self._optimizer:
            return
        if self._optimizer is None:
            held = {id(p) for group in optimizer.param_groups for p in group["params"]}
            if any(id(p) not in held for p in self.parameters()):
                self._tell("learned", "the rule learns its weights: give executor.parameters() to the optimizer")
        self._optimizer = optimizer

    def _settle(self, optimizer: Optimizer) -> None:
        """Close the window where the user has stepped the optimizer himself."""
        window = self._window
        if window is None:
            return
        held = {id(p) for p in moved(optimizer)}
        # What fully_shard has split is no leaf of any graph.
        mine = window.leaves & held or any(ranks.is_split(p) for p in moved(optimizer))
        if not (mine if self._optimizer is None else optimizer is self._optimizer):
            return
        self._window = None
        self._tell("own_step", "the optimizer was stepped outside executor.step(): gradients are not checked")
        # One that moves only a part, as in a GAN, may be another executor's.
        if window.leaves <= held:
            self._meet(optimizer)
        if window.rejection is not None:
            self._skip(window, window.rejection, stepped=not self.applies)
        else:
            self._finish_look(window, optimizer)
            self._accept(window, math.nan, False, float(optimizer.param_groups[0]["lr"]))

    # ---- bookkeeping ------------------------------------------------------------------------------------------

    @property
    def _group(self) -> ranks.Group:
        return ranks.group_of(self.parallel)

    def _context(self, present: Tensor, **known: Any) -> Context:
        objective = None if self._objective is None else self._mean_objective
        return Context(
            step=self.signals.step,
            present=present,
            signals=self.signals,
            weights=self._weights,
            start=self._start,
            objective=objective,
            group=self._group,
            **known,
        )

    def _mean_objective(self) -> float:
        assert self._objective is not None
        return ranks.mean(self._objective.value(), self._group)

    def _revert(self, window: Window) -> None:
        """Go back to where the last accepted step left weights and probe."""
        self._weights = window.before
        if self._objective is not None:
            self._objective.load_state_dict(window.probe_state)

    @property
    def _applied(self) -> Named:
        return Named(self.terms.names, self._weights if self.applies else self._start)

    def _tell(self, key: str, message: str) -> None:
        if key not in self._told:
            self._told.add(key)
            warnings.warn(f"adaptive_loss: {message}", stacklevel=3)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> LossExecutor:
        """Weights are host numbers: ``to()``, ``cuda()`` and ``half()`` leave rule and statistics where they are."""
        return self

    def get_extra_state(self) -> dict[str, Any]:
        """All state besides the rule's own parameters and buffers; loads with ``weights_only=True``."""
        return {
            "identity": identity(self.terms, self.weighting, self.modulators),
            "signals": self.signals.state_dict(),
            "history": self.history.state_dict(),
            "weights": (self._weights if self._window is None else self._window.before).clone(),
            "gate": self._gate.state_dict(),
            "rejected_in_row": self.rejected_in_row,
            "skipped_steps": self.skipped_steps,
            "epochs": self._epochs,
            "can_look": self._can_look,
            "held": sorted([guard, term, steps] for (guard, term), steps in self._weigher.held.items()),
            "modulators": [modulator.state_dict() for modulator in self.modulators],
            "probe": None if self._objective is None else self._objective.state_dict(),
        }

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Continue from :meth:`get_extra_state`; refuses another kind of executor's, changing nothing."""
        check_identity(state["identity"], identity(self.terms, self.weighting, self.modulators))
        self.signals.load_state_dict(state["signals"])
        self.signals.total_steps = self.total_steps
        self.history.load_state_dict(state["history"])
        self._weights = state["weights"].clone()
        self._gate.load_state_dict(state["gate"])
        self.rejected_in_row, self.skipped_steps = state["rejected_in_row"], state["skipped_steps"]
        self._epochs, self._can_look = state["epochs"], state["can_look"]
        self._weigher.held = {(guard, term): steps for guard, term, steps in state["held"]}
        for modulator, saved in zip(self.modulators, state["modulators"], strict=True):
            modulator.load_state_dict(saved)
        if self._objective is not None:
            self._objective.load_state_dict(state["probe"])
        self._window = None


def _as_list(tap: Tensor | Sequence[Tensor] | None) -> list[Tensor] | None:
    return None if tap is None else [tap] if isinstance(tap, Tensor | nn.Module) else list(tap)


def _learned(weights: Tensor, values: Tensor) -> Tensor:
    """0, through which a rule's parameters learn from the losses' values, [K], instead of a product a term.

    Between ranks the values are means over all of them, so that the parameters stay alike.
    """
    return (weights - weights.detach()) @ values.nan_to_num(0.0, 0.0, 0.0)


def _rule(weighting: str | Weighting, n_terms: int) -> Weighting:
    rule = weightings.get(weighting)(n_terms) if isinstance(weighting, str) else weighting
    if not isinstance(rule, Weighting):
        raise TypeError(f"weighting is a {type(rule).__name__}: give a rule's name or a Weighting")
    if rule.n_terms != n_terms:
        raise ValueError(
            f"the weighting is over {rule.n_terms} terms, the executor has {n_terms}: make it with {n_terms}"
        )
    return rule
