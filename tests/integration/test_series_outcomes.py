"""Every real series and every odd file, sent to a running node: what becomes of each is written here."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
from conftest import DATA, require_peer
from ct_builder import uid
from holdings import check_holds_one_derived, check_kept, derived_series
from node_process import NodeProcess
from oracle import SYNTAXES, StorageOracle
from peers import orthanc, storescu, wait_for
from pydicom.uid import JPEG2000, CTImageStorage, JPEGExtended12Bit, MediaStorageDirectoryStorage
from scanner import Image, Scanner, header, image, renamed, send

pytestmark = pytest.mark.data

# What a pipeline for single slices makes of it, and the reason against one that looks at neighbours.
SERIES = {
    "ge-hispeed-head-tilt-varspacing": "irregular-spacing",
    "ge-lightspeed16-rider-chestpe-1p25mm": "",
    "ge-revolution-cptacpda-LUNG-5mm": "",
    "ge-vct-cmbcrc-chest-LUNG-2p5mm": "",
    "philips-brilliance16-lungdxA0001-B-5mm": "",
    "philips-brilliance16-lungdxA0001-L-5mm": "",
    "philips-brilliance16p-lidc0314-chest-1mm": "",
    "philips-ingenuity-headphantom-1mm-UB": "",
    "philips-ingenuity-headphantom-1mm-YA": "",
    "philips-ingenuity-headphantom-5mm-UB": "",
    "philips-ingenuity-headphantom-tilt-neg18": "gantry-tilt",
    "siemens-sensation10-lungdxA0002-B40f-8mm": "",
    "siemens-sensation10-lungdxA0002-B70f-8mm": "",
    "siemens-sensation16-acrinflt013-petct-B10f": "",
}
SLICES = 10
"""Of each regular series, from its middle: the outcome does not depend on the rest."""

DENOISED, FORWARDED, NO_CONTEXT = "denoised", "forwarded", "no context"
ODD = {
    "bad-vr": FORWARDED,
    "ct-16x16-axial": "too-small",
    "ct-localizer-16x16": "localizer",
    "ct-small-128": DENOISED,
    "ct-small-no-file-meta": "0xC000",
    **{f"d2n-gantrytilt-{k}": DENOISED for k in (1, 2, 3, 4)},
    "d2n-notavolume-mon-1": "monitoring",
    "d2n-notavolume-mon-2": "monitoring",
    "d2n-sliceincrement-ge-1": DENOISED,
    "d2n-sliceincrement-ge-2": DENOISED,
    "d2n-sliceincrement-siemens-0003": DENOISED,
    "d2n-sliceincrement-siemens-0005": DENOISED,
    "dcmqi-enhanced-ct-legacy-converted": FORWARDED,
    "dcmqi-liver-01": DENOISED,
    "dcmqi-liver-03": DENOISED,
    "dicomdir": NO_CONTEXT,
    "dicomdir-bigendian": NO_CONTEXT,
    "empty-charset": "0xC000",
    "enhanced-ct-2frame-jpeg12-fragmented-nobot": FORWARDED,
    "enhanced-ct-2frame-perfusion": FORWARDED,
    "jpegls-near-16": "0xA900",  # it has no Series Instance UID
    "meta-missing-transfer-syntax": "0xC000",
    "mr-padded": FORWARDED,
    "mr-truncated": FORWARDED,
    "nested-private-sequence": "0xC000",
    "pancreasct-un-vr-j2k": DENOISED,
    "philips-dicomdir": NO_CONTEXT,
    "philips-examsummary-doseinfo-8bit": FORWARDED,
    "philips-examsummary-patientinfo-8bit": FORWARDED,
    "philips-localizer-716x512-j2k": "localizer",
    "philips-surview-256x512": "localizer",
    "rtdose-multiframe": FORWARDED,
    "rtstruct": FORWARDED,
    "seg-1frame": FORWARDED,
    "sr-report": FORWARDED,
    "sr-test": FORWARDED,
    "ts-big-endian": DENOISED,
    "ts-deflated": DENOISED,
    "ts-explicit-le": DENOISED,
    "ts-implicit-le": DENOISED,
    "ts-j2k-lossless": DENOISED,
    "ts-j2k-lossy": DENOISED,
    "ts-jpeg-baseline-8bit": "bad-rescale",
    "ts-jpeg-extended-12bit": "undecodable",
    "ts-jpeg-lossless-p14": DENOISED,
    "ts-jpeg-lossless-sv1": DENOISED,
    "ts-jpeg-p10_12-retired": NO_CONTEXT,
    "ts-jpeg-p6_8-retired": NO_CONTEXT,
    "ts-jpegls-lossless": DENOISED,
    "ts-jpegls-near": DENOISED,
    "ts-rle": DENOISED,
    "un-sequence": "0xC000",
    "us-no-pixel-spacing-rle": FORWARDED,
    **{
        f"charset-{x}": FORWARDED
        for x in ["Arab", "Greek", "H31", "H32", "Hbrw", "I2", "JapMulti", "KoreanMulti", "Russ", "X1", "X2"]
    },
}
ONE_UID_IN_MANY_FILES = ("ts-", "mr-", "bad-vr")
"""These files share their UIDs with others; each is sent under its own."""


@pytest.fixture(scope="module")
def oracle() -> Iterator[StorageOracle]:
    with StorageOracle(ae_title="PACS", syntaxes=[*SYNTAXES, JPEGExtended12Bit, JPEG2000]) as peer:
        yield peer


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory, oracle: StorageOracle) -> Iterator[NodeProcess]:
    settings = {
        "assembly": {"quiet_s": 0.3, "quiet_without_evidence_s": 0.6},
        "routes": [
            {
                "name": "neighbours",
                "when": {"CallingAETitle": "NEIGHBOURS"},
                "pipeline": "test-stack",
                "send_to": ["pacs"],
                "continue": True,
            },
            {"name": "ct", "when": {"Modality": "CT"}, "pipeline": "identity", "send_to": ["pacs"]},
            {"name": "rest", "action": "forward", "send_to": ["pacs"]},
        ],
    }
    with NodeProcess(tmp_path_factory.mktemp("outcomes"), oracle.port, settings) as process:
        yield process


def odd_image(path: Path) -> Image:
    """The file as it is sent; with a command that names what a file without UIDs would be."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what is odd about them
        one = image(path)
    if not one.sop_class_uid:
        sop_class = MediaStorageDirectoryStorage if "dicomdir" in path.stem else CTImageStorage
        return replace(one, sop_class_uid=str(sop_class), sop_instance_uid=uid(path.stem))
    return renamed(one, path.stem) if path.stem.startswith(ONE_UID_IN_MANY_FILES) else one


