"""Doorway to :mod:`adaptive_loss.trainer.train_ablation`."""

import sys

from adaptive_loss.trainer.train_ablation import main

__all__ = ["main"]

if __name__ == "__main__":
    sys.exit(main())
