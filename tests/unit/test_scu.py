"""The SCU against DCMTK, Orthanc and a pynetdicom SCP that misbehaves on a script."""

from __future__ import annotations

import hashlib
import socket
import threading
import time
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from conftest import require_peer
from ct_builder import phantom, uid, write_series
from oracle import Script, StorageOracle
from peers import HOST, free_port, orthanc, storescp, wait_for
from pydicom import Dataset, dcmread
from pydicom.dataset import FileMetaDataset
from pydicom.filereader import read_dataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, ImplicitVRLittleEndian, JPEGLSLossless, RLELossless
from pynetdicom import AllStoragePresentationContexts
from scanner import data_set_of

from dicomnode.errors import (
    AssociationRejected,
    PeerAborted,
    PeerTimedOut,
    PeerUnreachable,
)
from dicomnode.requestor import Peer
from dicomnode.scu import Answer, Outgoing, Refused, echo, store


def outgoing(path: Path) -> Outgoing:
    meta = dcmread(path, stop_before_pixels=True).file_meta
    return Outgoing(
        str(meta.MediaStorageSOPInstanceUID), str(meta.MediaStorageSOPClassUID), str(meta.TransferSyntaxUID), path
    )


def digest(path: Path) -> str:
    return hashlib.sha256(data_set_of(path.read_bytes())).hexdigest()


def peer_at(port: int, **changes: float) -> Peer:
    times = {"connect_timeout_s": 5.0, "acse_timeout_s": 5.0, "dimse_timeout_s": 5.0, **changes}
    return Peer("pacs", "ANY", HOST, port, "NODE", **times)


def send(port: int, items: Sequence[Outgoing], **changes: float) -> list[Answer | Refused]:
    answers: list[Answer | Refused] = []
    store(peer_at(port, **changes), items, answers.append, lambda: False)
    return answers


def accepted(items: Sequence[Outgoing]) -> list[Answer | Refused]:
    return [Answer(item.sop_instance_uid, 0x0000) for item in items]


@pytest.fixture(scope="module")
def ct(tmp_path_factory: pytest.TempPathFactory) -> list[Outgoing]:
    """Eight uncompressed slices of 32 x 32."""
    return [outgoing(path) for path in write_series(tmp_path_factory.mktemp("ct"), phantom(8, 32), name="scu")]


# --- what arrives ------------------------------------------------------------------------------------------------


@pytest.mark.peer
@pytest.mark.parametrize("max_pdu", [4096, 131072])
@pytest.mark.parametrize("syntax", [ExplicitVRLittleEndian, RLELossless, JPEGLSLossless])
def test_storescp_gets_the_bytes_of_the_files(tmp_path: Path, syntax: str, max_pdu: int) -> None:
    require_peer("storescp")
    items = [outgoing(path) for path in write_series(tmp_path / "in", phantom(3, 128), transfer_syntax=syntax)]
    with storescp(tmp_path, max_pdu=max_pdu, options=["--accept-all"]) as peer:
        assert send(peer.port, items) == accepted(items)
        received = {outgoing(path).sop_instance_uid: outgoing(path) for path in peer.files()}
    assert len(received) == 3
    for item in items:
        assert digest(received[item.sop_instance_uid].path) == digest(item.path)
        assert received[item.sop_instance_uid].transfer_syntax_uid == syntax


@pytest.mark.parametrize("max_pdu", [0, 64, 4096, 1_000_000])
def test_the_peers_pdu_limit_is_respected(ct: list[Outgoing], max_pdu: int) -> None:
    with StorageOracle(max_pdu=max_pdu) as oracle:
        assert send(oracle.port, ct) == accepted(ct)
        wait_for(lambda: oracle.released == 1)
        assert oracle.received == {item.sop_instance_uid: [digest(item.path)] for item in ct}
        assert oracle.aborted == 0


@pytest.mark.peer
def test_no_response_is_lost(tmp_path: Path) -> None:
    require_peer("storescp")
    items = [outgoing(path) for path in write_series(tmp_path / "in", phantom(300, 16))]
    with storescp(tmp_path) as peer:
        for _ in range(5):
            assert send(peer.port, items) == accepted(items)
        assert len(peer.files()) == 300


