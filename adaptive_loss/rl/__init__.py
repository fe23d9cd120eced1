"""Reinforcement learning of the loss monitor: replay, networks, the Deep Q-network."""
