"""Differentiable building blocks; each file holds the reference, the memory-bounded path, and the choice of backend."""
