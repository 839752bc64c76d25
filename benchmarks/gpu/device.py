"""The device under measurement, which a dry run (`stand_in_cuda.install`) makes the CPU; whether it still answers."""

import gc

import torch

__all__ = ["NAME", "usable_after"]

NAME = "cuda"


def usable_after(error: str = "") -> bool:
    """Whether this process can go on measuring after what it did and the error that it met; memory is given back.

    A fault stays with the context and comes back from the next call, whatever name the library that met it gave it.
    """
    if "captur" in error:  # it may still be under way
        return False
    gc.collect()
    try:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.ones(1, device=NAME).add_(1).item()
    except Exception:
        return False
    return True
