"""What a derived header says anew, attribute by attribute, against the standard's rules."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from ct_builder import edit, phantom, uid, write_series
from derivation import CARD, derive, derive_one, derive_synthetic
from pydicom import Dataset, dcmread
from pydicom.sequence import Sequence

from dicomnode.config import Derivation
from dicomnode.uids import device_uid
from pipelines.base import Options


def dicom_code(item: Dataset) -> tuple[str, str, str]:
    return item.CodeValue, item.CodingSchemeDesignator, item.CodeMeaning


# --- what the image is ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        (["ORIGINAL", "PRIMARY", "AXIAL"], ["DERIVED", "SECONDARY", "AXIAL"]),
        (["ORIGINAL", "PRIMARY", "AXIAL", "CT_SOM5 SPI"], ["DERIVED", "SECONDARY", "AXIAL", "CT_SOM5 SPI"]),
        (["ORIGINAL", "PRIMARY"], ["DERIVED", "SECONDARY", "AXIAL"]),
        (None, ["DERIVED", "SECONDARY", "AXIAL"]),
    ],
)
def test_image_type(tmp_path: Path, source: list[str] | None, expected: list[str]) -> None:
    assert list(derive_synthetic(tmp_path, ImageType=source).ImageType) == expected


def test_image_type_value_2_is_the_sites(tmp_path: Path) -> None:
    path, *_ = write_series(tmp_path, phantom(1, 16))
    ds = derive_one(path, tmp_path / "out", settings=Derivation(image_type_value_2="PRIMARY"))
    assert list(ds.ImageType) == ["DERIVED", "PRIMARY", "AXIAL"]


def test_derivation_is_told(tmp_path: Path) -> None:
    path, *_ = write_series(tmp_path, phantom(1, 16))
    card = replace(CARD, noise_map=True)
    ds = derive_one(path, tmp_path / "out", card=card, options=Options(strength=0.8, blend=0.9))
    for part in ("st3d", "1.2", "fp32", "abababab", "strength 0.8", "blend 0.9"):
        assert part in ds.DerivationDescription
    assert len(ds.DerivationDescription) <= 1024
    assert ds.DerivationDescription.isascii()
    assert [dicom_code(item) for item in ds.DerivationCodeSequence] == [("113087", "DCM", "Smoothing")]


def test_strength_is_told_where_it_says_something(tmp_path: Path) -> None:
    path, *_ = write_series(tmp_path, phantom(1, 16))
    told = derive_one(path, tmp_path / "out").DerivationDescription
    assert told == "Noise reduction by st3d 1.2 (precision fp32, weights SHA-256 abababababababab): blend 1"
    told = derive_one(path, tmp_path / "out", card=replace(CARD, noise_map=True)).DerivationDescription
    assert told.endswith(": strength 1, blend 1")
    assert derive_one(path, tmp_path / "out", options=Options(strength=0.5)).DerivationDescription.endswith(
        ": strength 0.5, blend 1"
    )


def test_earlier_derivations_stay(tmp_path: Path) -> None:
    before = Dataset()
    before.CodeValue, before.CodingSchemeDesignator, before.CodeMeaning = "113040", "DCM", "Lossy Compression"
    ds = derive_synthetic(tmp_path, DerivationCodeSequence=Sequence([before]))
    assert [item.CodeValue for item in ds.DerivationCodeSequence] == ["113040", "113087"]


def test_a_name_that_is_no_plain_text_cannot_break_the_header(tmp_path: Path) -> None:
    path, *_ = write_series(tmp_path, phantom(1, 16))
    ds = derive_one(path, tmp_path / "out", card=replace(CARD, name="Straße\\2\n" + "x" * 2000, version="v\\1"))
    item = ds.ContributingEquipmentSequence[0]
    assert item.ManufacturerModelName == ("Stra_e_2_" + "x" * 2000)[:64]
    assert item.SoftwareVersions == "v_1"
    assert len(ds.DerivationDescription) == 1024


def test_contributing_equipment(tmp_path: Path) -> None:
    before = Dataset()
    before.Manufacturer, before.ManufacturerModelName = "Somebody", "Deidentifier"
    ds = derive_synthetic(tmp_path, ContributingEquipmentSequence=Sequence([before]))
    first, ours = ds.ContributingEquipmentSequence
    assert (first.Manufacturer, first.ManufacturerModelName) == ("Somebody", "Deidentifier")
    assert dicom_code(ours.PurposeOfReferenceCodeSequence[0]) == ("109102", "DCM", "Processing Equipment")
    assert (ours.Manufacturer, ours.ManufacturerModelName, ours.SoftwareVersions) == ("dicomnode", "st3d", "1.2")
    assert ours.DeviceUID == device_uid(CARD)
    assert ours.ContributionDateTime == "20261120100405.678901+0100"


@pytest.mark.parametrize(
    ("kind", "radius", "expected"),
    [
        ("slice", 2, [[0], [1], [2], [3], [4], [5]]),
        ("slab3", 0, [[0, 1], [1, 0, 2], [2, 1, 3], [3, 2, 4], [4, 3, 5], [5, 4]]),
        (
            "volume",
            2,
            [[0, 1, 2], [1, 0, 2, 3], [2, 0, 1, 3, 4], [3, 1, 2, 4, 5], [4, 2, 3, 5], [5, 3, 4]],
        ),
    ],
)
def test_source_images(tmp_path: Path, kind: Any, radius: int, expected: list[list[int]]) -> None:
    paths = write_series(tmp_path, phantom(6, 16))
    made = derive(paths, tmp_path / "out", card=replace(CARD, input=kind, overlap_zyx=(radius, 0, 0)))
    for instance, sources in zip(made, expected, strict=True):
        items = dcmread(instance.path).SourceImageSequence
        assert [i.ReferencedSOPInstanceUID for i in items] == [uid("series", "instance", k) for k in sources]
        assert [i.SpatialLocationsPreserved for i in items] == ["YES"] + ["NO"] * (len(sources) - 1)
        assert {i.ReferencedSOPClassUID for i in items} == {"1.2.840.10008.5.1.4.1.1.2"}
        purpose = ("121322", "DCM", "Source image for image processing operation")
        assert {dicom_code(i.PurposeOfReferenceCodeSequence[0]) for i in items} == {purpose}


def test_a_lossy_past_stays(tmp_path: Path) -> None:
    past: dict[str, Any] = {
        "LossyImageCompression": "01",
        "LossyImageCompressionRatio": "12.5",
        "LossyImageCompressionMethod": "ISO_15444_1",
    }
    ds = derive_synthetic(tmp_path, **past)
    assert {keyword: str(ds[keyword].value) for keyword in past} == past
    assert "LossyImageCompression" not in derive_synthetic(tmp_path / "never")


@pytest.mark.data
def test_a_lossy_transfer_syntax_is_owned_up_to(odd_dir: Path, tmp_path: Path) -> None:
    path = tmp_path / "near.dcm"
    shutil.copy(odd_dir / "ts-jpegls-near.dcm", path)

    def forget(ds: Dataset) -> None:
        del ds.LossyImageCompression, ds.LossyImageCompressionRatio

    edit(path, forget)
    ds = derive_one(path, tmp_path / "out")
    assert (ds.LossyImageCompression, ds.LossyImageCompressionMethod) == ("01", "ISO_14495_1")
    expected = 512 * 512 * 2 / len(dcmread(path).PixelData)
    assert float(ds.LossyImageCompressionRatio) == pytest.approx(expected, rel=1e-3)


# --- what a reader sees --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("Chest 1.0 Br40", "Chest 1.0 Br40 denoised"),
        ("", "denoised"),
        (None, "denoised"),
        ("x" * 55, "x" * 55 + " denoised"),
        ("x" * 64, "x" * 55 + " denoised"),
    ],
)
def test_series_description(tmp_path: Path, source: str | None, expected: str) -> None:
    made = derive_synthetic(tmp_path, SeriesDescription=source).SeriesDescription
    assert made == expected
    assert len(made) <= 64


@pytest.mark.parametrize(
    ("charset", "text"),
    [
        ("ISO_IR 192", "胸部低線量" * 12),
        (["", "ISO 2022 IR 87"], "胸部低線量" * 12),
        (["", "ISO 2022 IR 149"], "흉부저선량" * 12),
        ("ISO_IR 144", "Грудь " * 10),
        ("GB18030", "胸部低剂量" * 12),
    ],
)
def test_a_long_series_description_is_cut_between_characters(tmp_path: Path, charset: Any, text: str) -> None:
    made = derive_synthetic(tmp_path, SpecificCharacterSet=charset, SeriesDescription=text).SeriesDescription
    kept = made.removesuffix(" denoised")
    assert text.startswith(kept)
    assert 53 <= len(kept) <= 55  # without a space before the suffix's own, and with one to make the length even
    assert len(made) <= 64


def test_a_description_outside_its_character_set_is_not_made_worse(tmp_path: Path) -> None:
    path, *_ = write_series(tmp_path, phantom(1, 16), SpecificCharacterSet="ISO_IR 192", SeriesDescription="#" * 64)
    path.write_bytes(path.read_bytes().replace(b"#" * 64, b"\xff\xfe" * 32))
    assert derive_one(path, tmp_path / "out").SeriesDescription == "denoised"


@pytest.mark.parametrize(
    ("source", "expected"), [(3, 1003), (None, 1000), (0, 1000), (-5, 995), (2**31 - 1, 1000), (2147482647, 2**31 - 1)]
)
def test_series_number(tmp_path: Path, source: int | None, expected: int) -> None:
    assert derive_synthetic(tmp_path, SeriesNumber=source).SeriesNumber == expected


def test_the_sites_words(tmp_path: Path) -> None:
    path, *_ = write_series(tmp_path, phantom(1, 16), ImageComments="breath held")
    site = Derivation(series_description_suffix=" AI", series_number_offset=7, image_comments="NOT FOR DIAGNOSIS")
    ds = derive_one(path, tmp_path / "out", settings=site)
    assert (ds.SeriesDescription, ds.SeriesNumber) == ("Chest low dose AI", 10)
    assert ds.ImageComments == "NOT FOR DIAGNOSIS\r\nbreath held"
    silent = derive_one(path, tmp_path / "out", settings=site.model_copy(update={"image_comments": ""}))
    assert silent.ImageComments == "breath held"


def test_times_are_the_jobs(tmp_path: Path) -> None:
    ds = derive_synthetic(tmp_path)
    for what in ("InstanceCreation", "Content", "Series"):
        assert (ds[f"{what}Date"].value, ds[f"{what}Time"].value) == ("20261120", "100405.678901")
    assert (ds.StudyDate, ds.AcquisitionDate, ds.AcquisitionTime) == ("20240101", "20240101", "120000")
    assert "TimezoneOffsetFromUTC" not in ds  # it would shift the meaning of the source's times


def test_times_follow_the_offset_that_the_source_declares(tmp_path: Path) -> None:
    ds = derive_synthetic(tmp_path, TimezoneOffsetFromUTC="-1030")
    assert (ds.SeriesDate, ds.SeriesTime, ds.TimezoneOffsetFromUTC) == ("20261119", "223405.678901", "-1030")
    assert ds.ContributingEquipmentSequence[0].ContributionDateTime == "20261119223405.678901-1030"
