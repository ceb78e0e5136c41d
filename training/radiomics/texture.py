"""Texture of a volume of grey levels: co-occurrence, runs and zones (IBSI reference manual, sections 3.6 to 3.8).

Every function takes grey levels of 1 and more, (z, y, x), 0 outside the region, with a border of one 0 all around.
Matrices are volumetric, at distance 1. GLCM and GLRLM features are computed for each of the 13 directions and then
averaged ("3D, averaged", IBSI code ITBB); there is one GLSZM of 26-connected zones ("3D", code KOBO).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

Levels = NDArray[np.intp]
Floats = NDArray[np.float64]

GLCM = (
    "Autocorrelation",
    "JointAverage",
    "ClusterProminence",
    "ClusterShade",
    "ClusterTendency",
    "Contrast",
    "Correlation",
    "DifferenceAverage",
    "DifferenceEntropy",
    "DifferenceVariance",
    "JointEnergy",
    "JointEntropy",
    "Imc1",
    "Imc2",
    "Idm",
    "MCC",
    "Idmn",
    "Id",
    "Idn",
    "InverseVariance",
    "MaximumProbability",
    "SumAverage",
    "SumEntropy",
    "SumSquares",
)
# the same sixteen formulas, of runs and of zones, in the order of `_emphases`
GLRLM = (
    "ShortRunEmphasis",
    "LongRunEmphasis",
    "GrayLevelNonUniformity",
    "GrayLevelNonUniformityNormalized",
    "RunLengthNonUniformity",
    "RunLengthNonUniformityNormalized",
    "RunPercentage",
    "GrayLevelVariance",
    "RunVariance",
    "RunEntropy",
    "LowGrayLevelRunEmphasis",
    "HighGrayLevelRunEmphasis",
    "ShortRunLowGrayLevelEmphasis",
    "ShortRunHighGrayLevelEmphasis",
    "LongRunLowGrayLevelEmphasis",
    "LongRunHighGrayLevelEmphasis",
)
GLSZM = (
    "SmallAreaEmphasis",
    "LargeAreaEmphasis",
    "GrayLevelNonUniformity",
    "GrayLevelNonUniformityNormalized",
    "SizeZoneNonUniformity",
    "SizeZoneNonUniformityNormalized",
    "ZonePercentage",
    "GrayLevelVariance",
    "ZoneVariance",
    "ZoneEntropy",
    "LowGrayLevelZoneEmphasis",
    "HighGrayLevelZoneEmphasis",
    "SmallAreaLowGrayLevelEmphasis",
    "SmallAreaHighGrayLevelEmphasis",
    "LargeAreaLowGrayLevelEmphasis",
    "LargeAreaHighGrayLevelEmphasis",
)

_DIRECTIONS = tuple(d for d in product((-1, 0, 1), repeat=3) if d > (0, 0, 0))
"""(z, y, x); one of each of the 13 opposite pairs."""
_TOUCHING = np.ones((3, 3, 3), np.bool_)


def entropy(p: NDArray[Any]) -> float:
    """``−Σ p·log2 p`` in bits, of probabilities of any shape."""
    occurring = p[p > 0]
    return float(np.sum(occurring * np.log2(1 / occurring)))


def steps(levels: Levels) -> list[int]:
    """Of each direction along which voxels of the region are neighbours, its step in the flattened array.

    The others (two thirds of them, where a region is one slice thick) have neither pairs nor runs to speak of, and no
    part in an average; pyradiomics leaves them out too.
    """
    flat = levels.ravel()
    roi = np.flatnonzero(flat)
    _, rows, columns = levels.shape
    every = ((z * rows + y) * columns + x for z, y, x in _DIRECTIONS)
    return [step for step in every if flat[roi + step].any()]


def glcm(levels: Levels, steps: Sequence[int]) -> dict[str, float]:
    """The grey level co-occurrence features: means over `steps` of the features of each symmetric matrix."""
    flat = levels.ravel()
    roi = np.flatnonzero(flat)
    grey, row = np.unique(flat[roi], return_inverse=True)
    row_of = np.full(flat.size, -1, np.intp)
    row_of[roi] = row
    of_steps = []
    for step in steps:
        neighbour = row_of[roi + step]
        paired = neighbour >= 0
        counts = np.bincount(row[paired] * grey.size + neighbour[paired], minlength=grey.size**2)
        counts = counts.reshape(grey.size, grey.size)
        of_steps.append(_co_occurrence((counts + counts.T) / (2 * counts.sum()), grey))
    return dict(zip(GLCM, np.mean(of_steps, axis=0).tolist(), strict=True))


def _co_occurrence(p: Floats, grey: Levels) -> tuple[float, ...]:
    """Features in the order of `GLCM` of the symmetric probabilities `p` of pairs of the grey levels `grey`."""
    i, j = grey[:, None], grey[None, :]
    marginal = p.sum(axis=1)  # symmetric: of the rows and of the columns
    mean = float(marginal @ grey)
    variance = float(marginal @ (grey - mean) ** 2)
    covariance = float(np.sum(p * (i - mean) * (j - mean)))
    of_sum = np.bincount((i + j).ravel(), p.ravel())
    of_difference = np.bincount(abs(i - j).ravel(), p.ravel())
    s, d = np.arange(of_sum.size), np.arange(of_difference.size)
    difference_mean = float(of_difference @ d)
    from_mean = s - 2 * mean
    levels = int(grey[-1])
    joint = entropy(p)
    single = entropy(marginal)
    # HXY1 = HXY2 = HX + HY, by the definition of the marginals; rounding may bring the information just below 0
    information = max(2 * single - joint, 0.0)
    return (
        float(np.sum(p * i * j)),
        mean,
        float(of_sum @ from_mean**4),
        float(of_sum @ from_mean**3),
        float(of_sum @ from_mean**2),
        float(of_difference @ d**2),
        covariance / variance if variance > 0 else 1.0,
        difference_mean,
        entropy(of_difference),
        float(of_difference @ (d - difference_mean) ** 2),
        float(np.sum(p * p)),
        joint,
        -information / single if single > 0 else 0.0,
        float(np.sqrt(-np.expm1(-2 * information))),
        float(of_difference @ (1 / (1 + d**2))),
        _maximal_correlation(p, marginal),
        float(of_difference @ (1 / (1 + (d / levels) ** 2))),
        float(of_difference @ (1 / (1 + d))),
        float(of_difference @ (1 / (1 + d / levels))),
        float(of_difference[1:] @ (1 / d[1:] ** 2.0)),
        float(p.max()),
        float(of_sum @ s),
        entropy(of_sum),
        variance,
    )


def _maximal_correlation(p: Floats, marginal: Floats) -> float:
    """Square root of the second eigenvalue of Haralick's Q (Haralick et al. 1973, f14).

    Taken as the second singular value of ``p(i, j) / √(p(i)·p(j))``: the squares of its singular values are the
    eigenvalues of Q, which itself is not symmetric, so that rounding can make its eigenvalues complex.
    """
    if marginal.size == 1:
        return 1.0
    root = np.sqrt(np.outer(marginal, marginal))
    scaled = np.divide(p, root, out=np.zeros_like(p), where=root > 0)
    return float(np.linalg.svd(scaled, compute_uv=False)[1])


def glrlm(levels: Levels, steps: Sequence[int]) -> dict[str, float]:
    """The grey level run length features: means over `steps` of the features of each."""
    flat = levels.ravel()
    roi = np.flatnonzero(flat)
    of_steps = [_emphases(*_runs(flat, roi, step), roi.size) for step in steps]
    return dict(zip(GLRLM, np.mean(of_steps, axis=0).tolist(), strict=True))


def _runs(flat: Levels, roi: Levels, step: int) -> tuple[Levels, Levels]:
    """Grey level and length of every run of equal voxels along `step`."""
    starts = roi[flat[roi - step] != flat[roi]]
    grey = flat[starts]
    length = np.ones(starts.size, np.intp)
    going_on = np.arange(starts.size)
    while going_on.size:
        at = starts[going_on] + length[going_on] * step
        going_on = going_on[flat[at] == grey[going_on]]
        length[going_on] += 1
    return grey, length


def glszm(levels: Levels) -> dict[str, float]:
    """The grey level size zone features."""
    grey: list[int] = []
    sizes: list[int] = []
    for level in np.unique(levels[levels > 0]).tolist():
        zones, count = ndimage.label(levels == level, _TOUCHING)
        grey += [level] * count
        sizes += np.bincount(zones.ravel())[1:].tolist()
    values = _emphases(np.array(grey), np.array(sizes), int(np.count_nonzero(levels)))
    return dict(zip(GLSZM, values, strict=True))


def _emphases(grey: Levels, size: Levels, voxels: int) -> tuple[float, ...]:
    """Features in the order of `GLRLM` and `GLSZM` of runs or zones.

    Parameters
    ----------
    grey, size
        Grey level and number of voxels of each run or zone, (n,).
    voxels
        Voxels of the region.
    """
    n = grey.size
    i2, j2 = grey.astype(np.float64) ** 2, size.astype(np.float64) ** 2
    grey_squares = float(np.sum(np.bincount(grey).astype(np.float64) ** 2))
    size_squares = float(np.sum(np.bincount(size).astype(np.float64) ** 2))
    _, joint = np.unique(np.stack((grey, size)), axis=1, return_counts=True)
    return (
        float(np.mean(1 / j2)),
        float(np.mean(j2)),
        grey_squares / n,
        grey_squares / n**2,
        size_squares / n,
        size_squares / n**2,
        n / voxels,
        float(np.var(grey)),
        float(np.var(size)),
        entropy(joint / n),
        float(np.mean(1 / i2)),
        float(np.mean(i2)),
        float(np.mean(1 / (i2 * j2))),
        float(np.mean(i2 / j2)),
        float(np.mean(j2 / i2)),
        float(np.mean(i2 * j2)),
    )
