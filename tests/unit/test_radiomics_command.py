"""The radiomics comparison: its statistics against scipy and confidence intervals, masks of users, and the command."""

from __future__ import annotations

import csv
import math
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import stats

from pipelines.base import Envelope, OptionRefused, Options, load
from pipelines.noise import noise_level
from pipelines.safety import LOWEST_HU
from pipelines.volume import Geometry, Series, SeriesRefused, Volume
from training import nodules
from training.__main__ import main
from training.radiomics import FEATURES, command, features, study
from training.radiomics.equivalence import MARGIN_SD, agree, count, tost
from training.radiomics.report import PRINTED
from training.radiomics.study import Case, Region, masked_case, phantom_case, read_masks, series_case
from training.simulate import F50
from training.sources.phantom import chest_abdomen

Array = NDArray[np.float32]
SHAPE = (10, 128, 128)
SPACING_MM = (2.0, 1.5, 1.5)


def chest_volume(noise_hu: float = 20, padded: bool = True) -> Volume:
    """A box of soft tissue with two lungs, noisy, cut off by padding at the left."""
    hu = np.full(SHAPE, -1000, np.float32)
    hu[:, 15:115, 8:124] = 50
    hu[:, 30:85, 16:60] = hu[:, 30:85, 72:116] = -850
    hu += np.random.default_rng(0).normal(0, noise_hu, hu.shape).astype(np.float32)
    padding = np.zeros(hu.shape, np.bool_)
    if padded:
        padding[:, :, :4] = True
        hu[padding] = -3024
    directions = ((0.0, 0.0, 1.0), (0.0, 1.0, 0.0), (1.0, 0.0, 0.0))
    geometry = Geometry((0.0, 0.0, 0.0), SPACING_MM, directions, "")
    return Volume(hu=hu, geometry=geometry, slice_uids=(), slice_paths=(), padding=padding)


@pytest.fixture
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nodules, "DIAMETER_MM", (6.0, 9.0))
    monkeypatch.setattr(study, "read_series", lambda folder: chest_volume())


def test_equivalence_is_that_of_two_one_sided_tests() -> None:
    rng = np.random.default_rng(3)
    for shift, margin in ((0.0, 0.5), (0.3, 0.5), (-0.3, 0.5), (1.0, 0.5), (0.1, 2.0)):
        reference = rng.normal(10, 2, 15)
        other = reference + rng.normal(shift, 0.6, 15)
        difference = other - reference
        above = stats.ttest_1samp(difference, -margin, alternative="greater").pvalue
        below = stats.ttest_1samp(difference, margin, alternative="less").pvalue
        assert tost(reference, other, margin) == pytest.approx(max(above, below), rel=1e-9)
        low, high = stats.ttest_1samp(difference, 0).confidence_interval(0.9)
        assert (tost(reference, other, margin) < 0.05) == (-margin < low and high < margin)


def test_differences_without_spread_are_certain() -> None:
    x = np.array([1.0, 2.0, 4.0])
    assert tost(x, x, 0.0) == 0
    assert tost(x, x + 0.5, 1.0) == 0
    assert tost(x, x + 0.5, 0.25) == 1


def test_counts_by_each_criterion() -> None:
    rng = np.random.default_rng(4)
    n = 12
    base = rng.normal(100, 10, (n, 4))
    changed = base.copy()
    changed[:, 1] += 30 + rng.normal(0, 1, n)  # differs, and is far away
    changed[:, 2] += 1 + rng.normal(0, 0.2, n)  # differs, but by a tenth of the spread
    changed[:, 3] = rng.normal(100, 10, n)  # no difference to be seen, and nothing in common
    names = ("a", "b", "c", "d")
    before, after = ([dict(zip(names, row, strict=True)) for row in table.tolist()] for table in (base, changed))
    agreements = agree(before, after, names)
    assert [one.difference.consistent for one in agreements.values()] == [True, False, False, True]
    assert [one.equivalent for one in agreements.values()] == [True, False, True, False]
    counted = count(agreements.values())
    assert (counted.features, counted.consistent, counted.concordant, counted.equivalent) == (4, 2, 2, 2)
    assert counted.consistent_holm >= counted.consistent
    errors = [float(np.mean(abs(changed[:, k] - base[:, k])) / np.mean(abs(base[:, k]))) for k in range(4)]
    assert counted.median_relative_error == pytest.approx(float(np.median(errors)))
    assert math.isnan(count(()).median_relative_error)


