"""What the storage SCP takes, what it refuses and how: syntaxes, titles, addresses, UIDs, limits, names."""

from __future__ import annotations

import socket
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import require_peer
from ct_builder import phantom, uid, write_series
from holdings import check_kept
from node_process import NodeProcess
from oracle import Script, StorageOracle
from peers import HOST, dcmsend, echoscu, orthanc, wait_for
from pydicom.uid import (
    CTImageStorage,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
)
from pynetdicom import AllStoragePresentationContexts
from scanner import Image, Rejected, Scanner, image, renamed, send

TRANSFER_SYNTAXES = {
    "big-endian",
    "deflated",
    "explicit-le",
    "implicit-le",
    "j2k-lossless",
    "j2k-lossy",
    "jpeg-baseline-8bit",
    "jpeg-extended-12bit",
    "jpeg-lossless-p14",
    "jpeg-lossless-sv1",
    "jpegls-lossless",
    "jpegls-near",
    "rle",
}
"""Files of one slice in all syntaxes that an installed decoder reads. Syntaxes that DICOM retired are not accepted."""
RETIRED = {"jpeg-p10_12-retired", "jpeg-p6_8-retired"}
SECRET_NAME, SECRET_ID, SECRET_DATE = "Zzyzx^Qwertine", "ZQ-7755331", "19530219"


SETTINGS = {
    "reception": {
        "calling_ae_titles": ["SCANNER", "DCMSEND", "ECHOSCU"],
        "networks": ["127.0.0.1/32"],
        "max_associations": 2,
        "max_object_mb": 1,
        "different_duplicate": "refuse",
    }
}


@pytest.fixture
def one(tmp_path: Path, request: pytest.FixtureRequest) -> Image:
    """A CT image of its own for each test."""
    (path,) = write_series(tmp_path, phantom(1), name=request.node.name)
    return image(path)


def spooled(node: NodeProcess) -> set[Path]:
    return {path for path in node.spool.rglob("*") if path.is_file() and "derived" not in path.parts}


@pytest.mark.data
@pytest.mark.parametrize("name", sorted(TRANSFER_SYNTAXES))
def test_a_transfer_syntax_is_kept_bit_for_bit(node: NodeProcess, odd_dir: Path, name: str) -> None:
    # One slice in many syntaxes has one UID: each gets its own, the rest of its bytes is that of the file.
    original = image(odd_dir / f"ts-{name}.dcm")
    sent = renamed(original, name)
    send(node.port, [sent])
    wait_for(lambda: node.series(sent.series_uid), what="the index")
    check_kept(node, [sent])
    if name != "deflated":
        differing = sum(a != b for a, b in zip(sent.data, original.data, strict=True))
        assert differing <= 2 * (len(sent.sop_instance_uid) + len(sent.series_uid))
    kept = image(node.spool / "instances" / sent.series_uid / f"{sent.sop_instance_uid}.dcm")
    assert kept == sent


@pytest.mark.data
def test_a_file_as_it_is(node: NodeProcess, odd_dir: Path) -> None:
    sent = image(odd_dir / "ts-explicit-le.dcm")
    send(node.port, [sent])
    wait_for(lambda: node.series(sent.series_uid), what="the index")
    check_kept(node, [sent])


@pytest.mark.data
def test_every_syntax_is_tested(odd_dir: Path) -> None:
    assert {path.stem.removeprefix("ts-") for path in odd_dir.glob("ts-*.dcm")} == TRANSFER_SYNTAXES | RETIRED


@pytest.mark.data
@pytest.mark.parametrize("name", sorted(RETIRED))
def test_a_syntax_without_a_decoder_is_not_accepted(node: NodeProcess, odd_dir: Path, name: str) -> None:
    sent = image(odd_dir / f"ts-{name}.dcm")
    with Scanner(node.port, [sent]) as scanner:
        assert not scanner.accepts(sent)
        assert scanner.accepted.refusals == {1: 4}  # transfer syntaxes not supported (PS3.8 table 9-18)


def test_every_storage_sop_class_is_accepted(node: NodeProcess) -> None:
    syntaxes = [
        (str(syntax),)
        for syntax in (
            ExplicitVRLittleEndian,
            ImplicitVRLittleEndian,
            DeflatedExplicitVRLittleEndian,
            ExplicitVRBigEndian,
        )
    ]
    wanted = [(str(known.abstract_syntax), syntaxes[k % 4]) for k, known in enumerate(AllStoragePresentationContexts)]
    assert len(wanted) > 150
    for start in range(0, len(wanted), 120):
        part = wanted[start : start + 120]
        with Scanner(node.port, contexts=part) as scanner:
            assert scanner.accepted.refusals == {}
            assert [scanner.accepted.syntaxes[2 * k + 1] for k in range(len(part))] == [one for _, (one,) in part]


