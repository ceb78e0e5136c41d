"""What a pipeline is: a card that says what it is and was trained on, and one function, HU in, HU out."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from importlib.metadata import entry_points
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from pipelines.volume import Series, Volume


@dataclass(frozen=True, slots=True)
class Envelope:
    """What a pipeline was validated for; the gate refuses a series outside it. Units: mm, HU."""

    slice_spacing_mm: tuple[float, float] = (0.3, 10.0)
    pixel_spacing_mm: tuple[float, float] = (0.2, 2.0)
    min_slices: int = 1
    max_slices: int = 3000
    gantry_tilt: bool = False
    """May the slice normal differ from the direction in which the slices advance?"""


@dataclass(frozen=True, slots=True)
class ModelCard:
    """Everything a physicist asks about a pipeline before trusting it; ships as JSON beside the weights."""

    name: str
    version: str
    paper: str
    doi: str
    input: Literal["slice", "slab3", "volume"]
    patch_zyx: tuple[int, int, int]
    """Size of a patch in training."""
    overlap_zyx: tuple[int, int, int]
    """Slices, rows and columns that a result depends on in each direction: the radius of the receptive field."""
    hu_window: tuple[float, float]
    """HU range of the training data; values outside pass the network unclipped."""
    precision: str
    """Number format that really runs: ``fp32``, ``bf16``, ``fp16``, ``int8`` or ``none``."""
    weights_sha256: str
    """Digest of the weights file; empty for a pipeline without weights."""
    files_sha256: dict[str, str] = field(default_factory=dict)
    """Digests of what else lies beside the weights, by suffix: ``xml``, the graph for OpenVINO, and ``int8.xml`` with
    ``int8.bin``, or ``int8.ranges`` and perhaps ``int8.safetensors``, which stand in for it (and for them) in INT8."""
    int8_loss_db: float | None = None
    """PSNR that INT8 loses against fp32 on what did not teach it; None: not measured."""
    int8_bound_hu: tuple[float, float] | None = None
    """How far INT8 may be from fp32 on the golden volume (`pipelines.golden`), largest and rms; None: not measured, and
    INT8 runs, unchecked, only where it is demanded."""
    valid_for: Envelope = field(default_factory=Envelope)
    noise_map: bool = False
    """True if the network takes a noise map; decides what `Options.strength` means."""
    trained_on: str = ""
    measured: dict[str, Any] = field(default_factory=dict)
    """Its own quality table, with the command that printed it."""
    backend: str = ""
    """What computes it here, ``openvino`` or ``torch``; known once it is loaded, and empty where there is no choice."""
    floats: str = ""
    """Number format of what is not in 8 bits, ``bf16`` or ``fp32``, where `precision` is ``int8``: that of this CPU."""
    reason: str = ""
    """Why that backend in that precision, in words."""


@dataclass(frozen=True, slots=True)
class Options:
    """What a user may turn. Both move voxels, so both are part of the pipeline hash.

    strength
        How much is to be denoised, 1 as trained. With `ModelCard.noise_map` the scale of the noise map (0 to 1.5): the
        network is told less or more noise than was measured. A network without, which judges the noise by itself, has
        nothing to be told; there it is the part of its change that is made (0 to 1), as if multiplied into `blend`.
        0 gives the input to the last bit with every pipeline.
    blend
        Part of the denoised image in the output: ``out = (1 - blend)·in + blend·denoised`` (0 to 1). 0.7 is the setting
        of Ataei et al. (`pipelines.cascade`): it keeps 30 % of the texture.
    """

    strength: float = 1.0
    blend: float = 1.0


HIGHEST_STRENGTH = 1.5
"""Of a network with a noise map: none was trained to be told more than this above the truth."""


class OptionRefused(ValueError):
    """This pipeline cannot take this option."""


def check_options(card: ModelCard, options: Options) -> None:
    """Refuse options that the pipeline of `card` cannot take; see `Options`.

    Raises
    ------
    OptionRefused
        With the range.
    """
    highest = HIGHEST_STRENGTH if card.noise_map else 1.0
    if not 0 <= options.strength <= highest:
        why = (
            "" if card.noise_map else ", because it takes no noise map: strength is the part of its change that is made"
        )
        raise OptionRefused(f"strength {options.strength:g} is out of range; {card.name} takes 0 to {highest:g}{why}")
    if not 0 <= options.blend <= 1:
        raise OptionRefused(f"blend {options.blend:g} is out of range; it is a part, 0 to 1")


Device = Literal["auto", "cpu", "cuda"]
Precision = Literal["auto", "int8", "bf16", "fp32"]


@dataclass(frozen=True, slots=True)
class Execution:
    """On what a network is to run."""

    device: Device = "auto"
    precision: Precision = "auto"
    """Number format of the products; ``auto`` is the quickest that this machine has and the card vouches for."""
    threads: int = 0
    """Of the CPU; 0: all cores that this process may use."""


class Pipeline(Protocol):
    """A denoiser. Made once by its factory (which loads the weights), then used for many series."""

    card: ModelCard

    def denoise(self, series: Series, options: Options) -> Iterator[NDArray[np.float32]]:
        """The denoised slices of `series` in order, HU, float32, each (y, x) and an array of its own; deterministic.

        A slice is due as soon as those it depends on were asked for (`Series.plane`), whatever was asked for before the
        first (our own networks ask for all, to find the body): the node writes it while the network works on the next,
        and no series is too long for the memory.
        """
        ...


class PipelineFault(RuntimeError):
    """A pipeline did not keep to `Pipeline`."""


def denoise(pipeline: Pipeline, series: Series, options: Options) -> Iterator[NDArray[np.float32]]:
    """The slices that `pipeline` makes of `series`, each seen to be one.

    Raises
    ------
    PipelineFault
        If it gives other than one float32 image of the series' size for each slice. (Whether they are finite, the guard
        finds out.)
    OptionRefused
        For an option that it cannot take.
    """
    count, *size = series.shape
    given = 0
    for given, hu in enumerate(pipeline.denoise(series, options), 1):
        if given > count:
            raise PipelineFault(f"{pipeline.card.name} gave more than the {count} slices of the series")
        if not isinstance(hu, np.ndarray) or hu.dtype != np.float32 or list(hu.shape) != size:
            what = f"{hu.dtype} {hu.shape}" if isinstance(hu, np.ndarray) else type(hu).__name__
            raise PipelineFault(f"{pipeline.card.name} gave {what} for slice {given - 1}, not float32 {tuple(size)}")
        yield hu
    if given < count:
        raise PipelineFault(f"{pipeline.card.name} gave {given} slices for a series of {count}")


def denoise_volume(pipeline: Pipeline, volume: Volume, options: Options | None = None) -> NDArray[np.float32]:
    """All of `denoise` as one array (z, y, x), for those who measure."""
    return np.stack(list(denoise(pipeline, volume, options or Options())))


ENTRY_POINT_GROUP = "dicomnode.pipelines"
"""A package announces a pipeline by an entry point of this group: a callable of an `Execution` that makes it.

