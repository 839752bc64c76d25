import pytest
import torch

import benchmarks  # noqa: F401, a checkout that is not installed finds its kernels


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
