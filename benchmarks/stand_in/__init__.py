"""A GPU that needs no GPU: every launch goes through Triton's own JIT, and nothing runs.

    from benchmarks import stand_in

    with stand_in.gpu() as device:
        with device.step() as step:
            efa_loss(image, text, backend="triton").backward()      # small tensors on the CPU
    step.launches       # (kernel, grid) of every Triton launch
    step.compiled       # what the JIT had to compile for them: signature, constants, options; the binary if asked
    step.operators      # torch operators that a GPU would run, with the kernels behind each and the bytes they move
    step.buffers        # bytes of every allocation

Triton specialises a kernel on its arguments (type, divisibility by 16, the value 1, None) and compiles it anew for
every combination. What it does here is what it does on a GPU of the given chip: the driver alone is replaced, by one
that knows the chip's name and has nothing to launch with. With `compile=True` every kernel is
compiled, too, and lands in Triton's cache under the key that it has on that GPU.

No kernel writes its results: memory is zero where it was allocated, so that what torch makes of it stays finite and in
range. Figures that depend on values mean nothing; no figure here does.

TRITON_INTERPRET=1 replaces the JIT by an interpreter when a kernel is imported. The stand-in then refuses, and tests of
both need a process each.
"""

from .device import Compiled, Device, Launched, gpu
from .step import Operator, Step

__all__ = ["Compiled", "Device", "Launched", "Operator", "Step", "gpu"]
