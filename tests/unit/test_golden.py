"""The deviation between two precisions, by pipelines that differ by what is known."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from pipelines.base import Options
from pipelines.golden import MARGIN, SHAPE, Deviation, deviation
from pipelines.identity import Identity
from pipelines.volume import Series


class _Shifted(Identity):
    """Adds 3 HU to the first slice."""

    def denoise(self, series: Series, options: Options) -> Iterator[NDArray[np.float32]]:
        for k, plane in enumerate(super().denoise(series, options)):
            yield plane + np.float32(3 * (k == 0))


def test_deviation_of_a_known_difference() -> None:
    found = deviation(_Shifted(), Identity())
    assert math.isclose(found.max_hu, 3, rel_tol=1e-3)  # values are rounded where they are large
    assert math.isclose(found.rms_hu, 3 / math.sqrt(SHAPE[0]), rel_tol=1e-3)


def test_both_bounds_hold_and_nothing_compares_with_no_number() -> None:
    bound = Deviation(4.0, 1.0).bound
    assert bound == (4 * MARGIN, MARGIN)
    assert Deviation(8.0, 2.0).within(bound)
    assert not Deviation(8.1, 2.0).within(bound)
    assert not Deviation(8.0, 2.1).within(bound)
    assert not Deviation(math.nan, 2.0).within(bound)
