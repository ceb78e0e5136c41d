"""Is this output a denoised version of that input? Numbers for each series, and a reason to withhold it.

A denoiser takes noise away and leaves the rest. So four things are looked at, slice by slice:

- what it did on average in each tissue (HU bias), in regions taken from a *smoothed* input: regions thresholded on the
  noisy input would show a bias that is not there;
- how much noise it left, and whether it changed more than noise;
- whether anything larger than noise moved: the *local mean* of the change over some 6 mm, against the noise at that
  place (an erased or invented lesion, another slice, a zeroed block);
- whether edges kept their slope (a blur does not).

The limits let a good denoiser pass with room; they are not a measure of its quality.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipelines.volume import Plane

TISSUES_HU = {
    "air": (-1100.0, -950.0),
    "lung": (-950.0, -500.0),
    "fat": (-140.0, -30.0),
    "soft": (0.0, 120.0),
    "bone": (250.0, 2000.0),
}
"""Ranges of the smoothed input, HU."""
MAX_BIAS_HU = {"air": 10.0, "lung": 5.0, "fat": 2.0, "soft": 2.0, "bone": 5.0}
"""Largest |mean change| over the series. Models are accepted at 1 HU in soft tissue on known truth; here the truth is
unknown. Air is lenient because scanners clip it at -1024 HU, which lifts the mean of noisy air."""
BIAS_PER_NOISE = 0.05
"""Added to a limit per HU of noise, up to twice the limit: sharp kernels ring around edges in step with their noise,
and what the ringing adds to a mean is not tissue."""
MAX_SLICE_BIAS_HU = 4.0
"""Largest |mean change| of soft tissue in one slice: an offset in few slices vanishes in the mean of many."""
MAX_NOISE_RATIO = 1.02
"""Noise after / before; the margin covers rounding."""
MAX_CHANGE_PER_NOISE = 1.25
"""RMS of the change in flat regions, in units of the noise before: all noise gone makes 1, other noise makes √2."""
MIN_NOISE_HU = 1.0
"""Noise floor for that comparison: rounding to whole HU makes 0.3 HU."""
MIN_EDGE_SLOPE = 0.7
"""Regression slope of the gradient after on the gradient before, at edges: 1 for untouched edges, 0.5 for a Gaussian
blur as wide as the edge."""
STRUCTURE_MM = 6.0
"""Width of the local mean: smaller than the smallest lesion that must never vanish (10 mm)."""
STRUCTURE_HU = 30.0
"""Change of a local mean that passes whatever the noise ..."""
STRUCTURE_NOISES = 1.5
"""... plus so many local standard deviations: correlated noise leaves 0.3 to 0.5 of them in a local mean."""
MAX_STRUCTURE_MM2 = 8.0
"""Area in one slice that may exceed both; in an erased 10 mm lesion of 100 HU it is 15 mm² and more."""
FLAT_HU = 30.0
"""Flat: the smoothed input differs by less than this, plus one noise, over STRUCTURE_MM."""
FLAT_NOISES = 2.5
"""... and its local deviation is less than so many noises: thin bones and vessel walls have even sides."""
BODY_HU = -500.0
"""The smoothed input is above: body, not air or lung, whose vessels look like noise."""
EDGE_HU = 100.0
"""Edge: the input differs by more than this, and than EDGE_NOISES, over two pixels."""
EDGE_NOISES = 6.0
MIN_VOXELS = 1000
"""Fewer voxels than this are not judged."""

_NAMES = tuple(TISSUES_HU)
_NOISE_BIN_HU = 0.5
_NOISE_BINS = 400


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the guard measured; ``dataclasses.asdict`` of it is JSON. None: too few voxels to tell."""

    withheld: str
    """Empty, or why this output must not leave: each limit that was broken."""
    bias_hu: dict[str, float] = field(default_factory=dict)
    """Mean of after - before by tissue."""
    worst_slice_bias_hu: float | None = None
    """Largest mean change of soft tissue in one slice, signed."""
    noise_before_hu: float | None = None
    """Most frequent local standard deviation in flat parts of the body (global noise level)."""
    noise_after_hu: float | None = None
    change_hu: float | None = None
    """RMS of the change in the same parts."""
    edge_slope: float | None = None
    """1: edges as before; below: blurred."""
    structure_mm2: float = 0.0
    """Largest area in one slice where the local mean moved by more than noise explains."""
    structure_slice: int | None = None
    """Where that is."""
    not_finite: int = 0
    """Voxels that are no number."""
    padding_changed: int = 0
    """Voxels without measurement that were touched."""