Ours are announced in pyproject.toml by the same mechanism, so there is one way to be a pipeline.
"""


class UnknownPipeline(LookupError):
    """No installed package announces a pipeline of that name."""


class WeightsMissing(RuntimeError):
    """A pipeline is announced but was not trained here. No `FileNotFoundError`: that is for files of a series."""


class WeightsDamaged(RuntimeError):
    """Card or weights of a pipeline cannot be read, or do not belong together."""


def names() -> tuple[str, ...]:
    """Names of all installed pipelines; reads package metadata only, imports none of them."""
    return tuple(sorted({point.name for point in entry_points(group=ENTRY_POINT_GROUP)}))


def load(name: str, execution: Execution | None = None) -> Pipeline:
    """Make the pipeline `name` (imports its module and loads its weights).

    Raises
    ------
    UnknownPipeline
        With the names that exist.
    WeightsMissing
        If it is one of ours and has no weights; with what to do.
    WeightsDamaged
        If it is one of ours and has weights that are not what was installed; with what to do.
    """
    for point in entry_points(group=ENTRY_POINT_GROUP, name=name):
        factory: Callable[[Execution], Pipeline] = point.load()
        return factory(execution or Execution())
    raise UnknownPipeline(f"no pipeline {name!r}; there are: {', '.join(names())}")


VOXEL_REVISION = 4
"""Revision of the code that every voxel passes, from the file that came to the file that goes: HU and padding of the
source, safety rails, noise level, units, streaming, stored values. Raise it with any change there that moves a voxel by
more than float rounding; tests/contract/test_golden_output.py fails until then."""


def pipeline_hash(card: ModelCard, options: Options) -> str:
    """Digest of everything that can move a voxel: name, version, weights, options, our code, and what computes it.

    It is part of every derived UID (docs/architecture.md): whatever changes a pixel by more than rounding changes the
    UID. Kinds of CPU that compute in the same formats still round otherwise, in the short ones by some HU.
    """
    what = {
        "voxel_revision": VOXEL_REVISION,
        "name": card.name,
        "version": card.version,
        "weights_sha256": card.weights_sha256,
        "files_sha256": {
            suffix: digest
            for suffix, digest in card.files_sha256.items()
            if suffix.startswith("int8.") == (card.precision == "int8")
        },
        "backend": card.backend,
        "precision": card.precision,
        "floats": card.floats,
        **asdict(options),
    }
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()
