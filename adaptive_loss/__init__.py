"""Real-time adaptive loss functions: a model's loss weights, adapted while it trains.

Importing the package imports no torch: what it offers is loaded on first use (PEP 562). Gymnasium, once it is imported,
knows the environment ``adaptive_loss/LossWeighting-v0``.

Example:
    >>> from adaptive_loss import LossExecutor
    >>> executor = LossExecutor.adaptive({"ce": 1.0, "confidence": 1.0}, base="ce")
    >>> sorted(executor.weights)
    ['ce', 'confidence']
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from adaptive_loss import environments

if TYPE_CHECKING:
    from adaptive_loss import probes
    from adaptive_loss.buckets import bucket_means
    from adaptive_loss.guards import Guards
    from adaptive_loss.loss_executor import LossExecutor
    from adaptive_loss.loss_monitor import LossMonitor
    from adaptive_loss.meta_controller import MetaController
    from adaptive_loss.rollback import Rollback
    from adaptive_loss.units import Reduction

__version__ = "0.1.0"
__all__ = [
    "Guards",
    "LossExecutor",
    "LossMonitor",
    "MetaController",
    "Reduction",
    "Rollback",
    "__version__",
    "bucket_means",
    "probes",
]

_HOMES = {
    "Guards": "adaptive_loss.guards",
    "LossExecutor": "adaptive_loss.loss_executor",
    "LossMonitor": "adaptive_loss.loss_monitor",
    "MetaController": "adaptive_loss.meta_controller",
    "Reduction": "adaptive_loss.units",
    "Rollback": "adaptive_loss.rollback",
    "bucket_means": "adaptive_loss.buckets",
}


def __getattr__(name: str) -> Any:
    if name == "probes":
        return importlib.import_module("adaptive_loss.probes")
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


environments.announce()
