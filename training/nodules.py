"""Synthetic lung nodules of known size and place, put into a CT volume before low-dose noise is added to it.

A nodule is a ball whose radius varies with direction, solid or part-solid (a solid core in ground glass, the two kinds
of nodule of the Fleischner Society's glossary, Hansell et al., Radiology 2008;246:697), 4 to 20 mm in diameter. It is
drawn on a grid finer than the voxels and averaged (partial volume), then blurred as the scanner blurs: over the slice
thickness and in the plane to the band of the kernel. Every dose and every network then sees the same nodule.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.polynomial import legendre
from numpy.typing import NDArray
from scipy import ndimage

from training.blur import sigma_mm
from training.simulate import F50

Array = NDArray[np.float32]
Mask = NDArray[np.bool_]
Box = tuple[slice, slice, slice]
Triple = tuple[float, float, float]
Kind = Literal["solid", "part-solid"]

DIAMETER_MM = (4.0, 20.0)
"""Of the ball of the same volume; drawn evenly in its logarithm, because small ones are the more frequent."""
SOLID_HU = (0.0, 60.0)
GROUND_GLASS_HU = (-650.0, -300.0)
CORE_PART = (0.35, 0.6)
"""Diameter of the solid core as a part of the nodule's."""
PART_SOLID_FROM_MM = 6.0
"""Smaller ones have no core that a CT could show."""
SPICULATED_FROM_MM = 8.0
SOLID_TEXTURE_HU, GROUND_GLASS_TEXTURE_HU = 8.0, 30.0
"""Standard deviation of the tissue itself, correlated over `TEXTURE_MM`."""
TEXTURE_MM = 1.5

_DEGREES = (2, 2, 3, 3, 4, 4)
"""Of the Legendre polynomials that bend the surface, each around an axis of its own."""
_BEND = 0.3
"""Standard deviation of their amplitudes in ln(radius), divided by the degree."""
_SPICULES = (6, 12)
_SPICULE_WIDTH_RAD = 0.25
_SPICULE_HEIGHT = (0.3, 0.6)
"""In ln(radius)."""
_DIRECTIONS = 4000
"""Directions that volume and reach of a surface are taken from."""
_BETWEEN = 0.02
"""Part by which the radius may be smaller or larger between them."""
_FINE_MM = 0.25
"""Largest step of the grid that a nodule is drawn on."""
_PSF_REACH = 4.0
"""Standard deviations of the in-plane blur that are drawn."""

_COARSE_MM = 1.3
"""Pixels of the image that lungs are looked for in; finer ones are averaged."""
_SMOOTHING_MM = 2.0
_LUNG_HU = (-960.0, -500.0)
"""Of the smoothed image: without the air of the trachea, and without vessels of some 4 mm and more."""
_BODY_HU = -200.0
_LUNG_ML = 20.0
"""Smaller pieces are fat, gas or the rim of an airway."""
_VESSEL_MM = 4.0
"""Radius up to which something inside the lungs is a vessel; used where no place is free of vessels."""
_MARGINS_MM = (2.0, 1.0)
"""Between a nodule and the next structure: the second where the first leaves no place."""


@dataclass(frozen=True, slots=True)
class Nodule:
    """A nodule in a volume."""

    kind: Kind
    spiculated: bool
    diameter_mm: float
    """Of the ball of the same volume."""
    centre_zyx: Triple
    """In voxels of the volume."""
    hu: float
    """Of the solid part."""
    ground_glass_hu: float | None
    box: Box
    """Where in the volume `mask` lies."""
    mask: Mask
    """(z, y, x) of `box`: voxels of which the nodule fills half or more, or half of what it fills of any."""