def test_verification(node: NodeProcess) -> None:
    with Scanner(node.port) as scanner:
        assert scanner.echo() == 0x0000


@pytest.mark.peer
def test_verification_by_dcmtk(node: NodeProcess) -> None:
    require_peer("echoscu")
    assert echoscu(node.port).returncode == 0
    assert echoscu(node.port, calling="STRANGER").returncode != 0


@pytest.mark.parametrize(
    ("titles", "answer"),
    [({"called": "SOMEBODY"}, (1, 1, 7)), ({"calling": "STRANGER"}, (1, 1, 3))],
    ids=["called", "calling"],
)
def test_an_unknown_title_is_rejected(node: NodeProcess, titles: dict[str, str], answer: tuple[int, int, int]) -> None:
    with pytest.raises(Rejected) as rejection, Scanner(node.port, **titles):
        pass
    assert rejection.value.args == answer


def test_a_stranger_is_closed_at_once(node: NodeProcess) -> None:
    with socket.create_connection((HOST, node.port), 10, ("127.0.0.2", 0)) as connection:
        connection.settimeout(5)
        assert connection.recv(1) == b""
    assert b"connection from 127.0.0.2 refused: not in reception.networks" in node.log.read_bytes()


def test_more_associations_than_allowed(node: NodeProcess) -> None:
    with ExitStack() as stack:
        for _ in range(2):
            stack.enter_context(Scanner(node.port))
        with pytest.raises(Rejected) as rejection, Scanner(node.port):
            pass
        assert rejection.value.args == (2, 3, 2)  # transient, local limit exceeded

    def room_again() -> bool:
        try:
            with Scanner(node.port) as scanner:
                return scanner.echo() == 0x0000
        except Rejected:
            return False

    wait_for(room_again, what="room for an association")


@pytest.mark.parametrize(
    ("change", "command", "status"),
    [
        ({}, {"sop_instance": uid("another")}, 0xA900),
        ({}, {"sop_instance": "1.2.3/../../../../tmp/evil"}, 0xA900),
        ({}, {"sop_instance": "../../evil"}, 0xA900),
        ({"data": b""}, {}, 0xC000),
        ({"data": bytes(range(256)) * 4}, {}, 0xC000),
        ({"data": b"\x08\x00\x16\x00UI\xff\xff1.2"}, {}, 0xC000),
        ({"data": b"\0" * 1_000_001}, {}, 0xA700),
    ],
    ids=["other-uid", "path-after-uid", "path", "empty", "garbage", "cut-off", "too-large"],
)
def test_an_object_that_is_refused(
    node: NodeProcess, one: Image, change: dict[str, bytes], command: dict[str, str], status: int
) -> None:
    before = spooled(node)
    with Scanner(node.port, [one]) as scanner:
        assert scanner.store(replace(one, **change), **command) == status
        # The association lives on.
        assert scanner.store(one) == 0x0000
    assert {path.name for path in spooled(node) - before} == {f"{one.sop_instance_uid}.dcm"}
    assert b"0x%04X to 127.0.0.1" % status in node.log.read_bytes()


def test_another_sop_class_than_the_command_says(node: NodeProcess, one: Image) -> None:
    mr = "1.2.840.10008.5.1.4.1.1.4"
    with Scanner(node.port, [one, replace(one, sop_class_uid=mr)]) as scanner:
        assert scanner.store(one, sop_class=mr) == 0xA900
    assert not (node.spool / "instances" / one.series_uid).exists()


@pytest.mark.parametrize("keyword", ["SeriesInstanceUID", "StudyInstanceUID"])
@pytest.mark.parametrize("value", ["../../../tmp/evil", "1.2.3\n4", "1.2." + "3" * 62, ""])
def test_a_uid_that_is_none(node: NodeProcess, tmp_path: Path, keyword: str, value: str) -> None:
    before = spooled(node)
    (path,) = write_series(tmp_path, phantom(1), name="hostile")
    sent = image(path)
    old = {"SeriesInstanceUID": sent.series_uid, "StudyInstanceUID": uid("study")}[keyword].encode()
    new = value.encode() + b"\0" * (len(value) % 2)
    at = sent.data.index(old)
    length = len(old) + len(old) % 2
    data = sent.data[: at - 2] + len(new).to_bytes(2, "little") + new + sent.data[at + length :]
    with Scanner(node.port, [sent]) as scanner:
        assert scanner.store(replace(sent, data=data)) == 0xA900
    assert spooled(node) == before


