"""Pictures of runs; importing this package imports no matplotlib."""
