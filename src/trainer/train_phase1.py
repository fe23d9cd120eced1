"""Doorway to :mod:`adaptive_loss.trainer.train_phase1`."""

import sys

from adaptive_loss.trainer.train_phase1 import main

__all__ = ["main"]

if __name__ == "__main__":
    sys.exit(main())
