"""Meta-training of the controller's law across small training runs."""