class Guard:
    """Compares what a pipeline returned with what it was given, slice by slice; memory of one slice.

    Parameters
    ----------
    pixel_mm
        Pixel size, (rows, columns).
    """

    def __init__(self, pixel_mm: tuple[float, float]) -> None:
        self.pixel_mm2 = pixel_mm[0] * pixel_mm[1]
        # a power of two, so that a box is a few additions; at least 4, or there is no local deviation to speak of
        self.width = max(4, 2 ** int(math.log2(max(4.0, STRUCTURE_MM / math.sqrt(self.pixel_mm2)))))
        self.sums = np.zeros(len(_NAMES) + 1)
        self.counts = np.zeros(len(_NAMES) + 1, dtype=np.int64)
        self.noise = np.zeros((2, _NOISE_BINS), dtype=np.int64)
        self.flat_squares, self.flat_variances, self.flat_count = 0.0, 0.0, 0
        self.edge_products, self.edge_squares, self.edge_count = 0.0, 0.0, 0
        self.worst_slice_bias: float | None = None
        self.structure_mm2, self.structure_slice = 0.0, None
        self.not_finite = self.padding_changed = 0

    structure_slice: int | None

    def add(self, k: int, plane: Plane, after: NDArray[np.float32]) -> None:
        """Add slice `k`: as it came, and the output, HU (y, x)."""
        before, padding = plane
        infinite = after.size - int(np.count_nonzero(np.isfinite(after)))
        if infinite:
            self.not_finite += infinite
            return
        padded = bool(padding.any())
        if padded:
            self.padding_changed += int(np.count_nonzero((before != after) & padding))
            before, after = np.where(padding, np.float32(-1000), before), np.where(padding, np.float32(-1000), after)
        if min(before.shape) < 2 * self.width:
            return
        change = after - before
        w = self.width
        mean, deviation = _local(before, w)
        mean_after, deviation_after = _local(after, w)
        moved = mean_after - mean
        measured = ~padding[w // 2 : w // 2 + mean.shape[0], w // 2 : w // 2 + mean.shape[1]]
        inner = change[w // 2 : w // 2 + mean.shape[0], w // 2 : w // 2 + mean.shape[1]]

        too_far = np.abs(moved) > STRUCTURE_HU + STRUCTURE_NOISES * deviation
        area = float(np.count_nonzero(too_far & measured)) * self.pixel_mm2
        if area > self.structure_mm2:
            self.structure_mm2, self.structure_slice = area, k

        level = _noise_level(mean, deviation)
        flat = _flat(mean, w, FLAT_HU + level) & (deviation < FLAT_NOISES * max(level, MIN_NOISE_HU)) & measured
        labels = _labels(mean)
        labels[~flat] = len(_NAMES)
        sums = np.bincount(labels.ravel(), weights=inner.ravel(), minlength=len(_NAMES) + 1)
        counts = np.bincount(labels.ravel(), minlength=len(_NAMES) + 1)
        self.sums += sums
        self.counts += counts
        soft = _NAMES.index("soft")
        if counts[soft] >= MIN_VOXELS:
            bias = float(sums[soft] / counts[soft])
            if self.worst_slice_bias is None or abs(bias) > abs(self.worst_slice_bias):
                self.worst_slice_bias = bias

        body = flat & (mean > BODY_HU)
        for row, values in enumerate((deviation, deviation_after)):
            bins = np.minimum(values[body] / _NOISE_BIN_HU, _NOISE_BINS - 1).astype(np.intp)
            self.noise[row] += np.bincount(bins, minlength=_NOISE_BINS)
        squares = inner[body].astype(np.float64)
        self.flat_squares += _sum_of_products(squares, squares)
        # In the same places: noise differs by half from the rim of a body to its centre; the mode is that of the rim.
        variances = deviation[body].astype(np.float64)
        self.flat_variances += _sum_of_products(variances, variances)
        self.flat_count += squares.size

        limit = max(EDGE_HU, EDGE_NOISES * level)
        for axis in (0, 1):
            slope = _difference(before, axis)
            edge = np.abs(slope) > limit
            if padded:
                edge &= ~(_difference(padding.astype(np.int8), axis) != 0)
            there = slope[edge].astype(np.float64)
            self.edge_products += _sum_of_products(there, _difference(after, axis)[edge].astype(np.float64))
            self.edge_squares += _sum_of_products(there, there)
            self.edge_count += there.size

    def verdict(self) -> Verdict:
        """Divide, compare with the limits, and say what was broken."""
        reasons: list[str] = []

        def limit(broken: bool, reason: str) -> None:
            if broken:
                reasons.append(reason)

        limit(self.not_finite > 0, f"{self.not_finite} voxels are no number")
        limit(self.padding_changed > 0, f"{self.padding_changed} voxels outside the field of view were changed")
        bias = {
            name: float(self.sums[i] / self.counts[i]) for i, name in enumerate(_NAMES) if self.counts[i] >= MIN_VOXELS
        }
        noise_before = noise_after = change = None
        if self.flat_count >= MIN_VOXELS:
            noise_before, noise_after = _most_frequent(self.noise[0]), _most_frequent(self.noise[1])
            change = math.sqrt(self.flat_squares / self.flat_count)
            limit(
                noise_after > MAX_NOISE_RATIO * noise_before + _NOISE_BIN_HU,
                f"noise grew from {noise_before:.1f} to {noise_after:.1f} HU",
            )
            there = math.sqrt(self.flat_variances / self.flat_count)
            limit(
                change > MAX_CHANGE_PER_NOISE * max(there, MIN_NOISE_HU),
                f"flat regions changed by {change:.1f} HU where there was noise of {there:.1f} HU",
            )
        for name, value in bias.items():
            most = MAX_BIAS_HU[name] + min(BIAS_PER_NOISE * (noise_before or 0.0), MAX_BIAS_HU[name])
            limit(abs(value) > most, f"mean HU of {name} moved by {value:+.1f} (limit {most:.1f})")
        worst = self.worst_slice_bias
        limit(
            worst is not None and abs(worst) > MAX_SLICE_BIAS_HU,
            f"mean HU of soft tissue moved by {worst or 0:+.1f} in one slice (limit {MAX_SLICE_BIAS_HU:g})",
        )
        slope = self.edge_products / self.edge_squares if self.edge_count >= MIN_VOXELS else None
        limit(
            slope is not None and slope < MIN_EDGE_SLOPE,
            f"edges kept {100 * (slope or 0):.0f} % of their slope (limit {100 * MIN_EDGE_SLOPE:.0f} %)",
        )
        limit(
            self.structure_mm2 > MAX_STRUCTURE_MM2,
            f"{self.structure_mm2:.0f} mm² of slice {self.structure_slice} moved by more than noise explains",
        )
        return Verdict(
            withheld="; ".join(reasons),
            bias_hu=bias,
            worst_slice_bias_hu=worst,
            noise_before_hu=noise_before,
            noise_after_hu=noise_after,
            change_hu=change,
            edge_slope=slope,
            structure_mm2=self.structure_mm2,
            structure_slice=self.structure_slice,
            not_finite=self.not_finite,
            padding_changed=self.padding_changed,
        )


def _box(image: NDArray[np.float32], width: int) -> NDArray[np.float32]:
    """Sums over all width x width squares; `width` a power of two; (y - width + 1, x - width + 1)."""
    reach = 1
    while reach < width:
        image = image[:-reach] + image[reach:]
        image = image[:, :-reach] + image[:, reach:]
        reach *= 2
    return image


def _local(image: NDArray[np.float32], width: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Mean and standard deviation in all width x width squares, HU."""
    n = np.float32(width * width)
    mean = _box(image, width)
    mean /= n
    variance = _box(image * image, width)
    variance /= n
    variance -= mean * mean
    np.maximum(variance, 0, out=variance)
    return mean, np.sqrt(variance, out=variance)


def _noise_level(mean: NDArray[np.float32], deviation: NDArray[np.float32]) -> float:
    """Lower quartile of the local deviation in the body, HU: edges fill the upper part. From every 16th pixel."""
    sample = deviation[::4, ::4][mean[::4, ::4] > BODY_HU]
    return float(np.percentile(sample, 25)) if sample.size else 0.0


def _flat(mean: NDArray[np.float32], reach: int, limit: float) -> NDArray[np.bool_]:
    """Where the smoothed image differs by less than `limit` from itself `reach` pixels further, both ways."""
    flat = np.ones(mean.shape, dtype=np.bool_)
    half = reach // 2
    for axis in (0, 1):
        a = np.moveaxis(mean, axis, 0)
        step = np.abs(a[reach:] - a[:-reach]) < limit
        view = np.moveaxis(flat, axis, 0)
        view[half : half + step.shape[0]] &= step
        view[:half] = False
        view[half + step.shape[0] :] = False
    return flat


def _labels(mean: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Index of the tissue of each pixel; len(TISSUES_HU) where none."""
    labels = np.full(mean.shape, len(_NAMES), dtype=np.uint8)
    for i, (low, high) in enumerate(TISSUES_HU.values()):
        labels[(mean >= low) & (mean < high)] = i
    return labels


def _difference(image: NDArray[Any], axis: int) -> NDArray[Any]:
    """Central difference over two pixels."""
    difference: NDArray[Any] = image[2:] - image[:-2] if axis == 0 else image[:, 2:] - image[:, :-2]
    return difference


def _sum_of_products(a: NDArray[np.float64], b: NDArray[np.float64]) -> float:
    """Of two vectors, without BLAS: its threads spin for a while after each product, on the cores of the network."""
    return float(np.einsum("i,i->", a, b))


def _most_frequent(histogram: NDArray[np.int64]) -> float:
    """Position of the maximum of a histogram of local deviations, smoothed over five bins; HU."""
    smooth = np.convolve(histogram[:-1], np.ones(5), mode="same")  # the last bin holds everything above
    return float((int(smooth.argmax()) + 0.5) * _NOISE_BIN_HU)