def test_masks_of_a_user(tmp_path: Path) -> None:
    volume = chest_volume()
    z, y, x = np.ogrid[:10, :128, :128]
    balls = {
        name: (((z - 5) * 2) ** 2 + ((y - 60) * 1.5) ** 2 + ((x - at) * 1.5) ** 2 <= 8**2)
        for name, at in (("first", 40), ("second", 90))
    }
    np.savez_compressed(tmp_path / "a.npz", first=balls["first"], second=balls["second"])
    regions = read_masks(tmp_path / "a.npz", volume)
    assert [one.name for one in regions] == ["first", "second"]
    for one in regions:
        assert one.kind == "given"
        assert one.diameter_mm == pytest.approx(16, rel=0.02)
        of_box = features(volume.hu[one.box], one.mask)
        assert of_box == pytest.approx(features(volume.hu, balls[one.name]), rel=1e-9)


@pytest.mark.parametrize(
    ("array", "said"),
    [
        (np.ones(SHAPE, np.uint8), r"mask m in a.npz is uint8 .*expected bool \(10, 128, 128\)"),
        (np.ones((128, 128, 10), np.bool_), r"mask m in a.npz is bool \(128, 128, 10\): expected"),
        (np.zeros(SHAPE, np.bool_), "mask m in a.npz is empty"),
    ],
)
def test_masks_that_are_none_of_the_series_are_refused(tmp_path: Path, array: NDArray[np.generic], said: str) -> None:
    np.savez(tmp_path / "a.npz", m=array)
    with pytest.raises(ValueError, match=said):
        read_masks(tmp_path / "a.npz", chest_volume())


def test_files_that_are_no_masks_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"a\.npz is not in the folder of masks"):
        read_masks(tmp_path / "a.npz", chest_volume())
    (tmp_path / "a.npz").write_bytes(b"no archive")
    with pytest.raises(ValueError, match="no NumPy archive"):
        read_masks(tmp_path / "a.npz", chest_volume())
    with (tmp_path / "a.npz").open("wb") as file:
        np.save(file, np.ones(SHAPE, np.bool_))
    with pytest.raises(ValueError, match="single array"):
        read_masks(tmp_path / "a.npz", chest_volume())


@pytest.mark.usefixtures("_quick")
def test_low_dose_of_a_series_has_its_noise_level_by_root_dose(tmp_path: Path) -> None:
    case = series_case(tmp_path / "chest", nodules=3, dose=0.25, seed=1)
    assert case.name == "chest"
    given = chest_volume()
    levels = [noise_level(v.hu, v.padding, SPACING_MM[1]) for v in (case.full_dose, case.low_dose)]
    assert levels[0] == pytest.approx(20, rel=0.07)
    assert levels[1] / levels[0] == pytest.approx(2, rel=0.07)
    for volume in (case.full_dose, case.low_dose):
        np.testing.assert_array_equal(volume.hu[given.padding], given.hu[given.padding])
    assert len(case.regions) == 3
    for one in case.regions:
        full, low = (v.hu[one.box][one.mask] for v in (case.full_dose, case.low_dose))
        assert full.mean() > given.hu[one.box][one.mask].mean() + 200
        assert (low - full).std() > 10  # less than 20·√3 HU: in the lung more photons come through
    outside = np.ones(given.hu.shape, np.bool_)
    for one in case.regions:
        outside[one.box] = False
    np.testing.assert_array_equal(case.full_dose.hu[outside], given.hu[outside])


