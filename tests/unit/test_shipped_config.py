"""config.yaml as it is shipped: its routes keep what its comments promise."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pydicom
import pytest

from dicomnode.config import Config, Route, load
from dicomnode.router import OWN_OUTPUT, Router, header_values

CT = "1.2.840.10008.5.1.4.1.1.2"
CONFIG = Path(__file__).resolve().parents[2] / "config.yaml"


@pytest.fixture(scope="module")
def shipped() -> Config:
    return load(CONFIG)


def test_shipped_configuration_states_the_defaults(shipped: Config):
    defaults = Config()
    for section in ("reception", "assembly", "compute", "delivery", "derivation"):
        assert getattr(shipped, section) == getattr(defaults, section)
        written = re.search(rf"^{section}:\n((?:  .*\n|\n|#.*\n)*)", CONFIG.read_text(), re.MULTILINE)
        assert written
        keys = re.findall(r"^  ([a-z_0-9]+):", written.group(1), re.MULTILINE)
        assert set(keys) == set(type(getattr(defaults, section)).model_fields)
    assert shipped.node.model_dump(exclude={"spool", "database"}) == defaults.node.model_dump(
        exclude={"spool", "database"}
    )


def test_shipped_configuration_stays_on_this_machine(shipped: Config):
    assert shipped.node.address == "127.0.0.1"
    assert all(network.is_loopback for network in shipped.reception.networks)
    assert {destination.host for destination in shipped.destinations.values()} == {"127.0.0.1"}


def test_shipped_configuration_uses_both_kinds_of_pipeline(shipped: Config):
    used = {route.pipeline for route in shipped.routes} - {None}
    assert used == {"st3d", "quality-2.5d"}


CHEST = {
    "SOPClassUID": CT,
    "Modality": "CT",
    "ImageType": ["ORIGINAL", "PRIMARY", "AXIAL"],
    "BodyPartExamined": "CHEST",
    "SeriesDescription": "CHEST LOW DOSE 1.0 B50f",
    "SliceThickness": 1.0,
}


@pytest.mark.parametrize(
    ("change", "route", "action"),
    [
        ({}, "chest-low-dose-thin", "pipeline"),
        ({"SeriesDescription": "Lung screening"}, "chest-low-dose-thin", "pipeline"),
        ({"BodyPartExamined": "LUNG", "SeriesDescription": "ldct"}, "chest-low-dose-thin", "pipeline"),
        ({"SliceThickness": 2.5}, "chest-low-dose", "pipeline"),
        *(
            ({"ConvolutionKernel": sharp}, "chest-low-dose", "pipeline")
            for sharp in ("LUNG", "B70f", "Bl57d", "L", "YA")
        ),
        *(
            ({"ConvolutionKernel": soft}, "chest-low-dose-thin", "pipeline")
            for soft in ("STANDARD", "B30f", "Br40d", "B")
        ),
        ({"SliceThickness": "thin"}, "chest-low-dose", "pipeline"),
        ({"SeriesDescription": "CHEST STANDARD"}, "other-ct", "forward"),
        ({"BodyPartExamined": "HEAD"}, "other-ct", "forward"),
        ({"ImageType": ["ORIGINAL", "PRIMARY", "LOCALIZER"]}, "localizers", "forward"),
        ({"ImageType": ["DERIVED", "SECONDARY", "REFORMATTED", "AVERAGE"]}, "other-ct", "forward"),
        ({"ImageType": ["DERIVED", "SECONDARY", "3D"]}, "other-ct", "forward"),
        ({"SeriesDescription": "CHEST LOW DOSE denoised"}, "chest-low-dose-thin", "pipeline"),  # another maker's words
        ({OWN_OUTPUT: True}, "own-output", "ignore"),
        ({"SOPClassUID": CT + ".1"}, "chest-low-dose-thin", "forward"),
        ({"SOPClassUID": "1.2.840.10008.5.1.4.1.1.7"}, "chest-low-dose-thin", "forward"),
        (
            {"SOPClassUID": "1.2.840.10008.5.1.4.1.1.88.67", "Modality": "SR", "ImageType": None},
            "not-ct-images",
            "forward",
        ),
        ({"SOPClassUID": "1.2.840.10008.5.1.4.1.1.4", "Modality": "MR"}, "not-ct-images", "forward"),
    ],
)
def test_shipped_routes_keep_their_comments_promises(
    shipped: Config, change: dict[str, object], route: str, action: str
):
    header = {key: value for key, value in (CHEST | change).items() if value is not None}
    (match,) = Router(shipped.routes).match(header, "CT1", "DICOMNODE")
    assert (match.route.name, match.action) == (route, action)


REAL = [
    "ge-hispeed-head-tilt-varspacing",
    "ge-lightspeed16-rider-chestpe-1p25mm",
    "ge-revolution-cptacpda-LUNG-5mm",
    "philips-brilliance16p-lidc0314-chest-1mm",
    "siemens-sensation10-lungdxA0002-B40f-8mm",
]


@pytest.mark.data
@pytest.mark.parametrize("name", REAL)
def test_real_full_dose_series_are_forwarded_and_become_candidates_once_named_low_dose(
    shipped: Config, ct_series: Callable[[str], list[Path]], name: str
):
    router = Router(shipped.routes)
    files = ct_series(name)
    for path in (files[0], files[-1]):
        ds = pydicom.dcmread(path, stop_before_pixels=True)
        header = header_values(ds, router.keywords)
        assert header["SliceThickness"] == float(ds["SliceThickness"].value)
        assert header["ImageType"] == list(ds.ImageType)
        (match,) = router.match(header, "CT1", "DICOMNODE")
        assert (match.route.name, match.action) == ("other-ct", "forward")
        header |= {"BodyPartExamined": "CHEST", "SeriesDescription": "LDCT"}
        (match,) = router.match(header, "CT1", "DICOMNODE")
        assert match.route.pipeline == ("st3d" if ds.SliceThickness <= 1.5 else "quality-2.5d")


@pytest.mark.data
def test_odd_files_are_all_routed_and_only_ct_images_to_a_pipeline(shipped: Config, odd_dir: Path):
    everything = Router(
        [*shipped.routes[:1], Route.model_validate({"name": "all", "pipeline": "st3d", "send_to": ["pacs"]})]
    )
    actions = {}
    for path in sorted(odd_dir.glob("*.dcm")):
        ds = pydicom.dcmread(path, stop_before_pixels=True, force=True)
        header = header_values(ds, everything.keywords | {"SpecificCharacterSet", "PatientName", "SeriesDescription"})
        (match,) = everything.match(header, "A", "B")
        actions[path.stem] = match.action
        assert (match.action == "pipeline") == (
            ds.get("SOPClassUID") == CT and "LOCALIZER" not in (ds.get("ImageType") or [])
        )
    assert actions["ct-localizer-16x16"] == actions["philips-surview-256x512"] == "forward"
    assert actions["enhanced-ct-2frame-perfusion"] == actions["sr-report"] == "forward"
    assert actions["ct-16x16-axial"] == "pipeline"
