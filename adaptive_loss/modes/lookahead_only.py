"""The rule to beat: the gauge-projected, front-loaded look-ahead on its own."""

from __future__ import annotations

from adaptive_loss.meta_controller import RULE, MetaController
from adaptive_loss.modes import modes
from adaptive_loss.modes.base import Mode


@modes.register("lookahead_only")
def lookahead_only() -> Mode:
    """The law with nothing learned: log wᵢ += δ·clip(tᵢ − κᵢ·t_base, ±1), κᵢ = 1 for a term that outgrew the base."""
    return Mode(lambda _: (MetaController(RULE),))