def test_phantom_has_its_noise_by_root_dose(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(study, "PHANTOM_PIXEL_MM", 3.0)
    monkeypatch.setattr(study, "PHANTOM_SLICES", 20)
    truth = chest_abdomen(20, 128, 3.0, study.PHANTOM_SPACING_MM, study.PHANTOM_SEED + 7)
    asked: list[tuple[float, ...]] = []

    def phantom(*of: float) -> Array:
        asked.append(of)
        return truth.copy()

    monkeypatch.setattr(study, "chest_abdomen", phantom)
    monkeypatch.setattr(nodules, "DIAMETER_MM", (8.0, 10.0))
    case, again = (phantom_case(3, 2, dose, seed=4) for dose in (0.1, 0.2))
    assert [len(one.regions) for one in (case, again)] == [2, 2]
    np.testing.assert_array_equal(case.full_dose.hu, again.full_dose.hu)
    added, less = (one.low_dose.hu - one.full_dose.hu for one in (case, again))
    # where none of the three is cut off at the lowest HU, which a part of the air is
    whole = np.min([one.hu for one in (case.full_dose, case.low_dose, again.low_dose)], axis=0) > LOWEST_HU
    assert whole.mean() > 0.8
    np.testing.assert_allclose(added[whole], less[whole] * math.sqrt(9 / 4), atol=0.01)
    assert asked == [(20, 512, 3.0, study.PHANTOM_SPACING_MM, study.PHANTOM_SEED + 7, F50)] * 2
    outside = np.ones(truth.shape, np.bool_)
    for one in case.regions:
        outside[one.box] = False
    noise = (case.full_dose.hu - truth)[outside]
    assert added[outside].std() / noise.std() == pytest.approx(3, rel=0.05)
    assert abs(np.corrcoef(added[outside], noise)[0, 1]) < 0.05


@pytest.mark.usefixtures("_quick")
def test_given_masks_leave_the_image_alone(tmp_path: Path) -> None:
    mask = np.zeros(SHAPE, np.bool_)
    mask[5:9, 50:58, 30:38] = True
    np.savez(tmp_path / "chest.npz", tumour=mask)
    case = masked_case(tmp_path / "chest", tmp_path, dose=0.5, seed=1)
    np.testing.assert_array_equal(case.full_dose.hu, chest_volume().hu)
    assert [one.name for one in case.regions] == ["tumour"]


@pytest.mark.usefixtures("_quick")
def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folders = [tmp_path / "secret" / name for name in ("one", "two")]
    out = tmp_path / "secret" / "out"
    words = ["radiomics", "--pipelines", "identity", "--reference", "low-dose", "--nodules", "5", "--dose", "0.1"]
    main([*words, "--preset", "74", "--series", *map(str, folders), "--out", str(out)])
    text = (out / "radiomics.md").read_text(encoding="utf-8")
    assert text.strip() == capsys.readouterr().out.strip()
    assert "secret" not in text
    assert "--series one two --out out" in text
    assert f"{PRINTED[0]} of {PRINTED[1]}" in text
    # identical images: everything agrees, by every criterion
    assert "| identity | none | 18 | 24 | 16 | 16 | 74 | – |" in text
    assert "| identity | all | 74 | 74 | 74 | 74 | 74 | 0.0% |" in text

    with (out / "features.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 3 * 5
    assert [r["series"] for r in rows if r["images"] == "identity"] == ["one"] * 3 + ["two"] * 2
    table = {
        images: np.array([[float(r[f]) for f in FEATURES] for r in rows if r["images"] == images])
        for images in ("low-dose", "full-dose")
    }
    p = stats.ttest_rel(table["full-dose"], table["low-dose"]).pvalue
    by_family = [
        int(sum(p[k] >= 0.05 for k, f in enumerate(FEATURES) if f.startswith(family)))
        for family in ("firstorder", "glcm", "glrlm", "glszm")
    ]
    assert f"| full-dose | – | {' | '.join(map(str, [*by_family, sum(by_family)]))} | – |" in text

    with (out / "comparison.csv").open(newline="", encoding="utf-8") as file:
        compared = [row for row in csv.DictReader(file) if row["images"] == "full-dose"]
    assert [row["feature"] for row in compared] == list(FEATURES)
    assert [float(row["p"]) for row in compared] == pytest.approx(p, rel=1e-4)
    margin = MARGIN_SD * table["low-dose"].std(axis=0, ddof=1)
    above = stats.ttest_1samp(table["full-dose"] - table["low-dose"], -margin, alternative="greater").pvalue
    below = stats.ttest_1samp(table["full-dose"] - table["low-dose"], margin, alternative="less").pvalue
    assert [float(row["p_equivalence"]) for row in compared] == pytest.approx(np.maximum(above, below), rel=1e-4)
    assert (out / "radiomics.png").read_bytes().startswith(b"\x89PNG")


def test_options_reach_the_pipelines_and_the_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Brighter:
        """Adds 40 HU times strength and blend."""

        card = replace(load("identity").card, name="brighter")

        def denoise(self, series: Series, options: Options) -> Iterator[NDArray[np.float32]]:
            added = np.float32(40 * options.strength * options.blend)
            return (series.plane(k).hu + added for k in range(series.shape[0]))

    monkeypatch.setattr(command, "load", lambda name, execution: Brighter())
    volume = chest_volume(padded=False)
    boxes = [(slice(4, 8), slice(40, 46), slice(x, x + 6)) for x in (20, 40, 80)]
    regions = tuple(Region(f"n{k}", "solid", 8.0, box, np.ones((4, 6, 6), np.bool_)) for k, box in enumerate(boxes))
    monkeypatch.setattr(command, "phantom_case", lambda *args: Case("c", volume, volume, regions))
    words = ["radiomics", "--pipelines", "brighter", "--reference", "low-dose", "--phantoms", "1"]
    main([*words, "--strength", "0.5", "--blend", "0.7", "--out", str(tmp_path)])
    assert "denoise 0.1 of full dose, strength 0.5, blend 0.7." in (tmp_path / "radiomics.md").read_text("utf-8")
    with (tmp_path / "features.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    before, after = (
        [float(row["firstorder_Mean"]) for row in rows if row["images"] == images]
        for images in ("low-dose", "brighter")
    )
    assert np.subtract(after, before) == pytest.approx([14] * 3, abs=1e-3)
    with pytest.raises(OptionRefused, match="blend 2 is out of range"):
        main([*words, "--blend", "2", "--out", str(tmp_path)])


def test_each_precision_is_compared_with_the_reference_in_fp32(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Rounding:
        """As many HU brighter as its format has lost bits."""

        def __init__(self, precision: str) -> None:
            self.card = replace(load("identity").card, name="st3d", precision=precision)
            self.added = np.float32({"fp32": 0, "bf16": 16, "int8": 24}[precision])

        def denoise(self, series: Series, options: Options) -> Iterator[NDArray[np.float32]]:
            return (series.plane(k).hu + self.added for k in range(series.shape[0]))

    monkeypatch.setattr(command, "load", lambda name, execution: Rounding(execution.precision))
    volume = chest_volume(padded=False)
    mask = np.ones((4, 6, 6), np.bool_)
    boxes = [(slice(4, 8), slice(40, 46), slice(x, x + 6)) for x in (20, 40, 80)]
    regions = tuple(Region(f"n{k}", "solid", 8.0, box, mask) for k, box in enumerate(boxes))
    case = Case("c", volume, volume, regions)
    monkeypatch.setattr(command, "phantom_case", lambda *args: case)
    words = ["radiomics", "--pipelines", "st3d", "--reference", "st3d", "--phantoms", "1", "--out", str(tmp_path)]
    main([*words, "--precision", "int8", "fp32"])
    text = (tmp_path / "radiomics.md").read_text(encoding="utf-8")
    assert "not corrected, against st3d in fp32." in text
    assert re.search(r"\| st3d, int8 \| int8 \|( \d+ \|){5} 31 \|", text)  # with the paper's number beside
    with (tmp_path / "features.csv").open(newline="", encoding="utf-8") as file:
        means: dict[str, list[float]] = {}
        for row in csv.DictReader(file):
            means.setdefault(row["images"], []).append(float(row["firstorder_Mean"]))
    assert list(means) == ["full-dose", "low-dose", "st3d", "st3d, int8"]
    assert np.subtract(means["st3d"], means["low-dose"]) == pytest.approx([0] * 3)
    assert np.subtract(means["st3d, int8"], means["low-dose"]) == pytest.approx([24] * 3, abs=1e-3)
    main(words)  # nothing but the reference: one set of images
    assert "st3d, " not in (tmp_path / "features.csv").read_text(encoding="utf-8")


def test_a_pipeline_that_may_not_see_a_series_is_refused_before_any_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    class Picky:
        def __init__(self, name: str) -> None:
            limits = Envelope(pixel_spacing_mm=(0.2, 2.0) if name == "willing" else (0.2, 0.3))
            self.card = replace(load("identity").card, name=name, valid_for=limits)

        def denoise(self, series: Series, options: Options) -> Iterator[NDArray[np.float32]]:
            pytest.fail("denoised already")

    monkeypatch.setattr(command, "load", lambda name, execution: Picky(name))
    volume = chest_volume(padded=False)
    monkeypatch.setattr(command, "phantom_case", lambda *args: Case("c", volume, volume, ()))
    words = ["radiomics", "--pipelines", "willing", "picky", "--reference", "low-dose", "--phantoms", "1"]
    with pytest.raises(SeriesRefused, match=r"pixels of 1\.5 mm"):
        main(words)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--phantoms", "1", "--nodules", "1"], "two are needed for a test"),
        (["--phantoms", "4", "--nodules", "3"], "one in each"),
        (["--phantoms", "1", "--masks", "m"], "masks are of a series"),
        (["--series", "a/x", "b/x"], "folders of one name"),
    ],
)
def test_what_cannot_come_out_well_is_refused_at_once(words: list[str], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        main(["radiomics", "--pipelines", "identity", *words])


@pytest.mark.parametrize("words", [["--dose", "0"], ["--dose", "1.5"], ["--nodules", "0"], ["--series", "x"]])
def test_values_out_of_range_are_usage_errors(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["radiomics", "--pipelines", "identity", "--phantoms", "1", *words])
    assert "usage:" in capsys.readouterr().err


@pytest.mark.usefixtures("_quick")
def test_features_of_nodules_are_those_of_pyradiomics() -> None:
    extractors = pytest.importorskip("radiomics.featureextractor")
    sitk = pytest.importorskip("SimpleITK")
    volume = chest_volume(padded=False)
    hu, found = nodules.insert(volume.hu, SPACING_MM, 3, seed=1, noise=volume.hu - chest_volume(0, padded=False).hu)
    extractor = extractors.RadiomicsFeatureExtractor(binWidth=25)
    extractor.disableAllFeatures()
    for family in ("firstorder", "glcm", "glrlm", "glszm"):
        extractor.enableFeatureClassByName(family)
    image = sitk.GetImageFromArray(hu.astype(np.float64))
    image.SetSpacing(SPACING_MM[::-1])
    for one in found:
        mask = np.zeros(hu.shape, np.uint8)
        mask[one.box] = one.mask
        region = sitk.GetImageFromArray(mask)
        region.CopyInformation(image)
        theirs = extractor.execute(image, region)
        ours = features(hu[one.box], one.mask, voxel_mm3=math.prod(SPACING_MM))
        assert ours == pytest.approx({name: float(theirs[f"original_{name}"]) for name in FEATURES}, rel=1e-9)
