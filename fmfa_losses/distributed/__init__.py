"""The global batch: the batches of all processes as one, for the losses and for your own."""

from .peers import Peers

__all__ = ["Peers"]