def test_a_different_duplicate_where_the_site_refuses_it(node: NodeProcess, one: Image, tmp_path: Path) -> None:
    other = replace(one, data=one.data[:-2] + b"\1\1")
    with Scanner(node.port, [one]) as scanner:
        assert [scanner.store(each) for each in (one, one, other, one)] == [0, 0, 0x0111, 0]
    wait_for(lambda: node.series(one.series_uid), what="the index")
    check_kept(node, [one])
    assert not (node.spool / "conflicts" / one.series_uid).exists()
    assert node.series(one.series_uid)["n_conflicts"] == 0


def test_no_space(tmp_path: Path) -> None:
    (path,) = write_series(tmp_path / "ct", phantom(1), name="no space")
    one = image(path)
    settings = {"reception": {"min_free_mb": 10**9}}
    with StorageOracle() as pacs, NodeProcess(tmp_path / "node", pacs.port, settings) as node:
        with Scanner(node.port, [one]) as scanner:
            assert scanner.store(one) == 0xA700
            assert scanner.echo() == 0x0000
        assert spooled(node) == {node.spool / "lock"}
        assert not node.series(one.series_uid)


@pytest.mark.peer
def test_patients_are_named_nowhere(tmp_path: Path) -> None:
    require_peer("Orthanc", "dcmsend")
    named = {
        "PatientName": SECRET_NAME,
        "PatientID": SECRET_ID,
        "PatientBirthDate": SECRET_DATE,
        "ReferringPhysicianName": SECRET_NAME,
        "AccessionNumber": SECRET_ID,
        "SeriesDescription": f"Chest of {SECRET_NAME}\nforged line",
    }
    good = write_series(tmp_path / "ct", phantom(4), name="named good", **named)
    refused = write_series(tmp_path / "ct", phantom(2), name="named refused", RescaleType="US", **named)
    (bad,) = write_series(tmp_path / "ct", phantom(1), name="named bad", **named)
    # A peer whose every ErrorComment names the patient: of a warning, a passing failure and refusals.
    talkative = StorageOracle(
        Script(status=0xA900, status_of_nth={1: 0xB000, 2: 0xC000}, comment=f"{SECRET_NAME} is {SECRET_ID}")
    )
    settings = {
        "destinations": {"talkative": {"ae_title": "ORACLE", "host": HOST, "port": talkative.port}},
        "routes": [
            {
                "name": "ct",
                "when": {"PatientName": {"exists": True}, "PatientBirthDate": {"not": "19000101"}},
                "pipeline": "identity",
                "send_to": ["pacs", "talkative"],
                "originals_to": ["pacs", "talkative"],
            }
        ],
        "node": {"log_level": "DEBUG"},
    }
    with talkative, orthanc(tmp_path) as pacs, NodeProcess(tmp_path / "node", pacs.port, settings) as node:
        assert dcmsend(node.port, [*good, *refused]).returncode == 0
        with Scanner(node.port, [image(bad)]) as scanner:
            assert scanner.store(replace(image(bad), series_uid="x"), sop_instance=uid("other")) == 0xA900
        wait_for(lambda: sorted(job["state"] for job in node.jobs()) == ["FAILED", "SKIPPED"], 40)
        wait_for(lambda: pacs.count() == len(good) * 2 + len(refused), 20, "originals and derived")
        listed = node.command("jobs", "list").stdout + node.command("jobs", "show", node.jobs()[0]["id"]).stdout
        assert node.stop() == 0
    searched = [node.log, *node.folder.glob("node.db*")]
    contents = {path.name: path.read_bytes() for path in searched} | {"jobs list and show": listed.encode()}
    assert len(contents) >= 3
    assert str(CTImageStorage).encode() in contents["node.db"]  # what is looked through is what was written
    assert b"status 0xA900" in contents["node.db"]
    for name, content in contents.items():
        for secret in (SECRET_NAME, *SECRET_NAME.split("^"), SECRET_ID, SECRET_DATE, "forged"):
            assert secret.encode() not in content, f"{secret} is in {name}"
