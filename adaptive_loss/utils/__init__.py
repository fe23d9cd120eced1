"""Logging and measuring; importing this package imports no torch."""
