"""Doorway to :mod:`adaptive_loss.trainer.run_phase1_experiments`."""

import sys

from adaptive_loss.trainer.run_phase1_experiments import main

__all__ = ["main"]

if __name__ == "__main__":
    sys.exit(main())
