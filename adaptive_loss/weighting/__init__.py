"""Weighting rules, one file each: ``weightings.get(name)`` gives a :class:`~adaptive_loss.weighting.base.Weighting`."""

from typing import Any

from adaptive_loss.errors import UsageError
from adaptive_loss.registry import Registry

TORCHJD = {
    "aligned_mtl": "AlignedMTL",
    "cagrad": "CAGrad",
    "dualproj": "DualProj",
    "fairgrad": "FairGrad",
    "gradvac": "GradVac",
    "imtl_g": "IMTLG",
    "mgda": "MGDA",
    "nash_mtl": "NashMTL",
    "pcd": "PCD",
    "pcgrad": "PCGrad",
    "upgrad": "UPGrad",
}
"""Short names of TorchJD's rules; the others are ``"torchjd:Name"``."""


class Weightings(Registry):
    """The rules, and behind ``"torchjd:Name"`` those of TorchJD, an optional extra."""

    def get(self, name: str) -> Any:
        """The rule called ``name``, a class whose instances are made with the number of terms."""
        canonical = self.resolve(name)
        library, _, method = canonical.partition(":")
        if library != "torchjd":
            return _checked(super().get(canonical), canonical)
        from adaptive_loss.weighting.torchjd import rule_class

        return rule_class(method)


def _checked(rule: Any, name: str) -> Any:
    """``rule`` if it is a class of rules; anything else that a name can reach must not be called."""
    from adaptive_loss.weighting.base import Weighting

    if not (isinstance(rule, type) and issubclass(rule, Weighting)):
        raise UsageError(f"weighting {name!r} is no subclass of adaptive_loss.weighting.base.Weighting")
    return rule


weightings = Weightings(
    "weighting",
    "adaptive_loss.weighting",
    aliases={short: f"torchjd:{name}" for short, name in TORCHJD.items()},
    not_plugins=("base", "compose", "noise_levels", "gradient_rule", "torchjd"),
)
