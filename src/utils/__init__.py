"""The earlier prototype's helpers, as a doorway to ``adaptive_loss.utils``."""
