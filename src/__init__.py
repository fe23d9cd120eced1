"""The module names of the earlier prototype, as a doorway to ``adaptive_loss``."""
