"""What other pixels would make false is gone from a derived header, at every depth, and nothing besides."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ct_builder import edit, phantom, write_series
from derivation import derive_one, derive_synthetic
from pydicom import Dataset
from pydicom.sequence import Sequence

from dicomnode.config import Derivation


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
    ds = derive_synthetic(tmp_path, **gone)
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

    ds = derive_synthetic(tmp_path, change=draw, signed=False, BitsStored=12, HighBit=11)
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

    ds = derive_synthetic(tmp_path, change=draw)
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
    ds = derive_synthetic(tmp_path, change=_add_private)
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
