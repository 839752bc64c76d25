import sys
from pathlib import Path

import pytest
import torch

# The checkout's tests import each other's helpers by plain name, whatever directory pytest was started from.
sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
