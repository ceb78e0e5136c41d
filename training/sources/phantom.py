"""A chest-and-abdomen phantom in HU: unlimited truth without a patient and without noise.

Every structure is an ellipsoid, a tube or a periodic arrangement of them, drawn with analytic anti-aliasing (a
voxel that a surface crosses has the fraction covered), then blurred to the band limit of the reconstruction kernel so
that edges and noise live in the same band. Parameters are drawn once per seed and vary smoothly along z.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import fft
from scipy.ndimage import gaussian_filter1d

from training.blur import sigma_mm

Array = NDArray[np.float32]

AIR_HU = -1000.0
LUNG_HU = -850.0
FAT_HU = -100.0
MUSCLE_HU = 55.0

_FRACTAL_POWER = 1.4
"""Of the frequency, with which the amplitude of the texture falls."""


@dataclass(frozen=True, slots=True)
class _Ellipsoid:
    """Centre, semi-axes (mm, along x, y, z), rotation in the axial plane (rad) and value (HU)."""

    cx: float
    cy: float
    cz: float
    a: float
    b: float
    c: float
    angle: float
    hu: float


class _Slice:
    """One axial slice under construction; coordinates in mm from the scanner axis."""

    def __init__(self, image: Array, pixel_mm: float) -> None:
        self.image = image
        self.pixel_mm = pixel_mm
        n = image.shape[0]
        self.axis = ((np.arange(n) - (n - 1) / 2) * pixel_mm).astype(np.float32)

    def _range(self, centre: float, reach: float) -> slice:
        n = len(self.axis)
        first = int(np.floor((centre - reach) / self.pixel_mm + (n - 1) / 2)) - 1
        last = int(np.ceil((centre + reach) / self.pixel_mm + (n - 1) / 2)) + 2
        return slice(max(first, 0), max(min(last, n), 0))

    def cover(self, cx: float, cy: float, a: float, b: float, angle: float) -> tuple[slice, slice, Array]:
        """Fraction of each pixel that an ellipse covers, inside its bounding box.

        The distance to the ellipse is the first-order one, ``k0·(k0 − 1)/k1`` with ``k0 = |p/r|``, ``k1 = |p/r²|``.
        """
        reach = max(a, b) + self.pixel_mm
        rows, cols = self._range(cy, reach), self._range(cx, reach)
        y = self.axis[rows, None] - np.float32(cy)
        x = self.axis[None, cols] - np.float32(cx)
        cos, sin = np.float32(np.cos(angle)), np.float32(np.sin(angle))
        u, v = x * cos + y * sin, y * cos - x * sin
        k0 = np.sqrt((u / np.float32(a)) ** 2 + (v / np.float32(b)) ** 2)
        k1 = np.sqrt((u / np.float32(a * a)) ** 2 + (v / np.float32(b * b)) ** 2)
        inside = np.clip(
            np.float32(0.5) + k0 * (1 - k0) / np.maximum(k1, np.float32(1e-6)) / np.float32(self.pixel_mm), 0, 1
        )
        inside[k0 < np.float32(1e-3)] = 1
        return rows, cols, inside

    def paint(self, cx: float, cy: float, a: float, b: float, angle: float, hu: float) -> None:
        """Replace what an ellipse covers by `hu`."""
        if min(a, b) < 0.1 * self.pixel_mm:
            return
        rows, cols, w = self.cover(cx, cy, a, b, angle)
        part = self.image[rows, cols]
        part += w * (np.float32(hu) - part)

    def ellipsoid(self, shape: _Ellipsoid, z: float, grow_mm: float = 0.0, hu: float | None = None) -> None:
        """Paint the cut of an ellipsoid with the plane `z`, its semi-axes changed by `grow_mm`."""
        c = shape.c + grow_mm
        if c <= 0 or abs(z - shape.cz) >= c:
            return
        s = float(np.sqrt(1 - ((z - shape.cz) / c) ** 2))
        a, b = (shape.a + grow_mm) * s, (shape.b + grow_mm) * s
        if a > 0 and b > 0:
            self.paint(shape.cx, shape.cy, a, b, shape.angle, shape.hu if hu is None else hu)


class _Anatomy:
    """All parameters of one body. z = 0 is the dome of the diaphragm, +z towards the feet, +y towards the back."""

    def __init__(self, rng: np.random.Generator) -> None:
        def u(lo: float, hi: float) -> float:
            return float(rng.uniform(lo, hi))

        def blob(cx: float, cy: float, cz: float, a: float, b: float, c: float, hu: float) -> _Ellipsoid:
            return _Ellipsoid(
                cx + u(-6, 6),
                cy + u(-5, 5),
                cz + u(-8, 8),
                a * u(0.9, 1.1),
                b * u(0.9, 1.1),
                c * u(0.9, 1.1),
                u(-0.25, 0.25),
                hu,
            )

        self.a, self.b = u(135, 160), u(95, 122)
        self.fat = u(8, 24)
        self.phase = u(0, 2 * np.pi)
        self.contrast = u(110, 250) if rng.random() < 0.6 else u(38, 50)
        k = self.a / 155.0
        enhanced = self.contrast > 100
        self.lungs = [blob(side * 72 * k, -5, -55, 62 * k, 82 * k, 135, LUNG_HU + u(-30, 30)) for side in (-1, 1)]
        self.mediastinum = blob(0, 0, -90, 34 * k, 70 * k, 150, u(-90, 30))
        self.heart = blob(22 * k, -25 * k, -38, 55 * k, 45 * k, 50, u(90, 180) if enhanced else u(38, 50))
        self.myocardium = u(80, 130) if enhanced else u(42, 55)
        self.liver = blob(-62 * k, -8 * k, 72, 78 * k, 78 * k, 76, u(85, 125) if enhanced else u(45, 70))
        self.liver_left = blob(-5 * k, -48 * k, 60, 62 * k, 34 * k, 46, self.liver.hu)
        self.spleen = blob(95 * k, 38 * k, 62, 30 * k, 46 * k, 50, u(90, 140) if enhanced else u(42, 60))
        self.stomach = blob(62 * k, -30 * k, 62, 42 * k, 36 * k, 46, u(5, 40))
        self.gas = blob(62 * k, -45 * k, 58, 26 * k, 14 * k, 30, AIR_HU + 15)
        self.kidneys = [blob(s * 62 * k, 45 * k, 128, 27 * k, 24 * k, 52, u(30, 50)) for s in (-1, 1)]
        self.cortex_hu = u(120, 190) if enhanced else self.kidneys[0].hu + 4
        self.bowel = [
            blob(u(-90, 90) * k, u(-65, 15) * k, u(110, 230), u(10, 22), u(10, 20), u(15, 40), u(10, 60))
            for _ in range(22)
        ]
        self.bowel_gas = [i % 3 == 0 for i in range(22)]
        liver = self.liver
        self.lesions = [
            _Ellipsoid(
                liver.cx + liver.a * u(-0.6, 0.6),
                liver.cy + liver.b * u(-0.6, 0.6),
                liver.cz + liver.c * u(-0.7, 0.7),
                r := u(3, 13),
                r * u(0.8, 1.2),
                r,
                0.0,
                liver.hu + u(12, 60) * float(rng.choice([-1, 1])),
            )
            for _ in range(24)
        ]
        self.nodules = [
            _Ellipsoid(
                lung.cx + lung.a * u(-0.7, 0.7),
                lung.cy + lung.b * u(-0.7, 0.7),
                lung.cz + lung.c * u(-0.4, 0.9),
                r := u(1.5, 8),
                r * u(0.8, 1.2),
                r,
                0.0,
                float(rng.choice([30.0, 45.0, -550.0])),
            )
            for lung in self.lungs
            for _ in range(12)
        ]
        self.marrow_hu, self.cortical_hu = u(330, 420), u(650, 1000)
        self.vertebra_mm, self.rib_mm = u(31, 37), u(26, 32)
        self.vertebra_z, self.rib_z, self.rib_slope = u(0, 30), u(0, 30), u(50, 75)
        self.spine = (u(-3, 3), self.b * 0.62, u(18, 22), u(14, 17))
        self.aorta = (14 * k, self.b * 0.62 - 26, u(9, 13))
        self.cava = (-18 * k, self.b * 0.62 - 28, u(9, 12))


def _body(s: _Slice, body: _Anatomy, z: float) -> tuple[float, float]:
    """Skin, subcutaneous fat, muscle wall and the fat of the abdominal cavity; semi-axes of the wall (mm)."""
    a = body.a * (1 + 0.03 * np.sin(z / 90 + body.phase))
    b = body.b * (1 + 0.04 * np.sin(z / 120 + body.phase / 2))
    fat = body.fat * (1 + 0.3 * np.sin(z / 70 + body.phase))
    s.paint(0, 0, a + fat + 2, b + 0.8 * fat + 2, 0, 20)  # skin
    s.paint(0, 0, a + fat, b + 0.8 * fat, 0, FAT_HU)
    s.paint(0, 0, a, b, 0, MUSCLE_HU)
    s.paint(0, -4, a - 16, b - 18, 0, FAT_HU - 5)
    for side in (-1, 1):  # muscles along the spine, with the fat between them
        s.paint(side * 30, b * 0.82, 24, 15, side * 0.3, MUSCLE_HU + 3)
        s.paint(side * 52, b * 0.80, 3, 13, side * 0.8, FAT_HU)
    return a, b


def _bones(s: _Slice, body: _Anatomy, z: float, a: float, b: float) -> None:
    """Vertebrae with discs, canal and processes; ribs that run obliquely around the wall; sternum."""
    x0, y0, ra, rb = body.spine
    phase = ((z - body.vertebra_z) / body.vertebra_mm) % 1.0
    disc = phase < 0.22
    waist = 1 - 0.10 * np.sin(np.pi * (phase - 0.22) / 0.78) if not disc else 1.0
    s.paint(x0, y0, ra * waist, rb * waist, 0, 85 if disc else body.cortical_hu)
    if not disc:
        s.paint(x0, y0, ra * waist - 2.5, rb * waist - 2.5, 0, body.marrow_hu)
        for side in (-1, 1):  # transverse processes
            s.paint(x0 + side * 27, y0 + rb + 9, 13, 5, side * 0.35, body.cortical_hu)
            s.paint(x0 + side * 27, y0 + rb + 9, 10.5, 2.5, side * 0.35, body.marrow_hu)
    s.paint(x0, y0 + rb + 18, 4.5, 13, 0, body.cortical_hu * 0.8)
    s.paint(x0, y0 + rb + 8, 11, 10, 0, body.cortical_hu)
    s.paint(x0, y0 + rb + 8, 8.5, 7.5, 0, 25)
    if z < 10:
        s.paint(0, -b + 9, 17, 6.5, 0, body.cortical_hu * 0.7)
        s.paint(0, -b + 9, 14.5, 4, 0, body.marrow_hu * 0.8)
    if z < 95:  # ribs sink by `rib_slope` from back to front: an axial slice meets each of them once per side
        wall_a, wall_b = a - 10, b - 10
        y, x = s.axis[:, None], s.axis[None, :]
        r = np.sqrt((x / np.float32(wall_a)) ** 2 + (y / np.float32(wall_b)) ** 2)
        ring = np.flatnonzero((np.abs(r - 1) < 0.11).ravel())
        yy = ring // len(s.axis)
        back = s.axis[yy] / np.float32(wall_b) / r.ravel()[ring]
        along = (z - body.rib_z + np.float32(body.rib_slope) * back) / np.float32(body.rib_mm)
        dz = (along - np.round(along)) * np.float32(body.rib_mm)
        dr = (r.ravel()[ring] - 1) * np.float32((wall_a + wall_b) / 2)
        front = back < -0.80  # cartilage: no bone in front
        for half_z, half_r, hu in ((6.0, 4.5, body.cortical_hu), (4.0, 2.5, body.marrow_hu)):
            q = np.sqrt((dz / np.float32(half_z)) ** 2 + (dr / np.float32(half_r)) ** 2)
            w = np.clip(0.5 + (1 - q) * np.float32(half_r / s.pixel_mm), 0, 1)
            value = np.where(front, np.float32(90), np.float32(hu))
            flat = s.image.reshape(-1)
            flat[ring] += w * (value - flat[ring])


def _organs(s: _Slice, body: _Anatomy, z: float, lung_tree: Array, airways: Array, liver_tree: Array) -> None:
    """Everything inside the wall, far organs first."""
    for loop, gas in zip(body.bowel, body.bowel_gas, strict=True):
        s.ellipsoid(loop, z, 2.5, 50)
        s.ellipsoid(loop, z, hu=AIR_HU + 20 if gas else None)
    before = s.image.copy()
    for lung in body.lungs:
        s.ellipsoid(lung, z, 1.2, 20)
        s.ellipsoid(lung, z)
    lung_part = np.clip((before - s.image - 600) / 250, 0, 1)  # 1 where lung was painted over soft tissue or fat
    s.image += lung_part * lung_tree * (np.float32(body.contrast) - s.image)
    s.image += lung_part * airways * (np.float32(AIR_HU + 10) - s.image)
    for nodule in body.nodules:
        rows, cols = (
            s._range(nodule.cy, nodule.a * 1.3 + s.pixel_mm),
            s._range(nodule.cx, nodule.a * 1.3 + s.pixel_mm),
        )
        part = s.image[rows, cols].copy()
        s.ellipsoid(nodule, z)
        changed = s.image[rows, cols]
        changed[...] = part + lung_part[rows, cols] * (changed - part)
    s.ellipsoid(body.mediastinum, z)
    if z < -60:
        s.paint(0, -8, 9.5, 9.0, 0, -60)
        s.paint(0, -8, 8, 7.5, 0, AIR_HU + 5)  # trachea
    s.ellipsoid(body.heart, z, 9, body.myocardium)
    s.ellipsoid(body.heart, z, 0)
    for shape in (body.stomach, body.gas, body.spleen, body.liver_left):
        s.ellipsoid(shape, z)
    before = s.image.copy()
    s.ellipsoid(body.liver, z)
    liver_part = np.clip(1 - np.abs(s.image - np.float32(body.liver.hu)) / 20, 0, 1)
    s.image += liver_part * liver_tree * np.float32(35 if body.contrast > 100 else -12)
    for lesion in body.lesions:
        s.ellipsoid(lesion, z)
    for kidney in body.kidneys:
        s.ellipsoid(kidney, z, 3.5, FAT_HU)
        s.ellipsoid(kidney, z, hu=body.cortex_hu)
        s.ellipsoid(kidney, z, -8)
    for x, y, radius in (body.aorta, body.cava):
        x += 4 * np.sin(z / 60 + body.phase)
        s.paint(x, y, radius + 1.5, radius + 1.5, 0, 45)
        s.paint(x, y, radius, radius * 0.92, 0, body.contrast)


def _tree(
    shape: tuple[int, int, int],
    z_mm: NDArray[np.floating],
    pixel_mm: float,
    roots: list[tuple[NDArray[np.floating], float]],
    tubes: int,
    radius_mm: tuple[float, float],
    rng: np.random.Generator,
) -> Array:
    """Covered fraction of each voxel by tubes that run outwards from each root (x, y, z) and taper, (z, y, x).

    A tube is a row of balls. In a slice thicker than the tube the fraction is the part of the thickness it fills.
    """
    out = np.zeros(shape, np.float32)
    spacing = float(z_mm[1] - z_mm[0]) if len(z_mm) > 1 else 2.0 * radius_mm[1]
    n = shape[1]
    axis = ((np.arange(n) - (n - 1) / 2) * pixel_mm).astype(np.float32)
    for root, length in roots:
        for _ in range(tubes):
            direction = rng.normal(size=3) * (0.7, 1.0, 1.0)
            direction /= np.linalg.norm(direction)
            bend = rng.normal(size=3) * 0.35
            r0 = float(np.exp(rng.uniform(np.log(radius_mm[0]), np.log(radius_mm[1]))))
            s = 0.06
            while s < 1:
                radius = max(r0 * (1 - 0.85 * s), 0.45)
                p = root + length * (direction * s + bend * s * s)
                s += max(0.8 * radius, 0.6 * pixel_mm) / length
                k0, k1 = np.searchsorted(z_mm, (p[2] - radius - spacing / 2, p[2] + radius + spacing / 2))
                if k0 == k1:
                    continue
                reach = radius + pixel_mm
                lo = np.floor((p[:2] - reach) / pixel_mm + (n - 1) / 2).astype(int)
                hi = np.ceil((p[:2] + reach) / pixel_mm + (n - 1) / 2).astype(int) + 1
                if lo.min() < 0 or hi.max() > n:
                    continue
                d2 = (axis[lo[1] : hi[1], None] - np.float32(p[1])) ** 2 + (
                    axis[None, lo[0] : hi[0]] - np.float32(p[0])
                ) ** 2
                for k in range(k0, k1):
                    dz = max(abs(z_mm[k] - p[2]) - spacing / 2, 0.0)
                    w = np.clip(0.5 + (radius - np.sqrt(d2 + np.float32(dz * dz))) / pixel_mm, 0, 1)
                    w *= np.float32(min(1.0, 2 * radius / spacing))
                    part = out[k, lo[1] : hi[1], lo[0] : hi[0]]
                    np.maximum(part, w, out=part)
    return out


def _fractal(shape: tuple[int, int, int], voxel_mm: tuple[float, float, float], rng: np.random.Generator) -> Array:
    """Gaussian texture of standard deviation 1, of amplitude ``1/f^_FRACTAL_POWER`` above 1/50 mm (f in 1/mm)."""
    padded = tuple(fft.next_fast_len(n + 8, real=True) if n < 200 else n for n in shape)
    white = rng.standard_normal(padded, dtype=np.float32)
    fz, fy = (np.fft.fftfreq(n, d).astype(np.float32) for n, d in zip(padded[:2], voxel_mm[:2], strict=True))
    fx = np.fft.rfftfreq(padded[2], voxel_mm[2]).astype(np.float32)
    f2 = fz[:, None, None] ** 2 + fy[None, :, None] ** 2 + fx[None, None, :] ** 2
    spectrum = fft.rfftn(white)
    spectrum *= (f2 + np.float32(0.02**2)) ** np.float32(-_FRACTAL_POWER / 2)
    texture = fft.irfftn(spectrum, s=padded)[: shape[0], : shape[1], : shape[2]]
    return np.asarray(texture / texture.std(), np.float32)


def chest_abdomen(
    n_slices: int,
    matrix: int = 512,
    pixel_mm: float = 0.8,
    spacing_mm: float = 2.5,
    seed: int = 0,
    f50: float = 0.5,
) -> Array:
    """Noise-free chest-and-abdomen phantom around the diaphragm, head first.

    Parameters
    ----------
    n_slices, matrix
        Size of the volume (z, y, x) = (n_slices, matrix, matrix).
    pixel_mm, spacing_mm
        Pixel size and distance between slices. The body is at most 400 mm wide: it should fit ``matrix·pixel_mm``.
    seed
        Everything random: size, organs, contrast, vessels, lesions, texture, the position along z.
    f50
        Spatial frequency in 1/mm at which the in-plane blur (Gaussian) has halved the contrast.

    Returns
    -------
    numpy.ndarray
        float32 HU, (z, y, x).
    """
    rng = np.random.default_rng(seed)
    body = _Anatomy(rng)
    z_mm = (np.arange(n_slices) - (n_slices - 1) / 2) * spacing_mm + rng.uniform(-40, 60)
    shape = (n_slices, matrix, matrix)
    hila = [(np.array([lung.cx * 0.45, lung.cy, lung.cz + 20.0]), 105.0) for lung in body.lungs]
    liver = body.liver
    lung_tree = _tree(shape, z_mm, pixel_mm, hila, 260, (0.9, 4.5), rng)
    airways = _tree(
        shape, z_mm, pixel_mm, [(root + np.array([0.0, 6.0, 0.0]), 60.0) for root, _ in hila], 30, (1.0, 3.5), rng
    )
    portal = (np.array([liver.cx + 0.35 * liver.a, liver.cy, liver.cz]), 85.0)
    liver_tree = _tree(shape, z_mm, pixel_mm, [portal], 70, (0.9, 4.0), rng)
    hu = np.full(shape, AIR_HU, np.float32)
    for k, z in enumerate(z_mm):
        s = _Slice(hu[k], pixel_mm)
        a, b = _body(s, body, float(z))
        _organs(s, body, float(z), lung_tree[k], airways[k], liver_tree[k])
        _bones(s, body, float(z), a, b)
    texture = _fractal(shape, (spacing_mm, pixel_mm, pixel_mm), rng)
    # HU of texture (one standard deviation) by tissue: none in air, strong in lung and trabecular bone
    amplitude = np.interp(hu, (-985, -900, -700, -200, -90, 0, 300, 400, 700), (0, 14, 14, 5, 4, 6, 8, 25, 15)).astype(
        np.float32
    )
    hu += amplitude * texture
    if n_slices > 2:
        gaussian_filter1d(hu, 0.35, axis=0, output=hu, mode="nearest")
    sigma_px = sigma_mm(f50) / pixel_mm
    for axis in (1, 2):
        gaussian_filter1d(hu, sigma_px, axis=axis, output=hu, mode="nearest", truncate=3.0)
    return hu
