"""The earlier prototype's models, as a doorway to ``adaptive_loss.models``."""
