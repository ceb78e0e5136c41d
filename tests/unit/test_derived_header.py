"""The derived header attribute by attribute, against the source's bytes, the standard's rules and dciodvfy."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import require_peer
from ct_builder import edit, phantom, uid, write_series
from derivation import CARD, HU, derive, derive_one
from pydicom import Dataset, dcmread
from pydicom.dataelem import RawDataElement
from pydicom.sequence import Sequence
from pydicom.tag import BaseTag, Tag

from dicomnode.config import Derivation
from dicomnode.uids import device_uid
from pipelines.base import Options


def one(tmp_path: Path, *, change: Callable[[Dataset], None] | None = None, **overrides: Any) -> Dataset:
    """Derived data set of a synthetic slice with other elements than usual."""
    path, *_ = write_series(tmp_path, phantom(1, 16), **overrides)
    if change is not None:
        edit(path, change)
    return derive_one(path, tmp_path / "out")


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
    assert list(one(tmp_path, ImageType=source).ImageType) == expected


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
    ds = one(tmp_path, DerivationCodeSequence=Sequence([before]))
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
    ds = one(tmp_path, ContributingEquipmentSequence=Sequence([before]))
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
    made = one(tmp_path, SeriesDescription=source).SeriesDescription
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
    made = one(tmp_path, SpecificCharacterSet=charset, SeriesDescription=text).SeriesDescription
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
    assert one(tmp_path, SeriesNumber=source).SeriesNumber == expected


def test_the_sites_words(tmp_path: Path) -> None:
    path, *_ = write_series(tmp_path, phantom(1, 16), ImageComments="breath held")
    site = Derivation(series_description_suffix=" AI", series_number_offset=7, image_comments="NOT FOR DIAGNOSIS")
    ds = derive_one(path, tmp_path / "out", settings=site)
    assert (ds.SeriesDescription, ds.SeriesNumber) == ("Chest low dose AI", 10)
    assert ds.ImageComments == "NOT FOR DIAGNOSIS\r\nbreath held"
    silent = derive_one(path, tmp_path / "out", settings=site.model_copy(update={"image_comments": ""}))
    assert silent.ImageComments == "breath held"


def test_times_are_the_jobs(tmp_path: Path) -> None:
    ds = one(tmp_path)
    for what in ("InstanceCreation", "Content", "Series"):
        assert (ds[f"{what}Date"].value, ds[f"{what}Time"].value) == ("20261120", "100405.678901")
    assert (ds.StudyDate, ds.AcquisitionDate, ds.AcquisitionTime) == ("20240101", "20240101", "120000")
    assert "TimezoneOffsetFromUTC" not in ds  # it would shift the meaning of the source's times


def test_times_follow_the_offset_that_the_source_declares(tmp_path: Path) -> None:
    ds = one(tmp_path, TimezoneOffsetFromUTC="-1030")
    assert (ds.SeriesDate, ds.SeriesTime, ds.TimezoneOffsetFromUTC) == ("20261119", "223405.678901", "-1030")
    assert ds.ContributingEquipmentSequence[0].ContributionDateTime == "20261119223405.678901-1030"


# --- what would be false -------------------------------------------------------------------------------------------


def test_what_the_new_pixels_make_false_is_gone(tmp_path: Path) -> None:
    icon = Dataset()
    icon.Rows = icon.Columns = 1
    gone: dict[str, Any] = {
        "SmallestImagePixelValue": 0,
        "LargestImagePixelValue": 4000,
        "SmallestPixelValueInSeries": 0,
        "LargestPixelValueInSeries": 4000,
        "IconImageSequence": Sequence([icon]),
        "DigitalSignaturesSequence": Sequence([Dataset()]),
        "MACParametersSequence": Sequence([Dataset()]),
        "SOPInstanceStatus": "AO",
        "InstanceCreatorUID": "1.2.3",
        "PixelDataProviderURL": "https://pacs.example/pixels",
        "RetrieveAETitle": "ARCHIVE",
        "NumberOfSeriesRelatedInstances": 1,
        "ReferencedPerformedProcedureStepSequence": Sequence([Dataset()]),
        "DataSetTrailingPadding": b"\0\0",
    }
    ds = one(tmp_path, **gone)
    assert [keyword for keyword in gone if keyword in ds] == []


def test_overlays_inside_the_pixels_go_and_others_lose_their_statistics(tmp_path: Path) -> None:
    def draw(ds: Dataset) -> None:
        for group, bits, position in ((0x6000, 16, 12), (0x6002, 1, 0)):
            ds.add_new((group, 0x0010), "US", 16)
            ds.add_new((group, 0x0011), "US", 16)
            ds.add_new((group, 0x0040), "CS", "R")
            ds.add_new((group, 0x0050), "SS", [1, 1])
            ds.add_new((group, 0x0100), "US", bits)
            ds.add_new((group, 0x0102), "US", position)
        ds.add_new((0x6002, 0x1301), "IS", 4)
        ds.add_new((0x6002, 0x1302), "DS", "40.5")
        ds.add_new((0x6002, 0x1303), "DS", "12.5")
        ds.add_new((0x6002, 0x3000), "OW", bytes(range(32)))

    ds = one(tmp_path, change=draw, signed=False, BitsStored=12, HighBit=11)
    assert [tag for tag in ds.keys() if tag.group == 0x6000] == []
    kept = [tag.element for tag in ds.keys() if tag.group == 0x6002]
    assert kept == [0x0010, 0x0011, 0x0040, 0x0050, 0x0100, 0x0102, 0x1301, 0x3000]
    assert ds[0x60023000].value == bytes(range(32))


def test_curves_of_the_pixels_go(tmp_path: Path) -> None:
    def draw(ds: Dataset) -> None:
        for group, kind in ((0x5000, "HIST"), (0x5002, "ECG"), (0x501E, "PROF")):
            ds.add_new((group, 0x0010), "US", 2)
            ds.add_new((group, 0x0020), "CS", kind)
            ds.add_new((group, 0x3000), "OW", bytes(4))

    ds = one(tmp_path, change=draw)
    assert [tag for tag in ds.keys() if tag.group >> 8 == 0x50] == [0x50020010, 0x50020020, 0x50023000]


def _add_private(ds: Dataset) -> None:
    ge = ds.private_block(0x0043, "GEMS_PARM_01", create=True)
    ge.add_new(0x27, "SH", "0.984")
    ge.add_new(0x29, "OB", b"histogram!")
    impac = ds.private_block(0x0029, "GEMS_IMPS_01", create=True)
    impac.add_new(0x0A, "SS", 764)
    inner, icon = Dataset(), Dataset()
    icon.Rows = icon.Columns = 1
    icon.PixelData = b"\0\0"
    icon["PixelData"].VR = "OW"
    inner.private_block(0x0011, "VENDOR", create=True).add_new(0x03, "SQ", Sequence([icon]))
    vendor = ds.private_block(0x0011, "VENDOR", create=True)
    vendor.add_new(0x01, "SQ", Sequence([inner]))
    vendor.add_new(0x02, "OB", bytes(16 * 16))
    vendor.add_new(0x05, "OB", bytes(16 * 15))
    public = Dataset()
    public.ReferencedSOPClassUID, public.ReferencedSOPInstanceUID = "1.2.840.10008.5.1.4.1.1.2", "1.2.3"
    public.private_block(0x0011, "VENDOR", create=True).add_new(0x05, "LO", "inside")
    ds.ReferencedImageSequence = Sequence([public])


def test_private_elements_stay_but_for_those_of_the_pixels(tmp_path: Path) -> None:
    ds = one(tmp_path, change=_add_private)
    kept = {(tag.group, tag.element) for tag in ds.keys() if tag.is_private}
    # histogram, pixel range, nested icon and a full-size picture are gone
    assert kept == {(0x0011, 0x10), (0x0011, 0x1005), (0x0029, 0x10), (0x0043, 0x10), (0x0043, 0x1027)}
    assert ds[0x00431027].value == "0.984"
    assert ds.ReferencedImageSequence[0][0x00111005].value == "inside"


def test_private_elements_go_at_every_depth_if_the_site_says_so(tmp_path: Path) -> None:
    path, *_ = write_series(tmp_path, phantom(1, 16))
    edit(path, _add_private)
    ds = derive_one(path, tmp_path / "out", settings=Derivation(keep_private_attributes=False))
    assert [element.tag for element in ds.iterall() if element.tag.is_private] == []
    assert ds.ReferencedImageSequence[0].ReferencedSOPInstanceUID == "1.2.3"


def test_a_lossy_past_stays(tmp_path: Path) -> None:
    past: dict[str, Any] = {
        "LossyImageCompression": "01",
        "LossyImageCompressionRatio": "12.5",
        "LossyImageCompressionMethod": "ISO_15444_1",
    }
    ds = one(tmp_path, **past)
    assert {keyword: str(ds[keyword].value) for keyword in past} == past
    assert "LossyImageCompression" not in one(tmp_path / "never")


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


# --- what stays to the last byte -----------------------------------------------------------------------------------

SAID_ANEW = {
    Tag(keyword)
    for keyword in (
        *("SOPInstanceUID", "SeriesInstanceUID", "SeriesNumber", "SeriesDescription", "ImageType", "ImageComments"),
        *("InstanceCreationDate", "InstanceCreationTime", "ContentDate", "ContentTime", "SeriesDate", "SeriesTime"),
        *("DerivationDescription", "DerivationCodeSequence", "SourceImageSequence", "ContributingEquipmentSequence"),
        "PixelData",
    )
}
MAY_GO = {
    Tag(keyword)
    for keyword in (
        *("SmallestImagePixelValue", "LargestImagePixelValue", "ReferencedPerformedProcedureStepSequence"),
        "InstanceCreatorUID",
    )
}
REAL = (
    "ge-revolution-cptacpda-LUNG-5mm",  # explicit, many private groups
    "ge-vct-cmbcrc-chest-LUNG-2p5mm",  # padding 63536 in a signed image
    "philips-brilliance16-lungdxA0001-B-5mm",  # implicit, 12 bits unsigned
    "siemens-sensation10-lungdxA0002-B40f-8mm",  # Smallest and LargestImagePixelValue, a SourceImageSequence
)


def halve(hu: HU) -> HU:
    return hu * np.float32(0.5)


def same(source: Dataset, derived: Dataset, tag: BaseTag) -> bool:
    """The same bytes; of sequences, which may be encoded in another way, and of empty elements the same value."""
    before, after = source.get_item(tag), derived.get_item(tag)
    if isinstance(before, RawDataElement) and isinstance(after, RawDataElement) and after.VR != "SQ":
        return (before.value or b"") == (after.value or b"")
    return bool(source[tag].value == derived[tag].value)


@pytest.mark.data
@pytest.mark.parametrize("name", REAL)
def test_the_rest_of_a_real_header_stays(ct_series: Callable[[str], list[Path]], tmp_path: Path, name: str) -> None:
    path = ct_series(name)[10]
    derived = derive_one(path, tmp_path / "out", halve)
    source = dcmread(path)
    missing = {tag for tag in set(source.keys()) - set(derived.keys()) if tag.element != 0}
    assert missing <= MAY_GO
    assert set(derived.keys()) - set(source.keys()) <= SAID_ANEW
    kept = [tag for tag in source.keys() if tag in derived]
    other = {tag for tag in kept if not same(source, derived, tag)}
    assert other <= SAID_ANEW


@pytest.mark.peer
@pytest.mark.data
@pytest.mark.parametrize("name", REAL)
def test_dciodvfy_finds_nothing_new_in_a_real_series(
    ct_series: Callable[[str], list[Path]], tmp_path: Path, name: str
) -> None:
    paths = ct_series(name)[10:13]
    made = derive(paths, tmp_path / "out", halve, card=replace(CARD, input="slab3"))
    for path, instance in zip(sorted(paths, key=_position), sorted((i.path for i in made), key=_position), strict=True):
        assert complaints(instance) - complaints(path) <= UNKNOWN_TO_DCIODVFY


@pytest.mark.peer
def test_dciodvfy_finds_nothing_in_a_synthetic_series(tmp_path: Path) -> None:
    paths = write_series(tmp_path, phantom(3, 16))
    for instance in derive(paths, tmp_path / "out", halve, card=replace(CARD, input="slab3")):
        assert complaints(instance.path) - complaints(paths[0]) <= UNKNOWN_TO_DCIODVFY
        assert not any(line.startswith("Error") for line in complaints(instance.path))


UNKNOWN_TO_DCIODVFY = {
    "Warning - Attribute is not present in standard DICOM IOD - (0x0018,0x1002) UI Device UID",
    "Warning - Dicom dataset contains attributes not present in standard DICOM IOD - this is a Standard Extended SOP "
    "Class",
}
"""DeviceUID came into the equipment item (PS3.3 C.12.1) after the release of dicom3tools that Debian has."""


def complaints(path: Path) -> set[str]:
    require_peer("dciodvfy")
    done = subprocess.run(["dciodvfy", path], capture_output=True, text=True, check=False, timeout=60)
    return {line.strip() for line in (done.stdout + done.stderr).splitlines() if re.match("Error|Warning", line)}


def _position(path: Path) -> float:
    return float(dcmread(path, stop_before_pixels=True).ImagePositionPatient[2])


CHARSETS = ("Arab", "Greek", "H31", "H32", "Hbrw", "I2", "JapMulti", "KoreanMulti", "Russ", "X1", "X2")


@pytest.mark.data
@pytest.mark.parametrize("name", CHARSETS)
def test_names_in_every_script_stay(odd_dir: Path, tmp_path: Path, name: str) -> None:
    sample = dcmread(odd_dir / f"charset-{name}.dcm")
    patient = sample.get_item(Tag("PatientName")).value
    charset = (odd_dir / f"charset-{name}.dcm").read_bytes()
    start = charset.index(b"\x08\x00\x05\x00CS")
    charset = charset[start : start + 8 + int.from_bytes(charset[start + 6 : start + 8], "little")]

    # spliced in as bytes, so that no encoder stands between the sample and the test
    path, *_ = write_series(tmp_path, phantom(1, 16), PatientName="#")
    content = path.read_bytes()
    element = b"\x10\x00\x10\x00PN" + len(patient).to_bytes(2, "little") + patient
    content = content.replace(b"\x10\x00\x10\x00PN\x02\x00# ", element)
    at = 144 + int.from_bytes(content[140:144], "little")
    path.write_bytes(content[:at] + charset + content[at:])

    ds = derive_one(path, tmp_path / "out")
    made = next((tmp_path / "out").glob("*.dcm")).read_bytes()
    assert element in made
    assert charset in made
    assert str(ds.PatientName) == str(sample.PatientName)
    assert ds.SeriesDescription == "Chest low dose denoised"


def test_an_empty_element_of_an_unknown_representation_is_carried_over(tmp_path: Path) -> None:
    (path,) = write_series(tmp_path / "source", phantom(1, 16))
    odd = b"\x18\x00\xff\xfeZZ\x00\x00"  # (0018,FEFF), VR ZZ, empty
    content = path.read_bytes()
    place = content.index(b"\x20\x00\x0d\x00UI")  # StudyInstanceUID comes after it
    path.write_bytes(content[:place] + odd + content[place:])
    (made,) = derive([path], tmp_path / "derived")
    assert odd + b"\x20\x00\x0d\x00UI" in made.path.read_bytes()
