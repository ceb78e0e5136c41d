"""How many photons each ray counts, and the noise of the logarithm of that count.

Bow-tie and tube current as functions of the parallel ray: the ray at distance t from the axis is the ray of the fan at
``γ = asin(t/SOD)`` whose source stands at ``θ − γ``, and half a turn later at ``θ + γ + 180°``. Variances after
Naziroglu et al., Phys Med 2017;36:12-23, and Zeng et al., IEEE Trans Nucl Sci 2015;62:2226-2233.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from training.simulation.projection import MU_WATER_PER_MM, Grid

N0 = 8.0e6
"""Unattenuated photons on the axis per mm of detector and degree of rotation."""
ELECTRONIC_COUNTS = 3.2
"""σe: √10 counts, as in Zeng et al."""
_READINGS_PER_MM_DEGREE = 1000 * 2 / 360 / 0.6
"""A rotation takes some 1000 views with cells of 0.6 mm on the axis, and in half a turn's worth of parallel rays each
line is measured from both ends."""
_SOURCE_TO_AXIS_MM = 570.0
"""541 (GE) to 595 mm (Siemens)."""
_BOWTIE_MM = 60.0
_BOWTIE_AT_MM = 130.0
_BOWTIE_MAX_MM = 120.0
"""Water-equivalent path of the bow-tie: ``min(120, 60·(t/130)²)`` mm at distance t from the axis."""
_CENTRAL = 0.95
"""Quantile of the attenuation of a view that the tube current follows."""
_VARIANCE_LIMIT = 4.0
"""Largest variance of one line integral: beyond it the logarithm of a count has no normal distribution."""
_LEAST_COUNT = 0.5
"""What is put in the place of a count of 0 or less before the logarithm."""

Draw = Callable[[torch.Tensor, Sequence[torch.Tensor]], torch.Tensor]
"""Noise of the line integrals from photons and standard normal deviates, all (z, views, bins)."""


@dataclass(frozen=True, slots=True)
class Beam:
    """The X-ray source and the detector."""

    n0: float = N0
    """Unattenuated photons on the axis per mm of detector and degree of rotation."""
    electronic: float = 0.0
    """σe: standard deviation of the electronic noise of one reading, in counts."""
    modulation: float = 0.0
    """α: the tube current over the angle goes as exp(α·p), p the attenuation in its direction. 0 is a constant current;
    0.5 gives the least noise in the centre for a given dose (Gies et al., Med Phys 1999;26:2235)."""

    def photons(self, p: torch.Tensor, grid: Grid) -> torch.Tensor:
        """Photons in each bin behind the attenuation `p` (z, views, bins)."""
        t_mm = grid.places_mm(p.device)
        bowtie_mm = (_BOWTIE_MM * (t_mm / _BOWTIE_AT_MM) ** 2).clamp_max(_BOWTIE_MAX_MM)
        unattenuated = self.n0 * grid.bin_mm * (180.0 / grid.views)
        photons = unattenuated * torch.exp(-p - MU_WATER_PER_MM * bowtie_mm)
        return photons * self._current(p, t_mm) if self.modulation else photons

    def _current(self, p: torch.Tensor, t_mm: torch.Tensor) -> torch.Tensor:
        """Tube current along each ray over its mean, (z, views, bins)."""
        views, bins = p.shape[1:]
        central = p.kthvalue(math.ceil(_CENTRAL * bins), dim=-1).values
        current = torch.exp(self.modulation * central)
        current /= current.mean(1, keepdim=True)
        gamma = torch.asin((t_mm / _SOURCE_TO_AXIS_MM).clamp(-1, 1)) * (views / math.pi)  # in views
        theta = torch.arange(views, device=p.device)[:, None]
        total = torch.zeros_like(p)
        for place in (theta - gamma, theta + gamma):  # the current repeats after half a turn
            low = place.floor()
            part = place - low
            index = low.long()
            total += current[:, index % views] * (1 - part) + current[:, (index + 1) % views] * part
        return total / 2

    def readings(self, grid: Grid) -> float:
        """Readings that come together in one bin of `grid`."""
        return _READINGS_PER_MM_DEGREE * grid.bin_mm * 180.0 / grid.views

    def variance(self, photons: torch.Tensor, grid: Grid) -> torch.Tensor:
        """Variance of a line integral, ``1/N + σe²/N²`` for one reading; of a bin of m readings ``1/N + m·σe²/N²``."""
        return 1 / photons + self.readings(grid) * self.electronic**2 / photons**2


def full_dose(beam: Beam, grid: Grid) -> Draw:
    """Gaussian noise of a scan."""

    def draw(photons: torch.Tensor, deviates: Sequence[torch.Tensor]) -> torch.Tensor:
        return deviates[0] * beam.variance(photons, grid).clamp_max_(_VARIANCE_LIMIT).sqrt()

    return draw


def added(beam: Beam, grid: Grid, dose: float) -> Draw:
    """Gaussian noise that is missing at the fraction `dose`: ``[1/(dN)+mσe²/(dN)²] − [1/N+mσe²/N²]``."""

    def draw(photons: torch.Tensor, deviates: Sequence[torch.Tensor]) -> torch.Tensor:
        missing = beam.variance(dose * photons, grid) - beam.variance(photons, grid)
        return deviates[0] * missing.clamp_(0, _VARIANCE_LIMIT).sqrt()

    return draw


def poisson_streams(beam: Beam, grid: Grid) -> int:
    """Deviates that `added_poisson` needs: one for the photons and one for the electronics of each reading."""
    return 2 * max(1, round(beam.readings(grid)))


def added_poisson(beam: Beam, grid: Grid, dose: float) -> Draw:
    """The same variance from counts, reading by reading, each through the logarithm.

    ``N·d/(1−d)`` photons have it, with electronic noise of ``σe²·(1+d)/(1−d)``. Where hardly any photons arrive the
    logarithm is skewed: streaks, and line integrals too large on average, as in a real scan without correction.
    """
    readings = poisson_streams(beam, grid) // 2
    electronic = beam.electronic * math.sqrt(beam.readings(grid) / readings * (1 + dose) / (1 - dose))

    def draw(photons: torch.Tensor, deviates: Sequence[torch.Tensor]) -> torch.Tensor:
        expected = photons * (dose / (1 - dose) / readings)
        total = torch.zeros_like(photons)
        for quantum, electrons in zip(deviates[:readings], deviates[readings:], strict=True):
            count = poisson_quantile(expected, quantum) + electronic * electrons
            total -= torch.log(count.clamp_min_(_LEAST_COUNT) / expected)
        return total / readings

    return draw


def poisson_quantile(mean: torch.Tensor, deviate: torch.Tensor) -> torch.Tensor:
    """The Poisson count at the same probability as the normal `deviate`, to second order of Cornish and Fisher.

    ``N + √N·z + (z² − 1)/6``, rounded, not below 0, has the mean, variance and skewness of the Poisson distribution.
    From normal deviates, because these can be correlated from slice to slice.
    """
    return (mean + mean.sqrt() * deviate + (deviate**2 - 1) / 6).round_().clamp_min_(0)