class Surface:
    """A closed surface around the origin, star-shaped, of the volume of a ball.

    ``r(u) = R·exp(Σ a·P_l(u·n) + max h·exp((u·n − 1)/w²))`` in the direction u: zonal harmonics of low order around
    random axes n, and spicules.
    """

    def __init__(self, diameter_mm: float, spicules: int, rng: np.random.Generator) -> None:
        self._axes = _directions(rng, len(_DEGREES))
        self._bends = rng.normal(0, _BEND / np.array(_DEGREES))
        self._spicule_axes = _directions(rng, spicules)
        self._spicule_heights = rng.uniform(*_SPICULE_HEIGHT, spicules)
        self._radius_mm = 1.0
        r = self._radius(_sphere(_DIRECTIONS))
        # volume = ⟨r³⟩·4π/3
        self._radius_mm = float(diameter_mm / 2 / np.cbrt(np.mean(r**3)))
        self._core_mm = float(r.min()) * self._radius_mm * (1 - _BETWEEN)
        self.reach_mm = float(r.max()) * self._radius_mm * (1 + _BETWEEN)

    def _radius(self, u: NDArray[np.floating]) -> NDArray[np.floating]:
        """Radius in mm in each direction (n, 3)."""
        logarithm = np.zeros(len(u), u.dtype)
        for degree, axis, bend in zip(_DEGREES, self._axes, self._bends, strict=True):
            logarithm += legendre.legval(u @ axis.astype(u.dtype), bend * np.eye(degree + 1, dtype=u.dtype)[degree])
        spicules = np.zeros_like(logarithm)
        for axis, height in zip(self._spicule_axes, self._spicule_heights, strict=True):
            np.maximum(spicules, height * np.exp((u @ axis.astype(u.dtype) - 1) / _SPICULE_WIDTH_RAD**2), out=spicules)
        return np.asarray(self._radius_mm * np.exp(logarithm + spicules))

    def inside(self, z: NDArray[np.floating], y: NDArray[np.floating], x: NDArray[np.floating]) -> Mask:
        """Which points of the grid with these axes (mm from the centre) lie inside, (len(z), len(y), len(x))."""
        axes = [axis.astype(np.float32) for axis in (z, y, x)]
        distance2 = axes[0][:, None, None] ** 2 + axes[1][:, None] ** 2 + axes[2] ** 2
        out = distance2 < self._core_mm**2
        near = np.nonzero((distance2 <= self.reach_mm**2) & ~out)
        points = np.stack([axis[k] for axis, k in zip(axes, near, strict=True)], axis=1)
        distance = np.sqrt(distance2[near])
        out[near] = distance <= self._radius(points / distance[:, None])
        return np.asarray(out)


def _directions(rng: np.random.Generator, n: int) -> NDArray[np.floating]:
    vectors = rng.normal(size=(n, 3))
    return np.asarray(vectors / np.linalg.norm(vectors, axis=1, keepdims=True))


def _sphere(n: int) -> NDArray[np.floating]:
    """`n` directions, evenly spread (a Fibonacci lattice)."""
    k = np.arange(n) + 0.5
    z, turn = 1 - 2 * k / n, math.pi * (1 + math.sqrt(5)) * k
    ring = np.sqrt(1 - z**2)
    return np.stack([z, ring * np.sin(turn), ring * np.cos(turn)], axis=1)


@dataclass(frozen=True, slots=True)
class _Plan:
    """A nodule without its place."""

    kind: Kind
    spiculated: bool
    diameter_mm: float
    hu: float
    ground_glass_hu: float | None
    surface: Surface
    core: Surface | None
    core_at_mm: Triple


def _plan(diameter_mm: float, rng: np.random.Generator) -> _Plan:
    part_solid = diameter_mm >= PART_SOLID_FROM_MM and rng.random() < 0.5
    spiculated = not part_solid and diameter_mm >= SPICULATED_FROM_MM and rng.random() < 0.5
    surface = Surface(diameter_mm, int(rng.integers(*_SPICULES)) if spiculated else 0, rng)
    hu = float(rng.uniform(*SOLID_HU))
    if not part_solid:
        return _Plan("solid", spiculated, diameter_mm, hu, None, surface, None, (0.0, 0.0, 0.0))
    core_mm = diameter_mm * float(rng.uniform(*CORE_PART))
    z, y, x = _directions(rng, 1)[0] * rng.uniform(0, 0.25) * (diameter_mm - core_mm)
    ground_glass = float(rng.uniform(*GROUND_GLASS_HU))
    return _Plan("part-solid", False, diameter_mm, hu, ground_glass, surface, Surface(core_mm, 0, rng), (z, y, x))


@dataclass(frozen=True, slots=True)
class _Drawn:
    """A nodule on the voxels of a box: parts of each voxel's signal, 0 to 1, and the mask."""

    box: Box
    solid: Array
    ground_glass: Array
    mask: Mask


