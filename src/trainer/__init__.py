"""The earlier prototype's training commands, as a doorway to ``adaptive_loss.trainer``."""
