"""The reference plug-in: gives back what it gets. What changes on its way through the node, the node changed."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from pipelines.base import ModelCard, Options, Progress
from pipelines.volume import Volume


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

    def denoise(self, volume: Volume, options: Options, progress: Progress) -> NDArray[np.float32]:
        """A copy of ``volume.hu``; `options` cannot change it: any blend of equal images is that image."""
        progress(0.0)
        hu = volume.hu.copy()
        progress(1.0)
        return hu