def _draw(
    plan: _Plan, centre: Triple, spacing_mm: Triple, thickness_mm: float, f50: float, shape: Sequence[int]
) -> _Drawn:
    """Draw `plan` around `centre` (voxels) and cut off what lies outside of `shape`."""
    sigma_px = sigma_mm(f50) / spacing_mm[1]
    blur_mm = (thickness_mm / 2, _PSF_REACH * sigma_px * spacing_mm[1], _PSF_REACH * sigma_px * spacing_mm[2])
    first = [
        math.floor(c - (plan.surface.reach_mm + b) / d) for c, b, d in zip(centre, blur_mm, spacing_mm, strict=True)
    ]
    stop = [
        math.ceil(c + (plan.surface.reach_mm + b) / d) + 1 for c, b, d in zip(centre, blur_mm, spacing_mm, strict=True)
    ]
    parts = [math.ceil(d / _FINE_MM) // 2 * 2 + 1 for d in spacing_mm]  # odd: one lies on the centre of the voxel
    axes = [
        ((np.arange((b - a) * n) + 0.5) / n - 0.5 + a - c) * d
        for a, b, n, c, d in zip(first, stop, parts, centre, spacing_mm, strict=True)
    ]
    inside = plan.surface.inside(*axes)
    core = (
        inside
        if plan.core is None
        else inside & plan.core.inside(*(axis - offset for axis, offset in zip(axes, plan.core_at_mm, strict=True)))
    )
    size = [b - a for a, b in zip(first, stop, strict=True)]
    window = round(thickness_mm / spacing_mm[0] * parts[0]) // 2 * 2 + 1

    def in_plane(fine: NDArray[np.floating] | Mask) -> Array:
        blocks = fine.reshape(-1, size[1], parts[1], size[2], parts[2])
        return np.asarray(blocks.mean(axis=(2, 4), dtype=np.float32))

    def as_scanned(fine: Array) -> Array:
        slices = ndimage.uniform_filter1d(fine, window, axis=0, mode="constant")[parts[0] // 2 :: parts[0]]
        return np.asarray(
            ndimage.gaussian_filter(slices, (0, sigma_px, sigma_px), mode="constant", truncate=_PSF_REACH)
        )

    of_all, of_core = in_plane(inside), in_plane(core)
    filled = of_all.reshape(size[0], parts[0], size[1], size[2]).mean(axis=1)
    solid = as_scanned(of_core)
    cut = tuple(slice(max(-a, 0), min(b, n) - a) for a, b, n in zip(first, stop, shape, strict=True))
    box = tuple(slice(a + c.start, a + c.stop) for a, c in zip(first, cut, strict=True))
    return _Drawn(
        (box[0], box[1], box[2]),
        solid[cut],
        (as_scanned(of_all) - solid)[cut],
        np.asarray(filled >= 0.5 * filled.max())[cut],  # a small one between two thick slices fills half of none
    )


def insert(
    hu: Array,
    spacing_mm: Triple,
    count: int,
    seed: int,
    *,
    thickness_mm: float = 0.0,
    f50: float = F50,
    noise: Array | None = None,
) -> tuple[Array, tuple[Nodule, ...]]:
    """Put nodules into the lungs of a volume, away from each other, and from pleura and vessels where there is room.

    A nodule takes the place of the lung that was there, and of the noise of that lung; `noise` gives it back.

    Parameters
    ----------
    hu
        (z, y, x) HU, padding as air.
    spacing_mm
        Of voxels along (z, y, x); pixels are square.
    count
        Number of nodules.
    seed
        Same seed and volume, same nodules.
    thickness_mm
        Of slices; 0: as thick as they are apart.
    f50
        Half-value frequency of the in-plane blur, 1/mm.
    noise
        (z, y, x) HU, noise of a scan of this volume at its dose. None for a volume without noise.

    Returns
    -------
    tuple
        The volume with nodules, float32 HU, and the nodules, the largest first.

    Raises
    ------
    ValueError
        If no lung is found, or it has no room for so many.
    """
    rng = np.random.default_rng(seed)
    low, high = np.log(DIAMETER_MM)
    # one in each of `count` equal parts of the range, so that few nodules span it too; large ones need the room first
    diameters = np.exp(low + (high - low) * (np.arange(count)[::-1] + rng.random(count)) / max(count, 1))
    plans = [_plan(diameter, rng) for diameter in diameters.tolist()]
    room = _Room(hu, spacing_mm)
    centres = []
    for k, plan in enumerate(plans, 1):
        centre = room.take(plan.surface.reach_mm, rng)
        if centre is None:
            raise ValueError(
                f"the lung has no room for nodule {k} of {count} ({plan.diameter_mm:.1f} mm): ask for fewer nodules, "
                "or give a volume with more lung"
            )
        centres.append(centre)
    out = hu.astype(np.float32)
    nodules = []
    for plan, centre in zip(plans, centres, strict=True):
        drawn = _draw(plan, centre, spacing_mm, thickness_mm or spacing_mm[0], f50, hu.shape)
        part = out[drawn.box]
        covered = drawn.solid + drawn.ground_glass
        part *= 1 - covered
        part += drawn.solid * np.float32(plan.hu) + drawn.ground_glass * np.float32(plan.ground_glass_hu or 0)
        part += _texture(drawn, spacing_mm, rng)
        if noise is not None:
            part += covered * noise[drawn.box]
        nodules.append(
            Nodule(
                plan.kind,
                plan.spiculated,
                plan.diameter_mm,
                centre,
                plan.hu,
                plan.ground_glass_hu,
                drawn.box,
                drawn.mask,
            )
        )
    return out, tuple(nodules)


def _texture(drawn: _Drawn, spacing_mm: Triple, rng: np.random.Generator) -> Array:
    """What the tissue of the nodule varies by, HU; its sum is 0."""
    white = rng.standard_normal(drawn.mask.shape)
    field = ndimage.gaussian_filter(white, [TEXTURE_MM / d for d in spacing_mm], mode="wrap")
    amplitude = SOLID_TEXTURE_HU * drawn.solid + GROUND_GLASS_TEXTURE_HU * drawn.ground_glass
    field -= np.average(field, weights=amplitude)
    return np.asarray(amplitude * field / field.std(), np.float32)


def _coarse_lungs(hu: Array, spacing_mm: Triple) -> tuple[Mask, int]:
    """Where lung is, without its larger vessels, from an image smoothed over 2 mm; (z, y, x).

    On pixels larger by the factor that is returned too. Lung that the edge of the image cuts is left out.
    """
    factor = max(round(_COARSE_MM / spacing_mm[1]), 1)
    rows, columns = (n // factor for n in hu.shape[1:])
    blocks = hu[:, : rows * factor, : columns * factor].reshape(-1, rows, factor, columns, factor)
    voxel = (spacing_mm[0], spacing_mm[1] * factor, spacing_mm[2] * factor)
    smooth = ndimage.gaussian_filter(blocks.mean(axis=(2, 4)), [_SMOOTHING_MM / d for d in voxel], mode="nearest")
    body = np.stack([_largest_filled(plane) for plane in smooth > _BODY_HU])
    lung = body & (smooth > _LUNG_HU[0]) & (smooth < _LUNG_HU[1])
    labels, _ = ndimage.label(lung)
    large = np.bincount(labels.ravel()) * math.prod(voxel) / 1000 >= _LUNG_ML
    large[0] = False
    return np.asarray(large[labels]), factor


def _largest_filled(plane: Mask) -> Mask:
    """The largest piece of one slice with its holes: the body, without the table."""
    labels, count = ndimage.label(plane)
    if count == 0:
        return plane
    sizes = np.bincount(labels.ravel())
    return np.asarray(ndimage.binary_fill_holes(labels == 1 + int(sizes[1:].argmax())))


class _Room:
    """Where in the lungs there is room for a nodule: distances (mm) to what must not be touched."""

    def __init__(self, hu: Array, spacing_mm: Triple) -> None:
        lung, self._factor = _coarse_lungs(hu, spacing_mm)
        if not lung.any():
            raise ValueError("no lung is found in the volume: nodules need a chest CT")
        self._voxel_mm = np.array((spacing_mm[0], spacing_mm[1] * self._factor, spacing_mm[2] * self._factor))
        closed = self._distance(self._distance_out(lung) <= _VESSEL_MM) > _VESSEL_MM
        k = np.arange(len(lung))
        ends_mm = (np.minimum(k, k[::-1]) + 0.5) * spacing_mm[0]  # thick slices: half of one counts
        self._free = [np.minimum(self._distance(m), ends_mm[:, None, None]) for m in (lung, lung | closed)]

    def _distance(self, mask: Mask) -> NDArray[np.float64]:
        """From each voxel to the next one outside of the mask or of the volume."""
        distance = ndimage.distance_transform_edt(np.pad(mask, 1), sampling=self._voxel_mm)
        return np.asarray(distance[1:-1, 1:-1, 1:-1])

    def _distance_out(self, mask: Mask) -> NDArray[np.float64]:
        return np.asarray(ndimage.distance_transform_edt(~mask, sampling=self._voxel_mm))

    def take(self, reach_mm: float, rng: np.random.Generator) -> Triple | None:
        """A place for something of this radius, in voxels of the volume, now taken; None if there is none.

        Free of vessels if there is such a place, else free of the pleura.
        """
        for distance in self._free:
            for margin in _MARGINS_MM:
                places = np.flatnonzero(distance >= reach_mm + margin)
                if places.size:
                    at = np.unravel_index(int(rng.choice(places)), distance.shape)
                    self._occupy(at, reach_mm)
                    z, y, x = (int(k) for k in at)
                    # centre of the coarse pixel, moved by less than half a voxel: margins allow for it
                    shift = (self._factor - 1) / 2
                    dz, dy, dx = rng.uniform(-0.5, 0.5, 3).tolist()
                    return z + dz, y * self._factor + shift + dy, x * self._factor + shift + dx
        return None

    def _occupy(self, at: Sequence[np.intp], reach_mm: float) -> None:
        z, y, x = (
            ((np.arange(n) - k) * d) ** 2
            for n, k, d in zip(self._free[0].shape, at, self._voxel_mm.tolist(), strict=True)
        )
        outside = np.sqrt(z[:, None, None] + y[:, None] + x) - reach_mm
        for distance in self._free:
            np.minimum(distance, outside, out=distance)
