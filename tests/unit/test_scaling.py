"""One pair of functions between HU and network units."""

from __future__ import annotations

import numpy as np
import torch

from pipelines.scaling import to_hu, to_network


def test_air_water_bone() -> None:
    hu = np.array([-1000, 0, 1000, 8000], np.float32)
    assert to_network(hu).tolist() == [-1, 0, 1, 8]
    assert to_network(hu).dtype == np.float32


def test_back_again() -> None:
    hu = torch.linspace(-1024, 3071, 4096)
    assert torch.allclose(to_hu(to_network(hu)), hu, rtol=0, atol=1e-3)
