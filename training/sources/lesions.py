"""Faint lesions for training images: without them a network learns that what is small and faint is noise."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from training.tissues import smoothed

Array = NDArray[np.float32]

DIAMETER_MM = (3.0, 20.0)
CONTRAST_HU = (8.0, 80.0)
"""Both drawn log-uniformly; half of the lesions are darker than what is around them."""
TISSUE_HU = (-130.0, 200.0)
"""Where lesions are put: fat, muscle, organs."""
EDGE_MM = 0.4
"""Over which the edge of a lesion rises from a quarter to three quarters of its contrast, about."""
PER_LITRE = 80.0
"""Lesions per litre of that tissue."""


def add_lesions(
    hu: Array, voxel_mm: tuple[float, float, float], rng: np.random.Generator, noisy: bool = False
) -> Array:
    """`hu` with ellipsoids of a faint contrast at random places.

    Parameters
    ----------
    hu
        (z, y, x); not changed.
    voxel_mm
        Distances of slices, rows and columns.
    rng
        Everything random.
    noisy
        Find the tissue in the smoothed image: a threshold on the noise leaves holes in the lesions.
    """
    out = hu.copy()
    seen = smoothed(hu, voxel_mm[2]) if noisy else hu
    tissue = (seen > TISSUE_HU[0]) & (seen < TISSUE_HU[1])
    places = np.flatnonzero(tissue)
    litres = len(places) * float(np.prod(voxel_mm)) * 1e-6
    size = np.array(hu.shape)
    for place in rng.choice(places, rng.poisson(PER_LITRE * litres)) if len(places) else ():
        centre = np.array(np.unravel_index(place, hu.shape))
        radii_mm = np.exp(rng.uniform(*np.log(DIAMETER_MM))) / 2 * rng.uniform(0.75, 1.3, 3)
        contrast = np.exp(rng.uniform(*np.log(CONTRAST_HU))) * rng.choice((-1, 1))
        reach = np.ceil((radii_mm + 3 * EDGE_MM) / voxel_mm).astype(int)
        low, high = np.maximum(centre - reach, 0), np.minimum(centre + reach + 1, size)
        axes = (np.arange(a, b) - c for a, b, c in zip(low, high, centre, strict=True))
        grid = np.meshgrid(*axes, indexing="ij", sparse=True)
        distance = np.sqrt(sum((g * mm / r) ** 2 for g, mm, r in zip(grid, voxel_mm, radii_mm, strict=True)))
        inside = 1 / (1 + np.exp(np.clip((distance - 1) * radii_mm.mean() / (EDGE_MM / 2.2), -30, 30)))
        box = tuple(slice(a, b) for a, b in zip(low, high, strict=True))
        # never across the edge of an organ of air or bone
        out[box] += np.where(tissue[box], contrast * inside, 0).astype(np.float32)
    return out