def outcome(node: NodeProcess, one: Image) -> str:
    """What became of an acknowledged image; empty while its jobs are open."""
    if node.series(one.series_uid).get("state") != "CLOSED":
        return ""
    sql = """SELECT kind, state, reason FROM jobs WHERE series_uid = ?"""
    jobs = node.query(sql, one.series_uid)
    if {job["state"] for job in jobs} & {"QUEUED", "RUNNING", "DISPATCHING"}:
        return ""
    ((kind, state, reason),) = [tuple(job.values()) for job in jobs]
    if state == "SKIPPED":
        return str(reason).partition(":")[0]
    assert state == "DONE", reason
    return DENOISED if kind == "PIPELINE" else FORWARDED


def test_odd_files(node: NodeProcess, oracle: StorageOracle, odd_dir: Path) -> None:
    images = {path.stem: odd_image(path) for path in sorted(odd_dir.glob("*.dcm"))}
    found: dict[str, str] = {}
    acknowledged: dict[str, Image] = {}
    for name, one in images.items():
        with Scanner(node.port, [one]) as scanner:
            if not scanner.accepts(one):
                found[name] = NO_CONTEXT
            elif status := scanner.store(one):
                found[name] = f"0x{status:04X}"
            else:
                acknowledged[name] = one
    for name, one in acknowledged.items():
        found[name] = wait_for(partial(outcome, node, one), 60, f"an outcome of {name}")
    assert found == ODD
    assert node.running
    check_kept(node, acknowledged.values())
    for name, one in acknowledged.items():
        copies = oracle.received.get(one.sop_instance_uid, [])
        assert copies == ([one.sha256] if ODD[name] == FORWARDED else []), name
    denoised = {one.sop_instance_uid for name, one in images.items() if ODD[name] == DENOISED}
    sources = derived_series(oracle, list(images.values())).values()
    assert sorted(source for each in sources for source in each.values()) == sorted(denoised)


