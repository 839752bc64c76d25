"""Noisy correspondence, pairs whose caption describes another image: made for experiments, and found in training."""

from .consensus import ConsensusDivision, clean_probability, consensus_division
from .noise_index import apply_noise_index, make_noise_index, read_noise_index, write_noise_index

__all__ = [
    "ConsensusDivision",
    "apply_noise_index",
    "clean_probability",
    "consensus_division",
    "make_noise_index",
    "read_noise_index",
    "write_noise_index",
]
