"""STResNet and SRResNet3D slice by slice in depth on OpenVINO, without torch (what they are: `pipelines.stresnet`).

::

                                              (once for each block)
    input → entry → ring 0 → head → ring 1 → first → ring 2 → second → … → body → ring n−1 → tail → result
      │                        └─────── trunk ───────────────────┴ trunk … ─ ┘                 │
      │                        └─────── trunk of the head ───────────────────┘                 │
      └────────────────────────────────────────────────────────────────────────────────────────┘

What stands between two rings is a segment (`pipelines.openvino_segments`), a small model compiled by itself: it reads
the last three planes of one ring and writes one plane into the next. In each step every ring gets one plane, ring k at
step t plane t − k of the volume; so a result comes out as soon as the last slice that it depends on has gone in.

All that stays from step to step lies in rings, made once: plane p in slot p mod depth, which OpenVINO reads and writes
in place. A window of three is never shifted; instead each segment is compiled three times, with its weights turned to
where the newest plane lies. The skips (lower lines) are rings as well, as deep as what they wait for is late. Those of
the blocks are one ring, as deep as all blocks together are late, in which each block adds to the plane in its slot. A
plane outside the volume is a slot filled with the code of zero. So every voxel is computed once, memory does not grow
with the number of slices, and the result is that of the whole volume at once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import chain, repeat
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipelines.base import WeightsDamaged
from pipelines.openvino_core import Precision, compile_model, convolution_precisions, float_of, give_memory_back, ov
from pipelines.openvino_segments import Code, Convolution, Planes, Reach, segment

Plane = NDArray[np.float32]
"""(y, x) in network units."""

WINDOW = 3
"""Planes that a convolution in depth sees."""
CACHE_LINE = 64
"""Bytes. Large arrays of NumPy begin 16 behind one, and each wide access of a kernel then meets two. Rings begin at
one, and so does each plane in them where the bytes of one divide by this, as for 512 × 512."""


@dataclass(frozen=True)
class _Level:
    """One convolution of the paper: in the plane and then in depth (STResNet), or both at once (SRResNet3D)."""

    across: Convolution | None
    along: Convolution


def _levels(weights: Mapping[str, NDArray[Any]], ranges: Mapping[str, Reach]) -> list[_Level]:
    """The network in the order in which a plane passes it; width and depth are those of the weights."""
    blocks = len({name.split(".")[1] for name in weights if name.startswith("blocks.")})
    parts = ["head", *(f"blocks.{k}.{part}" for k in range(blocks) for part in ("first", "second")), "body", "tail"]
    separable = "head.0.weight" in weights
    used: set[str] = set()

    def convolution(name: str) -> Convolution:
        used.update((f"{name}.weight", f"{name}.bias"))
        weight, bias = (np.asarray(weights[f"{name}.{kind}"], np.float32) for kind in ("weight", "bias"))
        largest = ranges.get(name)
        if largest is not None and np.size(largest) not in (1, weight.shape[1]):
            raise WeightsDamaged(
                f"{name} takes {weight.shape[1]} channels, there are ranges of {np.size(largest)}: "
                "install weights, ranges and card again"
            )
        return Convolution(name, weight, bias, largest)

    try:
        if separable:
            levels = [_Level(convolution(f"{part}.0"), convolution(f"{part}.1")) for part in parts]
        else:
            levels = [_Level(None, convolution(part)) for part in parts]
    except KeyError as error:
        raise WeightsDamaged(
            f"these are no weights of STResNet or SRResNet3D ({error} is missing): install weights and card again"
        ) from error
    strangers = sorted(set(weights) - used) + sorted(name for name in ranges if f"{name}.weight" not in used)
    if strangers:
        raise WeightsDamaged(
            f"weights or ranges of another network: {strangers[0]} is not in one of {blocks} blocks; "
            "install weights, ranges and card again"
        )
    return levels


class _Ring:
    """The last planes of one tensor: plane p of the volume in slot p mod `depth`."""

    def __init__(self, depth: int, planes: Planes) -> None:
        self.planes = planes
        shape = [1, depth, planes.rows, planes.columns, planes.channels]
        self.values = _aligned(shape, planes.code.dtype)
        # OpenVINO's tensors are views and keep nothing alive: the ring does
        self._views = [self.values[:, k : k + 1] for k in range(depth)]
        self._slots = [ov.Tensor(view, list(view.shape), planes.code.type) for view in self._views]
        self._whole = ov.Tensor(self.values, shape, planes.code.type)

    def plane(self, p: int) -> NDArray[Any]:
        """The codes of plane `p`, (rows, columns, channels); a view."""
        view: NDArray[Any] = self._views[p % len(self._views)][0, 0]
        return view

    def slot(self, p: int) -> Any:
        """The tensor of plane `p`, to read or write."""
        return self._slots[p % len(self._slots)]

    def whole(self, _: int) -> Any:
        """The tensor of all slots."""
        return self._whole

    def outside(self, p: int) -> None:
        """Make plane `p` one outside the volume."""
        self.plane(p)[...] = self.planes.code.zero


def _aligned(shape: list[int], dtype: type[np.generic]) -> NDArray[Any]:
    """An array of any content that begins at a cache line."""
    size = math.prod(shape) * np.dtype(dtype).itemsize
    memory = np.empty(size + CACHE_LINE, np.uint8)
    first = -memory.ctypes.data % CACHE_LINE
    return memory[first : first + size].view(dtype).reshape(shape)


@dataclass
class _Segment:
    """What makes one level's plane from the rings before it; the parts are those of `pipelines.openvino_segments`."""

    window: tuple[_Ring, Convolution] | None
    skip: _Ring | None
    relu: bool
    trunk: _Ring | None
    plane: _Ring
    across: Convolution | None
    compiled: list[Any] = field(default_factory=list)
    """For plane p the model number p mod their number."""

    def __post_init__(self) -> None:
        self._tensors: dict[str, Callable[[int], Any]] = {"plane": self.plane.slot}
        if self.window is not None:
            self._tensors["window"] = self.window[0].whole
        if self.skip is not None:
            self._tensors["skip"] = self.skip.slot
        if self.trunk is not None:
            self._tensors["trunk"] = self.trunk.slot
        self._requests: list[Any] = []
        self._given: list[dict[str, Any]] = []
        """The tensors that each request has: for most planes the ones that it needs again."""

    @property
    def largest_bytes(self) -> int:
        """Size of its largest tensor."""
        return max(int(of_plane(0).byte_size) for of_plane in self._tensors.values())

    def compile(self, precision: Precision, threads: int, scratch: NDArray[np.uint8]) -> None:
        """Compile it for each place of the window, see `pipelines.openvino_core.compile_model`.

        Each is run once, on `scratch` of `largest_bytes`: what compiling took is only freed then, and the rings need no
        memory meanwhile. `run` gives the requests tensors of the rings before it uses them, so `scratch` may go.
        """
        for p in range(WINDOW if self.window else 1):
            model = segment(
                # slot s holds one of the planes p − 1, p, p + 1, and gets the weights of that one
                window=(self.window[0].planes, self.window[1], p - 1) if self.window else None,
                skip=self.skip.planes if self.skip else None,
                relu=self.relu,
                trunk=self.trunk.planes if self.trunk else None,
                plane=self.plane.planes,
                across=self.across,
            )
            self.compiled.append(compile_model(model, precision, threads))
            self._requests.append(self.compiled[-1].create_infer_request())
            self._given.append({name: _like(of_plane(p), scratch) for name, of_plane in self._tensors.items()})
            for name, tensor in self._given[-1].items():
                self._requests[-1].set_tensor(name, tensor)
            self._infer(p)
        give_memory_back()

    def run(self, p: int) -> None:
        """Make plane `p`."""
        k = p % len(self.compiled)
        for name, of_plane in self._tensors.items():
            tensor = of_plane(p)
            if self._given[k][name] is not tensor:
                self._requests[k].set_tensor(name, tensor)
                self._given[k][name] = tensor
        self._infer(k)

    def _infer(self, k: int) -> None:
        """Run model `k`."""
        self._requests[k].infer(share_outputs=True)  # else it returns a copy of all that it wrote
        # Dozens of models, of which one runs: each would keep planes of its own for what lies between its convolutions,
        # several times the memory of the rings. Given back, the next one takes the same memory.
        self.compiled[k].release_memory()


