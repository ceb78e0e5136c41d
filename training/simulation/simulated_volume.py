"""A CT volume as it would have been at a fraction of its dose."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from pipelines.safety import LOWEST_HU
from pipelines.volume import Volume
from training.simulate import added_noise
from training.simulation.calibration import Calibration, calibrate, square_pixel_mm, without_padding

Array = NDArray[np.float32]


def simulate(
    volume: Volume,
    dose: float,
    seed: int,
    calibration: Calibration | None = None,
    poisson: bool = False,
    device: str = "cpu",
) -> Array:
    """HU of `volume` with the noise that is missing at the fraction `dose` of its dose.

    Parameters
    ----------
    volume
        A series at full dose, square slices.
    dose
        Fraction, 0 < dose ≤ 1; at 1 nothing changes.
    seed
        Same seed, same noise.
    calibration
        Of this series; None: `training.simulation.calibration.calibrate`.
    poisson
        As in `training.simulate.added_noise`.
    device
        Of torch.

    Returns
    -------
    numpy.ndarray
        float32 HU, (z, y, x), not rounded, and not below the lowest measured HU of the source. What `unmeasured` names
        is as it was.

    Raises
    ------
    ValueError
        If the dose is no such fraction, the slices are not square, or the series has no noise to learn from.
    """
    pixel_mm = square_pixel_mm(volume)
    found = calibrate(volume, seed, device=device) if calibration is None else calibration
    scanned = np.stack([without_padding(volume, k) for k in range(len(volume.hu))])
    noise = added_noise(
        scanned, pixel_mm, dose, seed, found.kernel, found.beam, found.overlap, found.current, poisson, device
    )
    measured = ~unmeasured(volume)
    noise[~measured] = 0
    low = volume.hu + noise
    # scanners store nothing below the lowest value of their bits, so lungs at a low dose are cut there
    floor = max(float(volume.hu[measured].min(initial=np.inf)), LOWEST_HU)
    return np.where(measured & (volume.hu >= floor), np.maximum(low, np.float32(floor)), low)


def unmeasured(volume: Volume) -> NDArray[np.bool_]:
    """Where there is no measurement, (z, y, x): padding, and the surround of the field of view where it is constant.

    Many scanners write air outside the inscribed circle without declaring it; in a real low-dose image it has no noise.
    """
    n = volume.hu.shape[-1]
    axis = np.arange(n) - (n - 1) / 2
    outside = np.hypot(axis[:, None], axis[None, :]) > n / 2 + 1
    out = volume.padding.copy()
    for plane, image in zip(out, volume.hu, strict=True):
        if outside.any() and np.ptp(image[outside]) == 0:
            plane |= outside
    return out
