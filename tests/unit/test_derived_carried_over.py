"""What a derived header keeps to the last byte, against the source's bytes and dciodvfy."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import require_peer
from ct_builder import phantom, write_series
from derivation import CARD, HU, derive, derive_one
from pydicom import Dataset, dcmread
from pydicom.dataelem import RawDataElement
from pydicom.tag import BaseTag, Tag

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
