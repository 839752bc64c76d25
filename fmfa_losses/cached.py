"""`fmfa_losses.cached.cached_backward`: the public path of `fmfa_losses.distributed.grad_cache`."""

from .distributed.grad_cache import cached_backward as cached_backward
