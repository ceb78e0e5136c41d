"""What every pipeline must satisfy, ours and a hospital's: ``check_pipeline("theirs")`` in a test of their own."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pipelines.base import Options, Pipeline, PipelineFault, denoise_volume, load
from pipelines.volume import Geometry, Volume

MAX_SHIFT_HU = 1.0
"""Largest change of the mean of water and of air."""
PADDING_LEAK_HU = 0.01
"""Largest change of tissue when only the value of the padding changes: none but for rounding."""
MIXING_HU = 0.01
"""Largest difference between blend or strength 0.5 and half of the change: none but for rounding."""


class ContractBroken(AssertionError):
    """A pipeline breaks its contract; the message lists every clause and what was measured."""


def check_pipeline(pipeline: str | Pipeline) -> None:
    """Run the whole contract on small synthetic volumes; seconds, not minutes.

    Parameters
    ----------
    pipeline
        An installed pipeline by name, or one that was made already.

    Raises
    ------
    ContractBroken
        With all broken clauses.
    """
    made = load(pipeline) if isinstance(pipeline, str) else pipeline
    broken: list[str] = []
    for clause in (
        _gives_hu_back,
        _repeats_itself_and_leaves_its_input,
        _leaves_padding,
        _blends,
        _obeys_strength,
        _takes_one_slice,
        _takes_odd_matrix,
        _keeps_water_and_air,
    ):
        try:
            clause(made)
        except ContractBroken as error:
            broken.append(f"{clause.__name__.strip('_').replace('_', ' ')}: {error}")
    if broken:
        raise ContractBroken(f"pipeline {made.card.name!r}: " + "; ".join(broken))


def water_volume(shape: tuple[int, int, int], *, noise_hu: float = 20.0, padding_hu: float | None = None) -> Volume:
    """A water cylinder (0 HU) with a metal pin in air (-1000 HU), correlated noise, padding outside a circle.

    Parameters
    ----------
    shape
        (z, y, x); 1 mm slices of 0.7 mm pixels.
    noise_hu
        Standard deviation of the noise, HU.
    padding_hu
        What stands outside the field of view; None: no padding.
    """
    y, x = (np.linspace(-1, 1, n)[:, None] if axis == 0 else np.linspace(-1, 1, n) for axis, n in enumerate(shape[1:]))
    plane = np.where(x**2 + y**2 < 0.7**2, 0.0, -1000.0)
    plane[(x - 0.4) ** 2 + y**2 < 0.06**2] = 8000.0
    white = np.random.default_rng(20240101).normal(0, 1, (shape[0], shape[1] + 2, shape[2] + 2))
    noise = white[:, 1:-1, 1:-1] + 0.5 * (
        white[:, :-2, 1:-1] + white[:, 2:, 1:-1] + white[:, 1:-1, :-2] + white[:, 1:-1, 2:]
    )
    hu = (plane + noise_hu / np.sqrt(2) * noise).astype(np.float32)
    padding = np.zeros(shape, dtype=np.bool_)
    if padding_hu is not None:
        padding[:] = x**2 + y**2 > 1
        hu[padding] = padding_hu
    return Volume(
        hu=hu,
        geometry=Geometry((0.0, 0.0, 0.0), (1.0, 0.7, 0.7), ((0, 0, 1), (0, 1, 0), (1, 0, 0)), "2.25.1"),
        slice_uids=tuple(f"2.25.{k + 1}" for k in range(shape[0])),
        slice_paths=tuple(Path(f"{k:04d}.dcm") for k in range(shape[0])),
        padding=padding,
    )


def _slices(pipeline: Pipeline, wanted: int) -> int:
    """As many slices as wanted, or as many as the pipeline was validated for."""
    valid_for = pipeline.card.valid_for
    return min(max(wanted, valid_for.min_slices), valid_for.max_slices)


def _demand(fulfilled: bool, complaint: str) -> None:
    if not fulfilled:
        raise ContractBroken(complaint)


def _run(pipeline: Pipeline, volume: Volume, options: Options | None = None) -> NDArray[np.float32]:
    """The output, once it is what an output must be at least."""
    try:
        out = denoise_volume(pipeline, volume, options)
    except PipelineFault as fault:
        raise ContractBroken(str(fault)) from fault
    _demand(bool(np.isfinite(out).all()), "gave values that are not finite")
    return out


def _gives_hu_back(pipeline: Pipeline) -> None:
    _run(pipeline, water_volume((_slices(pipeline, 5), 64, 64)))


def _repeats_itself_and_leaves_its_input(pipeline: Pipeline) -> None:
    volume = water_volume((_slices(pipeline, 4), 64, 64), padding_hu=-3024.0)
    hu, padding = volume.hu.copy(), volume.padding.copy()
    first = _run(pipeline, volume)
    _demand(np.array_equal(volume.hu, hu) and np.array_equal(volume.padding, padding), "the input was changed")
    _demand(np.array_equal(first, _run(pipeline, volume)), "the same input gave two outputs")
    planes = list(pipeline.denoise(volume, Options()))
    _demand(not any(np.shares_memory(one, volume.hu) for one in planes), "the output is the memory of the input")


def _leaves_padding(pipeline: Pipeline) -> None:
    volume = water_volume((_slices(pipeline, 4), 64, 64), padding_hu=-3024.0)
    other = replace(volume, hu=np.where(volume.padding, np.float32(-2000.0), volume.hu))
    out, out_other = _run(pipeline, volume), _run(pipeline, other)
    _demand(np.array_equal(out[volume.padding], volume.hu[volume.padding]), "voxels without measurement were changed")
    leak = float(np.abs(out - out_other)[~volume.padding].max())
    _demand(leak <= PADDING_LEAK_HU, f"the padding value moved tissue by {leak:.2f} HU: mask it before the network")


def _blends(pipeline: Pipeline) -> None:
    volume = water_volume((_slices(pipeline, 3), 64, 64))
    out = _run(pipeline, volume, Options(blend=0.0))
    _demand(np.array_equal(out, volume.hu), "blend 0 is not the input to the last bit")
    _makes_half(pipeline, volume, Options(blend=0.5), "blend")


def _obeys_strength(pipeline: Pipeline) -> None:
    volume = water_volume((_slices(pipeline, 3), 64, 64))
    out = _run(pipeline, volume, Options(strength=0.0))
    _demand(np.array_equal(out, volume.hu), "strength 0 is not the input to the last bit")
    if not pipeline.card.noise_map:  # what a network makes of half the noise, nobody can say
        _makes_half(pipeline, volume, Options(strength=0.5), "strength")


def _makes_half(pipeline: Pipeline, volume: Volume, options: Options, option: str) -> None:
    middle = (volume.hu + _run(pipeline, volume)) / 2
    off = float(np.abs(_run(pipeline, volume, options) - middle).max())
    _demand(off <= MIXING_HU, f"{option} 0.5 is up to {off:.2f} HU off the middle of input and output")


def _takes_one_slice(pipeline: Pipeline) -> None:
    _run(pipeline, water_volume((_slices(pipeline, 1), 64, 64)))


def _takes_odd_matrix(pipeline: Pipeline) -> None:
    _run(pipeline, water_volume((_slices(pipeline, 3), 47, 61)))


def _keeps_water_and_air(pipeline: Pipeline) -> None:
    volume = water_volume((_slices(pipeline, 6), 96, 96))
    out = _run(pipeline, volume)
    y, x = np.linspace(-1, 1, 96)[:, None], np.linspace(-1, 1, 96)
    inside = (x**2 + y**2 < 0.5**2) & ((x - 0.4) ** 2 + y**2 > 0.25**2)
    for name, region in (("water", inside), ("air", x**2 + y**2 > 0.9**2)):
        shift = float((out[:, region] - volume.hu[:, region]).mean(dtype=np.float64))
        _demand(abs(shift) < MAX_SHIFT_HU, f"the mean of {name} moved by {shift:+.2f} HU (limit {MAX_SHIFT_HU:g})")
