"""The earlier prototype's data modules, as a doorway to ``adaptive_loss.data``."""
