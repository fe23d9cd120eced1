"""Learning across small training runs: families, stacked runs, the environment, pre-training, evidence."""
