"""What each network makes of one tiny series, file to file: fixed for as long as `VOXEL_REVISION` stands.

    python tests/golden_output.py

writes what is not there yet: after new weights, or after `pipelines.base.VOXEL_REVISION` was raised because the output
was meant to change. It never replaces a file that says otherwise: the same revision is the same output.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
from ct_builder import write_series
from derivation import derive
from numpy.typing import NDArray
from pydicom import dcmread

from pipelines import base
from pipelines.runtime import WEIGHTS
from pipelines.volume import read_volume

PIPELINES = tuple(sorted(card.stem for card in WEIGHTS.glob("*.json")))
"""All networks whose weights ship."""
EXECUTION = base.Execution(device="cpu", precision="fp32")
"""What the files hold: every CPU computes that alike but for rounding, and no short number format does."""
FOLDER = Path(__file__).parent / "golden"
MAX_STEP_HU = 1
MAX_CHANGED = 0.001
"""Part of the voxels that may be rounded to the neighbouring HU: another build of PyTorch adds in another order, which
moves them by some ten-thousandths of a HU. The test tells how small a change of the code still shows."""
SPACING_MM = (2.0, 1.2, 1.2)
_SHAPE = (5, 48, 48)


def source_hu() -> NDArray[np.int16]:
    """Body with lung, bone and a metal pin in air, noise, and padding that no element declares; (z, y, x) HU."""
    y, x = np.mgrid[:48, :48] / 47 * 2 - 1
    plane = np.full(_SHAPE[1:], -1000.0)
    plane[x**2 + y**2 < 0.9**2] = 40
    plane[((x + 0.4) / 0.25) ** 2 + (y / 0.35) ** 2 < 1] = -850
    plane[(x - 0.45) ** 2 + (y + 0.3) ** 2 < 0.15**2] = 700
    stack = np.repeat(plane[None], _SHAPE[0], axis=0)
    for k, layer in enumerate(stack):  # something that changes from slice to slice
        layer[(x - 0.3) ** 2 + (y - 0.1 * k) ** 2 < 0.1**2] = 110
    # RandomState, because its stream never changes (NEP 19)
    stack += np.random.RandomState(1).normal(0, 25, _SHAPE)
    stack[:, (x - 0.1) ** 2 + (y + 0.6) ** 2 < 0.06**2] = 6000
    stack[:, x**2 + y**2 > 1] = -2048
    return np.rint(stack).astype(np.int16)


def options_of(card: base.ModelCard) -> base.Options:
    """Options that count; st3d's file was written when a network without noise map took no strength but 1."""
    if card.noise_map:
        return base.Options(strength=1.25, blend=0.75)
    return base.Options(strength=1.0 if card.name == "st3d" else 0.8, blend=0.75)


def output_hu(pipeline: base.Pipeline) -> NDArray[np.int16]:
    """The same series as the derived files hold it: read, denoised, derived with `options_of`; (z, y, x) HU."""
    options = options_of(pipeline.card)
    with tempfile.TemporaryDirectory() as folder:
        paths = write_series(Path(folder) / "in", source_hu(), spacing_mm=SPACING_MM)
        hu = base.denoise_volume(pipeline, read_volume(paths), options)
        made = derive(paths, Path(folder) / "out", lambda _: hu, card=pipeline.card, options=options)
        images = [dcmread(one.path) for one in made]
    assert {(ds.RescaleSlope, ds.RescaleIntercept) for ds in images} == {(1, -1024)}
    return np.stack([ds.pixel_array - 1024 for ds in images]).astype(np.int16)


def golden(card: base.ModelCard) -> Path:
    """File of these weights at this revision."""
    return FOLDER / f"{card.name}-{card.weights_sha256[:16]}-r{base.VOXEL_REVISION}.npz"


def compare(card: base.ModelCard, made: NDArray[np.int16]) -> None:
    """Fail unless `made` is what is written down, but for rounding."""
    path = golden(card)
    assert path.exists(), f"there is no {path.name} yet: run python tests/golden_output.py and commit it"
    with np.load(path) as file:
        change = np.abs(made.astype(int) - file["hu"])
    changed = float((change > 0).mean())
    if change.max() > MAX_STEP_HU or changed > MAX_CHANGED:
        raise AssertionError(
            f"{card.name}: {changed:.2%} of the voxels changed, by up to {change.max()} HU, under the same UIDs. If "
            "this is meant, raise VOXEL_REVISION in pipelines/base.py, run python tests/golden_output.py and write it "
            "into CHANGELOG.md"
        )


def write(pipeline: base.Pipeline) -> None:
    """Write down what is not there yet; what belongs to older weights or an older revision goes."""
    path, made = golden(pipeline.card), output_hu(pipeline)
    if path.exists():
        compare(pipeline.card, made)
        return
    for old in FOLDER.glob(f"{pipeline.card.name}-*-r*.npz"):
        old.unlink()
    np.savez_compressed(path, hu=made)


if __name__ == "__main__":
    for name in PIPELINES:
        write(base.load(name, EXECUTION))
