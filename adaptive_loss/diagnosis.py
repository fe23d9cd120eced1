"""Diagnosis: what a run that gives up says of the term, the step, the last good values and what to try."""

from __future__ import annotations

from collections.abc import Mapping

from adaptive_loss.step_record import Rejection

_CLIP = "lower the learning rate or set Guards(clip_norm=1.0)"
_TRY = {
    "loss": "look at what goes into {blamed} (a log or a division of 0, an empty batch, inputs that are not finite), "
    f"{_CLIP}; Guards(quarantine=3) goes on without an auxiliary that stays bad",
    "spike": f"Guards(spikes=False) where {{blamed}} is meant to jump (new data, a schedule of its own), else {_CLIP}",
    "weight": "look at the scale of {blamed}, or give LossExecutor another weighting",
    "gradient": "look for a sqrt, norm or division at 0 in {blamed} and add an epsilon inside "
    f"(torch.autograd.set_detect_anomaly(True) names the operation), {_CLIP}",
}


def diagnosis(rejection: Rejection, step: int, good: Mapping[str, float]) -> str:
    """One line: whom a rejection blames, why and when, what was good last, and what to try.

    Args:
        rejection: the last one; its cause chooses the advice.
        step: accepted steps before it.
        good: name → last accepted value, NaN where there is none.

    Example:
        >>> diagnosis(Rejection("the loss is nan", "kl", "loss"), 7, {"kl": 2.5}).split("; try")[0]
        "term 'kl': the loss is nan at step 7; last good values: kl 2.5"
    """
    blamed = "the model" if rejection.term is None else f"term {rejection.term!r}"
    known = {name: "none yet" if value != value else f"{value:.6g}" for name, value in good.items()}
    values = ", ".join(f"{name} {value}" for name, value in known.items())
    advice = _TRY[rejection.cause].format(blamed=blamed)
    return f"{blamed}: {rejection.reason} at step {step}; last good values: {values}; try: {advice}"
