"""Classical filters as pipelines, to compare networks with: NLM, total variation, bilateral, Gaussian and BM3D.

Each has one parameter in units of the noise level, which is chosen by the truth for each image: no site could do as
well, so what a network is compared with is the best that the filter can do. They see one slice at a time.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter
from scipy.optimize import minimize_scalar

from pipelines.base import ModelCard, Options
from pipelines.noise import series_noise_level
from pipelines.safety import network_input
from pipelines.volume import Series
from training.measuring.cases import Trial, of_slices
from training.metrics import SOFT_TISSUE, psnr

Array = NDArray[np.float32]

_BILATERAL_SIGMA_PX = 1.5
_PRECISION = 0.01
"""Of the parameter, as a part of the range it is sought in."""
_SEARCH_SLICES = 3


def _nlm(image: Array, parameter: float) -> Array:
    from skimage.restoration import denoise_nl_means

    return np.asarray(denoise_nl_means(image, patch_size=5, patch_distance=9, h=parameter, fast_mode=True), np.float32)


def _tv(image: Array, parameter: float) -> Array:
    from skimage.restoration import denoise_tv_chambolle

    out = denoise_tv_chambolle(image, weight=parameter)  # type: ignore[no-untyped-call]  # no stub
    return np.asarray(out, np.float32)


def _bilateral(image: Array, parameter: float) -> Array:
    from skimage.restoration import denoise_bilateral

    low = image.min()  # it takes no negative values
    out = denoise_bilateral(image - low, sigma_color=parameter, sigma_spatial=_BILATERAL_SIGMA_PX, mode="edge")
    return np.asarray(out + low, np.float32)


def _gaussian(image: Array, parameter: float) -> Array:
    return np.asarray(gaussian_filter(image, parameter), np.float32)


def _bm3d(image: Array, parameter: float) -> Array:
    return np.asarray(importlib.import_module("bm3d").bm3d(image, parameter), np.float32)


@dataclass(frozen=True, slots=True)
class Method:
    """A filter of one slice in units of its noise, what its parameter is, and between which values it is sought."""

    label: str
    filter: Callable[[Array, float], Array]
    parameter: str
    bounds: tuple[float, float]


METHODS = {
    "nlm": Method("non-local means, patch 5, distance 9", _nlm, "h, in noise levels", (0.2, 1.6)),
    "tv": Method("total variation (Chambolle)", _tv, "weight, in noise levels", (0.05, 3.0)),
    "bilateral": Method("bilateral, 1.5 pixels", _bilateral, "sigma of values, in noise levels", (0.5, 8.0)),
    "gaussian": Method("Gaussian", _gaussian, "sigma, in pixels", (0.2, 3.0)),
    "bm3d": Method("BM3D, white noise", _bm3d, "sigma, in noise levels", (0.4, 3.0)),
}


class MethodMissing(RuntimeError):
    """The filter needs a package that is not installed."""


class Classical:
    """The pipeline of one of `METHODS` with its parameter.

    Parameters
    ----------
    name
        Of the method.
    parameter
        As `Method.parameter` says; `Options.strength` scales it.

    Raises
    ------
    MethodMissing
        If its package is not there.
    """

    def __init__(self, name: str, parameter: float) -> None:
        if name == "bm3d" and importlib.util.find_spec("bm3d") is None:
            raise MethodMissing(
                "the package bm3d is not installed; its licence allows no commercial use, so it is never installed for "
                "you: pip install bm3d, or leave bm3d out"
            )
        self._method = METHODS[name]
        self.parameter = parameter
        self.card = ModelCard(
            name=name,
            version="1",
            paper="",
            doi="",
            input="slice",
            patch_zyx=(1, 1, 1),
            overlap_zyx=(0, 0, 0),
            hu_window=(-1024.0, 4000.0),
            precision="fp32",
            weights_sha256="",
            noise_map=True,
        )

    def denoise(self, series: Series, options: Options) -> Iterator[Array]:
        """Filtered HU, padding untouched, slice by slice; the noise level is measured."""
        sigma = np.float32(series_noise_level(series) or 1.0)
        for k in range(series.shape[0]):
            plane = series.plane(k)
            image = network_input(plane)
            filtered = self._method.filter(image / sigma, self.parameter * options.strength) * sigma
            yield np.where(plane.padding, plane.hu, plane.hu + np.float32(options.blend) * (filtered - image))


def tuned(name: str, trial: Trial) -> Classical:
    """The filter `name` with the parameter of highest PSNR against the truth of `trial`, sought on three slices.

    PSNR in the soft-tissue window, that of the bar; the parameter in units of the noise level of the measured slices:
    `Classical` is given no others.

    Raises
    ------
    MethodMissing
        As `Classical`.
    """
    given = of_slices(trial.low, trial.scored)
    places = np.unique(np.linspace(0, len(given.hu) - 1, _SEARCH_SLICES + 2).round().astype(int))
    planes = places[1:-1] if len(places) > 2 else places
    sigma = np.float32(series_noise_level(given) or 1.0)
    images = [network_input(given.plane(int(k))) for k in planes]
    truth, method = trial.truth[trial.scored][planes], METHODS[name]
    Classical(name, 1.0)

    def loss(parameter: float) -> float:
        out = np.stack([method.filter(image / sigma, parameter) * sigma for image in images])
        return -psnr(out, truth, SOFT_TISSUE)

    low, high = method.bounds
    found = minimize_scalar(loss, bounds=(low, high), method="bounded", options={"xatol": (high - low) * _PRECISION})
    return Classical(name, float(found.x))