@pytest.mark.peer
def test_default_dcmtk_costs_no_delayed_ack(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A storescp with Nagle on writes its response in two pieces; unacknowledged, each image would cost 40 ms."""
    require_peer("storescp")
    items = [outgoing(path) for path in write_series(tmp_path / "in", phantom(100, 16))]
    monkeypatch.setattr("peers._environment", lambda: None)
    with storescp(tmp_path) as peer:
        begun = time.monotonic()
        assert send(peer.port, items) == accepted(items)
        assert time.monotonic() - begun < 2.0  # 100 stalls would be 4 s


@pytest.mark.peer
def test_orthanc_keeps_each_instance_once(tmp_path: Path) -> None:
    require_peer("Orthanc")
    plain = [outgoing(path) for path in write_series(tmp_path / "a", phantom(4, 64), name="plain")]
    packed = [
        outgoing(path)
        for path in write_series(tmp_path / "b", phantom(4, 64), name="packed", transfer_syntax=JPEGLSLossless)
    ]
    with orthanc(tmp_path) as pacs:
        assert echo(peer_at(pacs.port)) < 5
        assert send(pacs.port, plain + packed) == accepted(plain + packed)
        assert send(pacs.port, plain) == accepted(plain)
        assert pacs.sop_instance_uids() == sorted(item.sop_instance_uid for item in plain + packed)
        for item in plain + packed:
            assert data_set_of(pacs.file(item.sop_instance_uid)) == data_set_of(item.path.read_bytes())
        pacs.kill()
        with pytest.raises(PeerUnreachable, match="pacs"):
            send(pacs.port, plain)
        pacs.start()
        assert pacs.count() == 8


@pytest.mark.parametrize("syntaxes", [[ImplicitVRLittleEndian], [ExplicitVRLittleEndian]])
@pytest.mark.parametrize("own", [ExplicitVRLittleEndian, JPEGLSLossless, RLELossless])
def test_a_peer_that_takes_less_gets_the_same_pixels(tmp_path: Path, own: str, syntaxes: list[str]) -> None:
    hu = phantom(2, 48)
    items = [outgoing(path) for path in write_series(tmp_path, hu, transfer_syntax=own)]
    with StorageOracle(syntaxes=syntaxes) as oracle:
        assert send(oracle.port, items) == accepted(items)
    for item, truth in zip(items, hu, strict=True):
        ds = received(oracle, item.sop_instance_uid)
        np.testing.assert_array_equal(ds.pixel_array * ds.RescaleSlope + ds.RescaleIntercept, truth)


def received(oracle: StorageOracle, sop_instance_uid: str) -> Dataset:
    syntax = oracle.syntax_of[sop_instance_uid]
    stream = BytesIO(oracle.datasets[sop_instance_uid])
    ds = read_dataset(stream, is_implicit_VR=syntax == ImplicitVRLittleEndian, is_little_endian=True)
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = syntax
    return ds


@pytest.mark.data
def test_compressed_ct_to_a_peer_of_the_old_school(odd_dir: Path) -> None:
    names = ["jpegls-lossless", "jpegls-near", "j2k-lossless", "rle", "jpeg-lossless-sv1", "deflated", "big-endian"]
    truth = dcmread(odd_dir / "ts-explicit-le.dcm").pixel_array
    for name in names:  # the files share one SOP Instance UID
        item = outgoing(odd_dir / f"ts-{name}.dcm")
        with StorageOracle(syntaxes=[ImplicitVRLittleEndian], sop_classes=[CTImageStorage]) as oracle:
            assert send(oracle.port, [item]) == accepted([item])
        ds = received(oracle, item.sop_instance_uid)
        if name == "jpegls-near":
            assert ds.LossyImageCompression == "01"
            np.testing.assert_array_equal(ds.pixel_array, dcmread(item.path).pixel_array)
        else:
            np.testing.assert_array_equal(ds.pixel_array, truth)


def test_more_pairs_than_one_association_holds(tmp_path: Path) -> None:
    classes = [str(context.abstract_syntax) for context in AllStoragePresentationContexts][:65]
    items = []
    for n, sop_class in enumerate(classes):
        for syntax in (ExplicitVRLittleEndian, ImplicitVRLittleEndian):
            ds = Dataset()
            ds.SOPClassUID, ds.SOPInstanceUID = sop_class, uid("pairs", n, syntax)
            ds.file_meta = FileMetaDataset()
            ds.file_meta.TransferSyntaxUID = syntax
            path = tmp_path / f"{ds.SOPInstanceUID}.dcm"
            ds.save_as(path, enforce_file_format=True)
            items.append(outgoing(path))
    with StorageOracle() as oracle:
        answers = send(oracle.port, items)
        assert sorted(map(repr, answers)) == sorted(map(repr, accepted(items)))
        assert oracle.associations == 2  # 195 contexts
        wait_for(lambda: oracle.released == 2)
        assert oracle.received == {item.sop_instance_uid: [digest(item.path)] for item in items}


def test_two_threads_do_not_disturb_each_other(tmp_path: Path) -> None:
    parts = [
        [outgoing(path) for path in write_series(tmp_path / str(n), phantom(40, 16), name=str(n))] for n in range(3)
    ]
    results: dict[int, list[Answer | Refused]] = {}
    with StorageOracle() as oracle:
        threads = [
            threading.Thread(target=lambda n=n, part=part: results.update({n: send(oracle.port, part)}))
            for n, part in enumerate(parts)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
        assert results == {n: accepted(part) for n, part in enumerate(parts)}
        assert all(len(digests) == 1 for digests in oracle.received.values())


# --- what is answered --------------------------------------------------------------------------------------------


def test_each_answer_belongs_to_its_instance(ct: list[Outgoing]) -> None:
    statuses = {1: 0xB000, 3: 0xA700, 4: 0xA900, 5: 0xC123, 7: 0x0111}
    with StorageOracle(Script(status_of_nth=statuses, comment="Disk is full")) as oracle:
        answers = send(oracle.port, ct)
    assert [answer.status for answer in answers if isinstance(answer, Answer)] == [
        statuses.get(n, 0) for n in range(1, 9)
    ]
    assert [answer.sop_instance_uid for answer in answers] == [item.sop_instance_uid for item in ct]
    assert "full" not in str(answers)


def test_what_the_peer_does_not_take_is_refused_alone(tmp_path: Path, ct: list[Outgoing]) -> None:
    (packed,) = write_series(tmp_path, phantom(1), name="packed", transfer_syntax=RLELossless)
    foreign = Outgoing("1.2.3.4", "1.2.840.10008.5.1.4.1.1.4", ExplicitVRLittleEndian, tmp_path / "mr.dcm")
    gone = Outgoing("1.2.3.5", CTImageStorage, ExplicitVRLittleEndian, tmp_path / "gone.dcm")
    with StorageOracle(syntaxes=[JPEGLSLossless], sop_classes=[CTImageStorage]) as oracle:
        (answer,) = send(oracle.port, [outgoing(packed)])
        assert isinstance(answer, Refused)
        assert "CT Image Storage" in answer.reason
        assert "RLE Lossless (1.2.840.10008.1.2.5)" in answer.reason
        assert "pacs" in answer.reason
        wait_for(lambda: oracle.released == 1)
    with StorageOracle(sop_classes=[CTImageStorage]) as oracle:
        answers = send(oracle.port, [ct[0], foreign, gone, ct[1]])
        assert [answers[0], answers[3]] == accepted(ct[:2])
        assert isinstance(answers[1], Refused)
        assert "does not know MR Image Storage" in answers[1].reason
        assert isinstance(answers[2], Refused)
        assert "No such file" in answers[2].reason
        assert oracle.images == 2


def test_a_request_is_told_before_it_is_sent_and_no_other(tmp_path: Path, ct: list[Outgoing]) -> None:
    gone = Outgoing("1.2.3.5", CTImageStorage, ExplicitVRLittleEndian, tmp_path / "gone.dcm")
    told: list[str] = []

    def answered(answer: Answer | Refused) -> None:
        told.append(f"answer {answer.sop_instance_uid}")

    def requested(uid: str) -> None:
        told.append(f"{oracle.images} before {uid}")

    with StorageOracle(Script(drop_at={2})) as oracle:
        with pytest.raises(PeerAborted):
            store(peer_at(oracle.port), [ct[0], gone, *ct[1:]], answered, lambda: False, requested)
        first, second = ct[0].sop_instance_uid, ct[1].sop_instance_uid
        assert told == [f"0 before {first}", f"answer {first}", "answer 1.2.3.5", f"1 before {second}"]
    with pytest.raises(PeerUnreachable):
        store(peer_at(oracle.port), ct, answered, lambda: False, requested)
    assert len(told) == 4


def test_stops_between_two_images_when_asked(ct: list[Outgoing]) -> None:
    answers: list[Answer | Refused] = []
    with StorageOracle() as oracle:
        store(peer_at(oracle.port), ct, answers.append, lambda: len(answers) == 3)
        assert answers == accepted(ct[:3])
        wait_for(lambda: oracle.released == 1)
        assert oracle.images == 3
        store(peer_at(oracle.port), ct, answers.append, lambda: True)
        assert oracle.associations == 1


def test_an_error_of_the_caller_releases_the_association(ct: list[Outgoing]) -> None:
    def fail(answer: Answer | Refused) -> None:
        raise RuntimeError("database is gone")

    with StorageOracle() as oracle:
        with pytest.raises(RuntimeError, match="database is gone"):
            store(peer_at(oracle.port), ct, fail, lambda: False)
        wait_for(lambda: oracle.released == 1)
        assert (oracle.images, oracle.aborted) == (1, 0)


# --- what goes wrong ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "permanent", "words"), [("permanent", True, "called AE title"), ("transient", False, "limit of assoc")]
)
def test_rejected_associations_say_why(ct: list[Outgoing], kind: str, permanent: bool, words: str) -> None:
    with StorageOracle(Script(reject=kind)) as oracle, pytest.raises(AssociationRejected, match=words) as caught:
        send(oracle.port, ct)
    assert caught.value.permanent is permanent
    assert (caught.value.result, caught.value.source, caught.value.reason) == ((1, 1, 7) if permanent else (2, 3, 2))


@pytest.mark.parametrize(
    ("script", "kept"),
    [(Script(drop_at={4}), 3), (Script(drop_stored_at={4}), 4), (Script(abort_at={4}), 3)],
    ids=["dropped", "dropped after storing", "aborted"],
)
def test_a_peer_dying_in_the_middle_loses_no_answer(ct: list[Outgoing], script: Script, kept: int) -> None:
    answers: list[Answer | Refused] = []
    with StorageOracle(script) as oracle:
        with pytest.raises(PeerAborted, match="pacs"):
            store(peer_at(oracle.port), ct, answers.append, lambda: False)
        assert answers == accepted(ct[:3])
        assert len(oracle.received) == kept
        store(peer_at(oracle.port), ct[3:], answers.append, lambda: False)
        assert answers == accepted(ct)
        assert set(oracle.received) == {item.sop_instance_uid for item in ct}


def test_late_answers_are_waited_for(ct: list[Outgoing]) -> None:
    with StorageOracle(Script(delay_s=0.2)) as oracle:
        assert send(oracle.port, ct[:2]) == accepted(ct[:2])


def test_silence_ends_in_time(ct: list[Outgoing]) -> None:
    answers: list[Answer | Refused] = []
    with StorageOracle(Script(silent_at={2})) as oracle:
        begun = time.monotonic()
        with pytest.raises(PeerTimedOut, match="pacs"):
            store(peer_at(oracle.port, dimse_timeout_s=0.3), ct, answers.append, lambda: False)
        assert 0.3 <= time.monotonic() - begun < 1.5
        assert answers == accepted(ct[:1])


def big(folder: Path, size: int = 64_000_000) -> Outgoing:
    """An instance larger than what two sockets can hold."""
    ds = Dataset()
    ds.SOPClassUID, ds.SOPInstanceUID = CTImageStorage, uid("big")
    ds.EncapsulatedDocument = bytes(size)
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = ImplicitVRLittleEndian
    ds.save_as(folder / "big.dcm", enforce_file_format=True)
    return outgoing(folder / "big.dcm")


def test_a_peer_that_stops_reading_is_dropped_in_time(tmp_path: Path) -> None:
    item = big(tmp_path)
    with StorageOracle(Script(stop_reading_after=100_000)) as oracle:
        begun = time.monotonic()
        with pytest.raises(PeerTimedOut, match="taking the request"):
            send(oracle.port, [item], dimse_timeout_s=0.3)
        assert time.monotonic() - begun < 2


def test_nobody_there_is_said_at_once(ct: list[Outgoing]) -> None:
    with pytest.raises(PeerUnreachable, match="refused"):
        send(free_port(), ct)
    with pytest.raises(PeerUnreachable, match=r"no-such-host\.invalid"):
        store(Peer("pacs", "ANY", "no-such-host.invalid", 104, "NODE"), ct, print, lambda: False)
    with pytest.raises(PeerUnreachable):
        store(Peer("pacs", "ANY", "a" * 64 + ".invalid", 104, "NODE"), ct, print, lambda: False)


def test_a_full_backlog_ends_in_time(ct: list[Outgoing]) -> None:
    with socket.socket() as listener, socket.socket() as first, socket.socket() as second:
        listener.bind((HOST, 0))
        listener.listen(0)
        for waiting in (first, second):
            waiting.settimeout(0.1)
            waiting.connect_ex(listener.getsockname())
        begun = time.monotonic()
        with pytest.raises(PeerUnreachable, match="timed out"):
            send(listener.getsockname()[1], ct, connect_timeout_s=0.3)
        assert time.monotonic() - begun < 1.5


def test_echo_tells_a_peer_that_lives_from_one_that_does_not() -> None:
    with StorageOracle() as oracle:
        assert 0 < echo(peer_at(oracle.port)) < 5
        wait_for(lambda: oracle.released == 1)
    with pytest.raises(PeerUnreachable):
        echo(peer_at(oracle.port))
