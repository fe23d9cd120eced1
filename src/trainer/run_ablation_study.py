"""Doorway to :mod:`adaptive_loss.trainer.run_ablation_study`."""

import sys

from adaptive_loss.trainer.run_ablation_study import main

__all__ = ["main"]

if __name__ == "__main__":
    sys.exit(main())
