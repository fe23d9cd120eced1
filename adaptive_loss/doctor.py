"""``adaptive-loss doctor``: what this machine has, and whether training repeats itself on it."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import platform
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adaptive_loss import __version__
from adaptive_loss.utils.commands import EXTRAS, command, parse
from adaptive_loss.utils.config import core_count, resolve_device

PACKAGES = ("torch", "numpy", "safetensors", "tyro", "rich")


@dataclass(frozen=True)
class Flags:
    """The flags of the doctor."""

    data_dir: Path = Path("data")
    """The folder whose disk is looked at."""
    json: bool = False
    """Print one JSON document."""


@command
def main(argv: Sequence[str] | None = None) -> int:
    """The command line; 1 if training would not run or not repeat itself here."""
    flags = parse(Flags, argv, "adaptive-loss doctor", "Show versions, devices, disk and determinism.")
    result = examine(flags.data_dir)
    print(json.dumps(result, indent=2) if flags.json else describe(result))
    return 0 if result["deterministic"] else 1


def examine(data_dir: Path) -> dict[str, Any]:
    """Everything the command prints, as one JSON-ready dictionary."""
    folder = next(part for part in (data_dir.absolute(), *data_dir.absolute().parents) if part.exists())
    missing = sorted({extra for module, extra in EXTRAS.items() if importlib.util.find_spec(module) is None})
    return {
        "adaptive_loss": __version__,
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in PACKAGES},
        "platform": platform.platform(),
        "cores": core_count(),
        **_torch(),
        "disk_free_gb": round(shutil.disk_usage(folder).free / 1e9, 1),
        "missing_extras": missing,
    }


def describe(result: dict[str, Any]) -> str:
    """The dictionary of :func:`examine` as plain text."""
    packages = ", ".join(f"{name} {version or 'missing'}" for name, version in result["packages"].items())
    missing = ", ".join(result["missing_extras"])
    fix = f"{missing}; run: pip install 'adaptive-loss[{missing.replace(', ', ',')}]'" if missing else "none"
    lines = {
        "adaptive-loss": result["adaptive_loss"],
        "python": f"{result['python']} on {result['platform']}",
        "packages": packages,
        "devices": ", ".join(result["devices"]),
        "cores": result["cores"],
        "bf16": "fast on this processor" if result["bf16"] else "not in this processor's instructions; fp32 is used",
        "repeatable": "yes" if result["deterministic"] else "no: two equal training steps differ",
        "disk": f"{result['disk_free_gb']} GB free",
        "missing extras": fix,
    }
    return "\n".join(f"{name:<16}{value}" for name, value in lines.items())


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _torch() -> dict[str, Any]:
    import torch

    from adaptive_loss.trainer.training import has_bf16

    cuda = [f"cuda:{i} {torch.cuda.get_device_name(i)}" for i in range(torch.cuda.device_count())]
    bf16 = has_bf16(torch.device(resolve_device("auto")))
    return {"devices": ["cpu", *cuda], "bf16": bf16, "deterministic": _repeats()}


def _repeats() -> bool:
    """Whether two small convolution steps from one seed give the same gradient, bit for bit."""
    import torch

    def gradient() -> torch.Tensor:
        generator = torch.Generator().manual_seed(0)
        images = torch.randn(16, 3, 16, 16, generator=generator)
        weight = torch.randn(8, 3, 3, 3, generator=generator).requires_grad_()
        loss = torch.nn.functional.conv2d(images, weight, padding=1).relu().square().mean()
        return torch.autograd.grad(loss, weight)[0]

    return torch.equal(gradient(), gradient())


if __name__ == "__main__":
    sys.exit(main())
