"""Does the noise that the simulator inserts fit real series? A table, one row for each series.

    python -m training.simulation.check SERIES...

At a quarter of the dose the noise index must double, and the inserted noise must have the texture of the series' own.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import numpy as np

from pipelines.noise import noise_level
from pipelines.volume import SeriesRefused, Volume
from training.physics import mean_frequency, nps_2d, radial_nps
from training.simulate import added_noise
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

DOSE = 0.25
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

    @property
    def frequency_error(self) -> float:
        """Relative difference of the mean frequencies."""
        return self.inserted_frequency / self.own_frequency - 1


def check(volume: Volume, found: Calibration, slices: int) -> Check:
    """Insert the noise of a quarter dose into so many slices of `volume`, evenly spread, and measure it.

    The noise is another one than that of the calibration.
    """
    pixel_mm = square_pixel_mm(volume)
    looked_at = np.unique(np.linspace(0, len(volume.hu) - 1, slices + 2)[1:-1].round().astype(int))
    hu = np.stack([without_padding(volume, k) for k in looked_at])
    current = [found.current[k] for k in looked_at]
    noise = added_noise(hu, pixel_mm, DOSE, _SEED, found.kernel, found.beam, current=current)
    levels = [
        [noise_level(image[None], volume.padding[k : k + 1], pixel_mm) for image in (one + added, one)]
        for k, one, added in zip(looked_at, hu, noise, strict=True)
    ]
    own, _ = noise_spectrum(volume, pixel_mm, math.ceil(found.overlap - 1e-6))
    size = tile_size(pixel_mm)
    tiles = [tile for one, added in zip(hu, noise, strict=True) for tile in tissue_tiles([one], added, size)]
    inserted = radial_nps(nps_2d(np.stack(tiles), pixel_mm), pixel_mm) if tiles else None
    return Check(
        median(after / before for after, before in levels if before > 0),
        mean_frequency(own) if own else math.nan,
        mean_frequency(inserted) if inserted else math.nan,
    )


def main(words: Sequence[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(prog="python -m training.simulation.check", description=__doc__)
    parser.add_argument("series", type=Path, nargs="+", metavar="SERIES", help="folder of one CT series at full dose")
    parser.add_argument("--slices", type=int, default=9, help="how many of each (default: %(default)s)")
    args = parser.parse_args(words)
    print(
        "| series | noise (HU) | f50 (1/mm) | boost | fit | photons per mm and ° | noise at quarter dose | "
        "mean frequency own → inserted (1/mm) | difference | calibration (s) |"
    )
    print("|---" * 10 + "|")
    for folder in args.series:
        try:
            volume = read_series(folder)
            start = time.monotonic()
            found = calibrate(volume)
        except (SeriesRefused, ValueError) as error:
            print(f"| {folder.name} | {error} |")
            continue
        seconds = time.monotonic() - start
        result = check(volume, found, args.slices)
        texture = f"{result.own_frequency:.3f} → {result.inserted_frequency:.3f}"
        fit = f"{found.residual:.0%}, {found.tiles} tiles" if found.tiles else found.kernel_from
        print(
            f"| {folder.name} | {found.noise_hu:.1f} | {found.kernel.f50:.3f} | {found.kernel.boost:.2f} | {fit} | "
            f"{found.beam.n0:.2g} | × {result.ratio:.2f} | {texture} | {result.frequency_error:+.1%} | {seconds:.1f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
