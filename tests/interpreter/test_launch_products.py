"""What benchmarks/launch_products.py says that kernels multiply is what Triton's interpreter multiplies."""

import sys
from collections import Counter

import pytest
import torch
from fmfa_losses.kernels import aggregation, alignment
from triton.runtime import interpreter

from benchmarks.launch_products import GATHERS, PRODUCTS, Call

LENGTHS = {"captions": [5, 19, 0, 40, 12, 33], "full": [40] * 6, "none": [0] * 6}


@pytest.mark.parametrize("dtype", [torch.float16])
@pytest.mark.parametrize("name", LENGTHS)
def test_real_lengths(monkeypatch, name, dtype):
    B, N, L, D = 6, 20, 40, 64
    lengths = {L: LENGTHS[name]}
    mask = torch.arange(L) < torch.tensor(LENGTHS[name])[:, None]
    executed, predicted = Counter(), Counter()
    now = []
    dot = interpreter.InterpreterBuilder.create_dot

    def counted(self, a, b, *rest):
        executed[now[-1]] += a.data.shape[0] * a.data.shape[1] * b.data.shape[1]
        return dot(self, a, b, *rest)

    def launched(kernel, grid, *args, launch=aggregation.launch, **options):
        now.append(kernel.__name__)
        call = Call(kernel, grid, dict(zip(kernel.arg_names, args, strict=False)) | options, lengths)
        if call.name in PRODUCTS.keys() - GATHERS:
            predicted[call.name] += PRODUCTS[call.name].executed(call)
        launch(kernel, grid, *args, **options)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", counted)
    for module in modules_that_launch():
        monkeypatch.setattr(module, "launch", launched)
    image, text = torch.randn(B, N, D, dtype=dtype), torch.randn(B, L, D, dtype=dtype)
    *sims, saved = alignment.forward(image, text, None, mask, None, "lse", 1.0, True)
    alignment.backward(*(torch.ones_like(sim) for sim in sims), saved, image, text, None, mask, None, "lse")
    assert {"_forward_kernel", "_packed_match_kernel", "_products_kernel", "_rows_kernel"} <= predicted.keys()
    assert {kernel: executed[kernel] for kernel in predicted} == dict(predicted)


def modules_that_launch():
    return [
        module
        for name, module in sys.modules.items()
        if name.startswith("fmfa_losses.kernels.") and not name.endswith("._launch") and hasattr(module, "launch")
    ]
