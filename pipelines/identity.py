"""The reference plug-in: gives back what it gets. What changes on its way through the node, the node changed."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from pipelines.base import Execution, ModelCard, Options
from pipelines.volume import Series


class Identity:
    """Returns its input, to the last bit."""

    card = ModelCard(
        name="identity",
        version="1",
        paper="",
        doi="",
        input="slice",
        patch_zyx=(1, 1, 1),
        overlap_zyx=(0, 0, 0),
        hu_window=(-32768.0, 65535.0),
        precision="none",
        weights_sha256="",
    )

    def __init__(self, execution: Execution | None = None) -> None:
        """Nothing is computed, so `execution` is the same whatever it says."""

    def denoise(self, series: Series, options: Options) -> Iterator[NDArray[np.float32]]:
        """A copy of every slice; `options` cannot change it: any blend of equal images is that image."""
        return (series.plane(k).hu.copy() for k in range(series.shape[0]))
