"""The stand-in GPU sees what a GPU would: what the JIT compiles anew, what torch launches, what stays allocated."""

import pytest
import torch

from fmfa_losses.functional import asdm_loss
from fmfa_losses.ops import padding as _padding
from fmfa_losses.ops.backend import select_backend, why_not_triton
from fmfa_losses.ops.operator import operator

pytest.importorskip("triton", reason="the kernels need triton, which has no wheel for this platform")
import triton
import triton.language as tl
from fmfa_losses.kernels import _launch

from benchmarks import stand_in
from benchmarks.cases import Case
from benchmarks.gpu import device
from benchmarks.gpu.alone import kernels_of
from benchmarks.gpu.plan import Job
from benchmarks.gpu.worker import step_of


@triton.jit
def _specialised(x_ptr, n, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(x_ptr + at, 1.0, mask=at < n)


@triton.jit(do_not_specialize=["n"])
def _unspecialised(x_ptr, n, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(x_ptr + at, 1.0, mask=at < n)


@operator("stand_in_test(Tensor x) -> Tensor")
def _inside(x):
    return (x * 2).logsumexp(0)


def compiled(kernel, numbers):
    """Kernels that every launch compiles anew."""
    x = torch.empty(64)
    counts = []
    with stand_in.gpu() as device:
        for n in numbers:
            with device.step() as step:
                _launch.launch(kernel, (3, 2), x, n, BLOCK=16, num_warps=4)
            assert step.launches == [(kernel.__name__, (3, 2, 1))]
            counts.append(len(step.compiled))
    return counts


def test_what_is_specialised_compiles_anew():
    assert compiled(_specialised, (16, 32, 17, 19, 1, 16)) == [1, 0, 1, 0, 1, 0]
    assert compiled(_unspecialised, (16, 32, 17, 19, 1, 16)) == [1, 0, 0, 0, 0, 0]


def test_every_stand_in_starts_with_nothing_compiled():
    assert compiled(_unspecialised, (16,)) == compiled(_unspecialised, (16,)) == [1]


def test_what_the_compiler_gets():
    with stand_in.gpu() as device:
        _specialised[(1,)](torch.empty(64), 32, BLOCK=16, num_warps=2)
        _unspecialised[(1,)](torch.empty(64), 32, BLOCK=16)
    first, second = device.compiled
    assert (first.name, second.name) == ("_specialised", "_unspecialised")
    assert first.source.signature == {"x_ptr": "*fp32", "n": "i32", "BLOCK": "constexpr"}
    divisible_by_16 = [{at for at, what in kernel.source.attrs.items() if what} for kernel in device.compiled]
    assert divisible_by_16 == [{(0,), (1,)}, {(0,)}]
    assert (first.options.num_warps, second.options.num_warps) == (2, 4)
    assert first.target.arch == 90


@pytest.mark.parametrize("chip", ["sm_86", "sm_90"])
def test_compiled_for_the_chip(chip, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    with stand_in.gpu(compile=True, chip=chip) as device:
        _specialised[(1,)](torch.empty(64), 32, BLOCK=16)
    assert f".target {chip}" in device.compiled[0].binary.asm["ptx"]
    assert list(tmp_path.glob("*/_specialised.cubin"))


def operators(function):
    with stand_in.gpu() as device, device.step() as step:
        function()
    return step


def test_torch_operators_are_counted():
    x = torch.randn(4, 256)
    assert operators(lambda: x[:2].T.unsqueeze(0).expand(3, 256, 2)).device_launches == 0
    assert operators(lambda: torch.empty(3)).device_launches == 0
    assert operators(lambda: torch.zeros(3)).device_launches == 1
    assert operators(lambda: x.mul(2).add_(1)).device_launches == 2
    assert operators(lambda: x.logsumexp(1)).device_launches == 9
    assert operators(lambda: _inside(x)).device_launches == 10
    leaf = x.clone().requires_grad_()
    assert operators(lambda: (leaf * 2).sum().backward()).device_launches == 4  # *, sum; ones_like, *


def test_the_host_waits():
    x = torch.randn(4)
    assert operators(lambda: x.sum()).waits == 0
    assert operators(lambda: x.sum().item()).waits == 1
    assert operators(lambda: x.nonzero()).waits == 1


def test_bytes_and_buffers():
    x = torch.randn(256)  # 1 KiB

    def one_after_the_other():
        y = x * 2
        del y
        return x + 1

    step = operators(one_after_the_other)
    assert (step.moved, step.buffers, step.peak) == (4096, [1024, 1024], 1024)

    def both():
        y = x * 2
        return y.view(16, 16) + y.view(16, 16).T, y

    step = operators(both)
    assert (step.moved, step.buffers, step.peak) == (2048 + 3072, [1024, 1024], 2048)
    # An expanded tensor is read once.
    assert operators(lambda: x.expand(8, 256).sum(1)).moved == 1024 + 32


def test_kernels_leave_zeros():
    with stand_in.gpu() as device:
        leaf = torch.randn(6, 16).requires_grad_()
        loss = asdm_loss(leaf, leaf.detach(), torch.arange(6), backend="triton")
        assert loss == 0
        assert torch.equal(torch.autograd.grad(loss, leaf)[0], torch.zeros(6, 16))
    assert len(device.launches) >= 3


@pytest.mark.parametrize(("B", "launches", "kernels"), [(64, 5, 3), (512, 6, 5)])
def test_a_step_of_asdm_with_a_scale_on_the_device_can_be_captured(B, launches, kernels):
    """The host neither reads the scale nor waits, and a smaller batch compiles nothing."""
    with stand_in.gpu() as device:
        for n, compiled in ((B, kernels), (B - 11, 0)):
            leaves = [torch.randn(n, 32).requires_grad_() for _ in range(2)] + [torch.tensor(50.0, requires_grad=True)]
            pids = torch.arange(n)
            with device.step() as step:
                loss = asdm_loss(*leaves[:2], pids, logit_scale=leaves[2], backend="triton")
                torch.autograd.grad(loss, leaves)
            assert step.waits == 0
            assert (step.device_launches, len(step.compiled)) == (launches, compiled)


def test_a_collected_launch_keeps_no_graph(monkeypatch):
    """A graph that lives on binds its leaves to the stream it was made on: then no later step can be captured."""
    monkeypatch.setattr(device, "NAME", "cpu")
    step = step_of(Job("c", "kernels", Case("asdm", 8, D=16), precision="fp32"))
    with stand_in.gpu():
        kernels, (value, _) = kernels_of(step)
    tensors = [
        getattr(arg, "tensor", arg) for launches in kernels.values() for launch in launches for arg in launch.args
    ]
    tensors = [value, *(arg for arg in tensors if isinstance(arg, torch.Tensor))]
    assert len(tensors) > 10
    assert not any(tensor.requires_grad for tensor in tensors)


def test_an_extra_operator_is_seen():
    def step(extra):
        leaf = torch.randn(6, 16).requires_grad_()
        with stand_in.gpu() as device, device.step() as step:
            asdm_loss(leaf.abs() if extra else leaf, leaf.detach(), torch.arange(6), backend="triton")
        return step.device_launches

    assert step(extra=True) == step(extra=False) + 1


def test_everything_is_an_accelerator_inside_and_as_before_outside(monkeypatch):
    from triton import compiler
    from triton.runtime import driver

    import fmfa_losses.losses.efa

    def state():
        return (
            dict(vars(driver)), compiler.compile, _launch._Recorder.chip, fmfa_losses.losses.efa.longest,
            len(_specialised.device_caches), why_not_triton(x),
        )  # fmt: skip

    x, mask, real = torch.randn(3, 4), torch.tensor([[True, False, False]]), object()
    monkeypatch.setattr(driver, "_active" if hasattr(driver, "_active") else "active", real)  # the latter: Triton 3.4
    before = state()
    with pytest.raises(KeyError), stand_in.gpu(chip="sm_86"):
        _specialised[(1,)](x, 3, BLOCK=16)
        assert select_backend("triton", x) == "triton"
        assert _launch.chip_class(x.device) == _launch.SMALL
        assert _launch.all_registers(x.device) == {"maxnreg": 255}
        assert fmfa_losses.losses.efa.longest(mask) == 3
        raise KeyError
    with stand_in.gpu():
        assert _launch.chip_class(x.device) == _launch.LARGE
    assert state() == before
    assert driver.active is real
    assert fmfa_losses.losses.efa.longest is _padding.longest
    assert _padding.longest(mask) == 1
    with pytest.raises(RuntimeError, match="need a CUDA"):
        select_backend("triton", x)


def test_an_interpreting_process_has_no_jit(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(RuntimeError, match="a process without it"), stand_in.gpu():
        pass
