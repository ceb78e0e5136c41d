"""The reference plug-in."""

from __future__ import annotations

import numpy as np

from pipelines.base import Options, load
from pipelines.testing import water_volume


def test_identity_gives_back_every_bit() -> None:
    volume = water_volume((3, 9, 7), padding_hu=-3024)
    volume.hu[1, 2, 3] = np.float32(0.1)
    pipeline = load("identity")
    out = list(pipeline.denoise(volume, Options(strength=1.5, blend=0.3)))
    np.testing.assert_array_equal(np.stack(out).view(np.uint32), volume.hu.view(np.uint32))
    assert not any(np.shares_memory(plane, volume.hu) for plane in out)


def test_its_card_says_that_nothing_is_computed() -> None:
    card = load("identity").card
    assert (card.name, card.precision, card.weights_sha256, card.input) == ("identity", "none", "", "slice")
