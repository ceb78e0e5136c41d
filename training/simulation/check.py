"""Does the noise that the simulator inserts fit real series? A table, one row for each series.

    python -m training.simulation.check SERIES...

At a quarter of the dose the noise index must double, the inserted noise must have the texture of the series' own, and
what is as dense as water must stay so.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

import numpy as np

from pipelines.noise import noise_level
from pipelines.volume import SeriesRefused, Volume
from training.command_line import positive
from training.physics import mean_frequency, nps_2d, radial_nps
from training.simulation.calibration import (
    Calibration,
    calibrate,
    noise_spectrum,
    square_pixel_mm,
    tissue_tiles,
    without_padding,
)
from training.simulation.kernel_fit import tile_size
from training.simulation.simulated_series import read_series
from training.simulation.simulated_volume import simulate

DOSE = 0.25
RATIO, RATIO_TOLERANCE = math.sqrt(1 / DOSE), 0.15
FREQUENCY_TOLERANCE = 0.1
WATER_TOLERANCE_HU = 0.5
LEAST_NOISE_HU = 4.0
"""Below it, local standard deviations are those of the object and of rounding: such a series is not judged."""
_SEED = 101


@dataclass(frozen=True, slots=True)
class Check:
    """What was measured on one series."""

    ratio: float
    """Noise index at quarter dose over that of the series, slice by slice; the median."""
    own_frequency: float
    """Mean frequency of the NPS of the series in soft tissue, 1/mm; NaN where there is too little of that."""
    inserted_frequency: float
    """The same of the inserted noise."""
    water_hu: float
    """Mean of what was inserted into soft tissue; NaN where there is none."""

    @property
    def frequency_error(self) -> float:
        """Relative difference of the mean frequencies."""
        return self.inserted_frequency / self.own_frequency - 1

    @property
    def missed(self) -> list[str]:
        """Which bars the series misses; what could not be measured is missed."""
        met = {
            "noise": abs(self.ratio - RATIO) <= RATIO_TOLERANCE,
            "frequency": abs(self.frequency_error) <= FREQUENCY_TOLERANCE,
            "water": abs(self.water_hu) <= WATER_TOLERANCE_HU,
        }
        return [name for name, inside in met.items() if not inside]


def check(volume: Volume, found: Calibration, slices: int | None = None) -> Check:
    """Simulate `volume` at a quarter of its dose and measure what that inserted.

    The noise is another one than that of the calibration.

    Parameters
    ----------
    found
        Of `volume`.
    slices
        How many slices are simulated, evenly spread; None: all.
    """
    pixel_mm = square_pixel_mm(volume)
    part, scanner = volume, found
    if slices is not None:
        looked_at = np.unique(np.linspace(0, len(volume.hu) - 1, slices + 2)[1:-1].round().astype(int))
        part = replace(volume, hu=volume.hu[looked_at], padding=volume.padding[looked_at])
        scanner = replace(found, current=tuple(found.current[k] for k in looked_at), overlap=1.0)
    low = simulate(part, DOSE, _SEED, scanner)
    levels = [
        [noise_level(hu[k : k + 1], part.padding[k : k + 1], pixel_mm) for hu in (low, part.hu)]
        for k in range(len(low))
    ]
    own, _ = noise_spectrum(volume, pixel_mm, math.ceil(found.overlap - 1e-6))
    size = tile_size(pixel_mm)
    tiles = [
        tile for k in range(len(low)) for tile in tissue_tiles([without_padding(part, k)], low[k] - part.hu[k], size)
    ]
    inserted = radial_nps(nps_2d(np.stack(tiles), pixel_mm), pixel_mm) if tiles else None
    return Check(
        median(after / before for after, before in levels if before > 0),
        mean_frequency(own) if own else math.nan,
        mean_frequency(inserted) if inserted else math.nan,
        float(np.mean(tiles, dtype=np.float64)) if tiles else math.nan,
    )


def main(words: Sequence[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(prog="python -m training.simulation.check", description=__doc__)
    parser.add_argument("series", type=Path, nargs="+", metavar="SERIES", help="folder of one CT series at full dose")
    parser.add_argument("--slices", type=positive, help="how many of each are simulated (default: all)")
    args = parser.parse_args(words)
    print(
        "| series | slices | noise (HU) | f50 (1/mm) | boost | fit | photons per mm and ° | noise at quarter dose | "
        "mean frequency own → inserted (1/mm) | difference | water (HU) | bar |"
    )
    print("|---" * 12 + "|")
    judged = met = 0
    for folder in args.series:
        try:
            volume = read_series(folder)
            found = calibrate(volume)
        except (SeriesRefused, ValueError) as error:
            print(f"| {folder.name} | {error} |")
            continue
        result = check(volume, found, args.slices)
        bar = f"**missed**: {', '.join(result.missed)}" if result.missed else "met"
        if found.noise_hu < LEAST_NOISE_HU:
            bar = f"none below {LEAST_NOISE_HU:g} HU"
        else:
            judged, met = judged + 1, met + (not result.missed)
        texture = f"{result.own_frequency:.3f} → {result.inserted_frequency:.3f}"
        fit = f"{found.residual:.0%}, {found.tiles} tiles" if found.tiles else found.kernel_from
        print(
            f"| {folder.name} | {args.slices or len(volume.hu)} | {found.noise_hu:.1f} | {found.kernel.f50:.3f} | "
            f"{found.kernel.boost:.2f} | {fit} | {found.beam.n0:.2g} | × {result.ratio:.2f} | {texture} | "
            f"{result.frequency_error:+.1%} | {result.water_hu:+.2f} | {bar} |",
            flush=True,
        )
    print(f"\n{met} of {judged} series with at least {LEAST_NOISE_HU:g} HU of noise meet the bar.")


if __name__ == "__main__":
    main()
