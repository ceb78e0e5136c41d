"""All features of one region of one volume."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from training.radiomics import texture

Floats = NDArray[np.float64]

FIRST_ORDER = (
    "Energy",
    "TotalEnergy",
    "Entropy",
    "Minimum",
    "10Percentile",
    "90Percentile",
    "Maximum",
    "Mean",
    "Median",
    "InterquartileRange",
    "Range",
    "MeanAbsoluteDeviation",
    "RobustMeanAbsoluteDeviation",
    "RootMeanSquared",
    "Skewness",
    "Kurtosis",
    "Variance",
    "Uniformity",
)
FEATURES: tuple[str, ...] = tuple(
    f"{family}_{name}"
    for family, names in (
        ("firstorder", FIRST_ORDER),
        ("glcm", texture.GLCM),
        ("glrlm", texture.GLRLM),
        ("glszm", texture.GLSZM),
    )
    for name in names
)
"""All 74, in the order of `features`."""

# Not in the classical eleven of Galloway 1975, Chu 1990 and Dasarathy 1991, nor in those of Thibault 2009
_LATER = (
    "GrayLevelNonUniformityNormalized",
    "RunLengthNonUniformityNormalized",
    "SizeZoneNonUniformityNormalized",
    "GrayLevelVariance",
    "RunVariance",
    "ZoneVariance",
    "RunEntropy",
    "ZoneEntropy",
)
_LEFT_OUT = frozenset(
    {
        "firstorder_TotalEnergy",
        "firstorder_Range",
        "firstorder_RobustMeanAbsoluteDeviation",
        "glcm_SumAverage",
        "glcm_MCC",
        "glcm_Imc2",
        "glcm_Id",
    }
    | {f"{family}_{name}" for family in ("glrlm", "glszm") for name in _LATER}
)
PRESET_57: tuple[str, ...] = tuple(name for name in FEATURES if name not in _LEFT_OUT)
"""57 features of the same four families as the STResNet paper's Figure 2. The paper does not list its 57; this choice
is ours: first order 15, GLCM 20, and the classical eleven each of GLRLM and GLSZM."""


def features(
    hu: NDArray[Any],
    mask: NDArray[np.bool_],
    *,
    bin_width_hu: float = 25.0,
    bins: int | None = None,
    voxel_mm3: float = 1.0,
) -> dict[str, float]:
    """The 74 features of a region.

    Nothing is resampled, normalised or clipped. GLCM and GLRLM features are means over the directions, see `texture`.

    Parameters
    ----------
    hu
        (z, y, x) HU. Directions are counted in voxels: without isotropic voxels they mean different lengths.
    mask
        (z, y, x), True in the region.
    bin_width_hu
        Width of a grey level; level 1 begins at the multiple of it at or below the lowest HU of the region.
    bins
        If given, this number of grey levels between the lowest and the highest HU of the region instead.
    voxel_mm3
        Volume of a voxel; only ``firstorder_TotalEnergy`` depends on it.

    Returns
    -------
    dict
        ``family_Feature`` to value, in the order of `FEATURES`; all finite.

    Raises
    ------
    ValueError
        If the shapes differ, the mask is empty, has one voxel only or no two that touch, a value in it is not finite,
        or the grey levels are none.
    """
    if mask.dtype != np.bool_ or hu.ndim != 3 or hu.shape != mask.shape:
        raise ValueError(
            f"expected (z, y, x) HU and a boolean mask of that shape, got {hu.shape}, {mask.dtype} {mask.shape}"
        )
    values = hu[mask].astype(np.float64)
    if values.size == 0:
        raise ValueError("the mask is empty: there is no region to describe. Check that it lies on this series' grid")
    if values.size == 1:
        raise ValueError("the mask has one voxel: texture needs neighbours. Leave this region out or enlarge it")
    if not np.isfinite(values).all():
        raise ValueError(
            f"{np.count_nonzero(~np.isfinite(values))} of {values.size} voxels of the region are not finite"
        )
    inside = _discretise(values, bin_width_hu, bins)
    box = tuple(slice(int(at.min()), int(at.max()) + 1) for at in np.nonzero(mask))
    cropped = np.pad(mask[box], 1)
    levels = np.zeros(cropped.shape, np.intp)
    levels[cropped] = inside
    steps = texture.steps(levels)
    if not steps:
        raise ValueError(f"none of the {values.size} voxels of the mask touch: texture needs neighbours. Leave it out")
    families = (
        ("firstorder", _first_order(values, inside, voxel_mm3)),
        ("glcm", texture.glcm(levels, steps)),
        ("glrlm", texture.glrlm(levels, steps)),
        ("glszm", texture.glszm(levels)),
    )
    return {f"{family}_{name}": value for family, of in families for name, value in of.items()}


def _discretise(values: Floats, width: float, bins: int | None) -> NDArray[np.intp]:
    """Grey levels from 1: fixed bin size (IBSI code Q3RU, edges as pyradiomics) or fixed bin number (K15C)."""
    low, high = float(values.min()), float(values.max())
    if bins is None:
        if not (width > 0 and math.isfinite(width)):
            raise ValueError(f"a grey level must be wider than 0 HU, got {width}")
        return (np.floor(values / width) - math.floor(low / width)).astype(np.intp) + 1
    if bins < 1:
        raise ValueError(f"at least one grey level is needed, got {bins}")
    if low == high:
        return np.ones(values.size, np.intp)
    return np.minimum(np.floor(bins * ((values - low) / (high - low))), bins - 1).astype(np.intp) + 1


def _first_order(x: Floats, levels: NDArray[np.intp], voxel_mm3: float) -> dict[str, float]:
    """First order features of the HU `x`, entropy and uniformity of their grey levels (IBSI sections 3.3 and 3.4)."""
    p = np.bincount(levels) / levels.size
    p10, p25, median, p75, p90 = np.percentile(x, (10, 25, 50, 75, 90)).tolist()
    mean, energy = float(x.mean()), float(np.sum(x * x))
    away = x - mean
    variance = float(np.mean(away**2))
    middle = x[(x >= p10) & (x <= p90)]
    flat = x.min() == x.max()  # the variance of equal values need not come out as 0
    values = (
        energy,
        energy * voxel_mm3,
        texture.entropy(p),
        float(x.min()),
        p10,
        p90,
        float(x.max()),
        mean,
        median,
        p75 - p25,
        float(x.max() - x.min()),
        float(np.mean(abs(away))),
        float(np.mean(abs(middle - middle.mean()))),
        math.sqrt(energy / x.size),
        0.0 if flat else float(np.mean(away**3)) / variance**1.5,
        0.0 if flat else float(np.mean(away**4)) / variance**2,
        variance,
        float(np.sum(p * p)),
    )
    return dict(zip(FIRST_ORDER, values, strict=True))