def _like(tensor: Any, memory: NDArray[np.uint8]) -> Any:
    """A tensor of the same type and size at the beginning of `memory`, to be used as long as that is there."""
    values = memory[: tensor.byte_size].view(tensor.data.dtype).reshape(tensor.shape)
    return ov.Tensor(values, tensor.shape, tensor.element_type)


class StreamEngine:
    """STResNet or SRResNet3D for planes of one size, ready to run.

    Parameters
    ----------
    weights
        The tensors of the file of weights by name.
    shape
        Rows and columns of the planes.
    precision
        What it runs in; with ``int8`` the convolutions in `ranges` are quantised, and the others, the skips and the
        sums are in `pipelines.openvino_core.float_of`.
    ranges
        For ``int8``: largest magnitude of the input of each convolution to quantise, or of each channel of it, by the
        name of the convolution.
    threads
        CPU cores to use.

    Attributes
    ----------
    halo : int
        Slices, rows and columns that a result depends on in each direction.

    Raises
    ------
    pipelines.base.WeightsDamaged
        If `weights` or `ranges` are those of another network.
    ValueError
        If `ranges` are missing for ``int8``.
    pipelines.openvino_core.PrecisionRefused
        If this CPU cannot run `precision`.
    """

    def __init__(
        self,
        weights: Mapping[str, NDArray[Any]],
        shape: tuple[int, int],
        *,
        precision: Precision,
        ranges: Mapping[str, Reach] | None,
        threads: int,
    ) -> None:
        if precision == "int8" and not ranges:
            raise ValueError("int8 needs the ranges of the activations: give them, or run in fp32 or bf16")
        self.shape = shape
        self._volume = 0
        levels = _levels(weights, ranges if ranges and precision == "int8" else {})
        n = self.halo = len(levels)
        features = len(levels[0].along.weight)
        working = Code.of_float(float_of(precision))

        def ring(depth: int, channels: int, code: Code) -> _Ring:
            return _Ring(depth, Planes(*shape, channels, code))

        single = Code.of_float("fp32")
        self._input, self._result = ring(n + 1, 1, single), ring(1, 1, single)
        # after which level the relu stands, and which level's trunk each adds: see the picture
        relus = set(range(1, n - 2, 2))
        adds = {**{k: k - 2 for k in range(2, n - 2, 2)}, n - 2: 0}
        # Trunks are kept until the last that adds them is there, as many steps later as levels lie between: that of the
        # head from level 0 to n − 2, those of the blocks from level 2 to n − 3. Each block adds to the plane of the one
        # before where that lies. A model may read and write one memory so as long as it adds pixel by pixel, as
        # OpenVINO does; one that did not would fail in the tests, and in INT8 in the check at start.
        head, sums = ring(n - 1, features, working), ring(max(n - 4, 1), features, working)
        self._trunks = {k: sums if k else head for k in adds.values()}
        self._rings = [
            ring(
                WINDOW,
                level.along.weight.shape[1],
                working
                if level.along.largest is None
                else Code.of_range(level.along.largest, signed=level.across is not None or k - 1 not in relus),
            )
            for k, level in enumerate(levels)
        ]
        self._segments = [  # what makes level k + 1 from level k; the first makes level 0 from the input
            _Segment(
                window=(self._rings[k], levels[k].along) if k >= 0 else None,
                skip=self._input if k in (-1, n - 1) else self._trunks[adds[k]] if k in adds else None,
                relu=k in relus,
                trunk=self._trunks.get(k),
                plane=self._rings[k + 1] if k + 1 < n else self._result,
                across=levels[k + 1].across if k + 1 < n else None,
            )
            for k in range(-1, n)
        ]
        scratch = np.zeros(max(made_by.largest_bytes for made_by in self._segments), np.uint8)
        for made_by in self._segments:
            # One after the other: side by side they leave gaps in the heap, which fill up while volumes run through.
            made_by.compile(precision, threads, scratch)

    @property
    def state_bytes(self) -> int:
        """Bytes of all rings: the memory of a volume of any length, beside that of one segment at work."""
        trunks = {id(ring): ring for ring in self._trunks.values()}.values()
        return sum(ring.values.nbytes for ring in (self._input, self._result, *self._rings, *trunks))

    @property
    def precisions(self) -> dict[str, str]:
        """What each convolution really runs in, see `pipelines.openvino_core.convolution_precisions`."""
        models = (model for made_by in self._segments for model in made_by.compiled)
        return {name: precision for model in models for name, precision in convolution_precisions(model).items()}

    def stream(self, planes: Iterator[Plane]) -> Iterator[Plane]:
        """Run the network over a volume of any number of planes.

        Parameters
        ----------
        planes
            Taken one at a time, and no sooner than needed: the result for a plane is there when the next `halo` have
            been taken, or none are left.

        Yields
        ------
        numpy.ndarray
            (y, x) in network units, one for each plane; the caller's own.

        Raises
        ------
        ValueError
            If a plane has another size than the engine.
        RuntimeError
            If it is asked for more after another stream of the same engine was begun: there is one set of rings.
        """
        self._volume += 1
        volume = self._volume
        for ring in self._rings:
            ring.outside(-1)
        end: int | None = None
        for t, plane in enumerate(chain(planes, repeat(None, self.halo))):
            if volume != self._volume:
                raise RuntimeError("another volume was begun on this engine before this one was through")
            if plane is not None:
                if plane.shape != self.shape:
                    raise ValueError(f"plane {t} has {plane.shape} rows and columns, the engine is for {self.shape}")
                self._input.plane(t)[..., 0] = plane
            elif end is None:
                end = t
            for k, made_by in enumerate(self._segments):
                p = t - k
                if p == end and k < self.halo:
                    self._rings[k].outside(p)
                elif p >= 0 and (end is None or p < end):
                    made_by.run(p)
            if t >= self.halo:
                yield self._result.plane(t - self.halo)[..., 0].copy()
