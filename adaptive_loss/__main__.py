"""``python -m adaptive_loss`` is ``adaptive-loss``."""

import sys

from adaptive_loss.cli import main

if __name__ == "__main__":
    sys.exit(main())