@pytest.mark.parametrize("name", SERIES)
def test_series(node: NodeProcess, oracle: StorageOracle, ct_series: Callable[[str], list[Path]], name: str) -> None:
    paths = ct_series(name)
    start = (len(paths) - SLICES) // 2
    images = [image(path) for path in (paths if SERIES[name] == "irregular-spacing" else paths[start : start + SLICES])]
    send(node.port, images, calling="NEIGHBOURS" if SERIES[name] else "SCANNER")
    states = ("DONE", "SKIPPED") if SERIES[name] else ("DONE",)
    done, *skipped = node.wait_series(images[0].series_uid, *states, timeout_s=60)
    assert done["n_in"] == done["n_out"] == len(images)
    assert [job["reason"].partition(":")[0] for job in skipped] == [SERIES[name]] * len(skipped)
    check_kept(node, images)
    check_holds_one_derived(oracle, images)
    ((_, source_of),) = derived_series(oracle, images).items()
    pixels = {one.sop_instance_uid: header(one.data, one.syntax).PixelData for one in images}
    for derived, source in source_of.items():
        assert header(oracle.datasets[derived], oracle.syntax_of[derived]).PixelData == pixels[source]


def test_every_series_and_every_odd_file_is_here(odd_dir: Path) -> None:
    assert {path.name.removesuffix(".tar.xz") for path in (DATA / "series").glob("*.tar.xz")} == set(SERIES)
    assert {path.stem for path in odd_dir.glob("*.dcm")} == set(ODD)


@pytest.mark.peer
def test_odd_files_into_orthanc(tmp_path: Path, odd_dir: Path) -> None:
    """What is no CT volume reaches a real PACS unchanged, sent by DCMTK, and nothing is derived from it."""
    require_peer("Orthanc", "storescu")
    names = ["philips-surview-256x512", "philips-examsummary-doseinfo-8bit", "sr-report", "seg-1frame", "ct-small-128"]
    paths = [odd_dir / f"{name}.dcm" for name in names]
    settings = {
        "routes": [
            {"name": "localizers", "when": {"ImageType": "LOCALIZER"}, "action": "forward", "send_to": ["pacs"]},
            {"name": "ct", "when": {"Modality": "CT"}, "pipeline": "identity", "send_to": ["pacs"]},
            {"name": "rest", "action": "forward", "send_to": ["pacs"]},
        ]
    }
    with orthanc(tmp_path) as pacs, NodeProcess(tmp_path / "node", pacs.port, settings) as node:
        for path in paths:
            assert storescu(node.port, [path], options=["-R"]).returncode == 0, path
        node.wait_jobs("DONE")
        node.wait_jobs(*["DONE"] * 4, kind="ORIGINALS")
        sent = {odd_image(path).sop_instance_uid for path in paths}
        held = set(pacs.sop_instance_uids())
        assert len(held & sent) == 4
        (derived,) = held - sent
        kept = tmp_path / "derived.dcm"
        kept.write_bytes(pacs.file(derived))
        assert image(kept).series_uid == node.jobs()[0]["derived_series_uid"]
