"""The global batch: the batch of all processes as one, for the losses and for your own."""

from .peers import Peers, meet

__all__ = ["Peers", "meet"]
