"""Doorway to :mod:`adaptive_loss.trainer.simple_ablation_analysis`; runs by path or by name, with nothing installed."""

import runpy
from pathlib import Path

if __name__ == "__main__":
    _ROOT = Path(__file__).resolve().parents[2]
    runpy.run_path(str(_ROOT / "adaptive_loss/trainer/simple_ablation_analysis.py"), run_name="__main__")
else:
    from adaptive_loss.trainer.simple_ablation_analysis import *  # noqa: F403
