"""The pictures of a report show what they say: every image in one window, differences, spectra, the PSNR of slices."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure

from training.measuring import figures
from training.metrics import LUNG, SOFT_TISSUE
from training.physics import Curve

RNG = np.random.default_rng(4)


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """Each figure as it is about to be written."""
    found: list[Figure] = []

    def save(figure: Figure, path: Path) -> Path:
        found.append(figure)
        return path

    for name in ("_save", "_save_photograph"):
        monkeypatch.setattr(figures, name, save)
    return found


def test_every_image_is_shown_in_the_same_window_above_its_difference_from_the_truth(
    tmp_path: Path, drawn: list[Figure]
) -> None:
    truth, low, one, two, three = RNG.normal(40, 100, (5, 50, 80)).astype(np.float32)
    results = {"low dose": low, "one": one, "two": two, "three": three}
    path = figures.images(tmp_path, "Scan A", 0.25, truth, results)
    assert path == tmp_path / "images-scan-a-0.25.jpg"
    axes = np.array(drawn[0].axes).reshape(4, 4)  # two bands of images, each with a band of differences below
    middle = (slice(10, 40), slice(16, 64))
    for k, (name, image) in enumerate({"truth": truth, **results}.items()):
        above, below = axes[k // 4 * 2, k % 4], axes[k // 4 * 2 + 1, k % 4]
        (shown,) = above.images
        assert np.array_equal(shown.get_array(), image[middle])
        assert shown.get_clim() == (SOFT_TISSUE.low_hu, SOFT_TISSUE.high_hu) == (-160, 240)
        if name == "truth":
            assert (above.get_title(), len(below.images)) == ("truth", 0)
            continue
        (difference,) = below.images
        assert np.array_equal(difference.get_array(), (image - truth)[middle])
        assert difference.get_clim() == (-100, 100)
        clipped = np.clip(image, -160, 240).astype(np.float64) - np.clip(truth, -160, 240)
        psnr = 20 * np.log10(400 / np.sqrt(np.mean(clipped**2)))
        assert above.get_title() == f"{name}, {psnr:.2f} dB"
    assert sum(len(place.images) for place in axes.flat) == 5 + 4


def test_spectra_have_the_area_1_each_case_for_itself(tmp_path: Path, drawn: list[Figure]) -> None:
    f = np.linspace(0, 0.7, 30)
    soft, sharp, none = np.exp(-5 * f), 300 * f * np.exp(-3 * f), np.zeros(30)
    curves = {
        "scan A": {"low dose": Curve(f, sharp), "net": Curve(f, soft)},
        "rods": {"net": Curve(f, none)},
    }
    assert figures.spectra(tmp_path, 0.1, curves) == tmp_path / "nps-0.1.png"
    first, second = drawn[0].axes
    assert (first.get_title(), second.get_title()) == ("scan A", "rods")
    assert [line.get_label() for line in first.lines] == ["low dose", "net"]
    for line, value in zip(first.lines, (sharp, soft), strict=True):
        assert np.array_equal(line.get_xdata(), f)
        shown = np.asarray(line.get_ydata())
        assert float(np.sum((shown[1:] + shown[:-1]) / 2 * np.diff(f))) == pytest.approx(1)
        assert shown == pytest.approx(value * shown[5] / value[5])
    assert not np.asarray(second.lines[0].get_ydata()).any()


def test_boxes_are_median_and_quartiles_of_the_slices(tmp_path: Path, drawn: list[Figure]) -> None:
    low, net = [20.0, 21.0, 22.0, 26.0, 23.0], [30.0, 31.5, 29.0]
    by_case = {"scan A": {"low dose": low, "net": net}, "scan B": {"low dose": low}}
    assert figures.boxes(tmp_path, 0.25, by_case, LUNG) == tmp_path / "psnr-0.25.png"
    first, second = drawn[0].axes
    assert [text.get_text() for text in first.get_xticklabels()] == ["low dose", "net"]
    assert [text.get_text() for text in second.get_xticklabels()] == ["low dose"]
    assert str(LUNG) in first.get_ylabel()
    # of each box: itself, two whiskers, two caps, the median, points beyond
    for lines, numbers in ((first.lines[:7], low), (first.lines[7:], net)):
        box, median = np.asarray(lines[0].get_ydata()), np.asarray(lines[5].get_ydata())
        quartiles = np.percentile(numbers, (25, 75))
        assert (box.min(), box.max()) == pytest.approx(tuple(quartiles))
        assert set(median) == {np.median(numbers)}
    assert len(second.lines) == 7


def test_names_of_files_hold_letters_and_numbers_alone() -> None:
    assert figures.slug("  L067 B30f, 1.5 mm / ÄÖ ") == "l067-b30f-1.5-mm"
