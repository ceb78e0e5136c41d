"""What the rails of every network leave to be won and lost: two denoisers that know the answer, behind the same rails.

Beside them a network's own part can be told from that of `pipelines.safety` and of the blend: no network can come out
above the one that knows everything, and what the one that never saw the lesions gives back of them, the rails gave.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from pipelines.base import Options
from pipelines.body import inside
from pipelines.identity import Identity
from pipelines.safety import Rail, network_input
from pipelines.volume import Series
from training.measuring.cases import Trial

Array = NDArray[np.float32]

PERFECT = "perfect, behind the rails"
BLIND = "blind to lesions, behind the rails"


class Oracle(Identity):
    """Answers with the truth of a trial, whatever noise it is given.

    Parameters
    ----------
    trial
        Of simulated noise.
    sees_lesions
        Is what was inserted into the image part of the answer?
    """

    def __init__(self, trial: Trial, *, sees_lesions: bool) -> None:
        super().__init__()
        self.card = replace(self.card, name=PERFECT if sees_lesions else BLIND)
        self._trial = trial
        self._sees_lesions = sees_lesions

    def denoise(self, series: Series, options: Options) -> Iterator[Array]:
        """The truth of the measured slices, with what was inserted into the trial's image, behind the rails."""
        trial, pixel_mm = self._trial, series.geometry.spacing_mm[1]
        rail = Rail(pixel_mm, options.blend * min(options.strength, 1.0))  # there is no more noise than all
        for k in range(series.shape[0]):
            plane, place = series.plane(k), trial.scored.start + k
            given = network_input(plane)
            answer = trial.truth[place]
            # the other realisation of the noise is no lesion
            if self._sees_lesions and (trial.again is None or not np.array_equal(plane.hu, trial.again.hu[place])):
                answer = answer + (plane.hu - trial.low.hu[place])
            yield rail(plane, given, answer, inside(given, pixel_mm))
