"""Measurements of fmfa_losses; installed with nothing, run from a checkout: `python -m benchmarks.retrieval`."""
