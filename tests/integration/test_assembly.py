"""How images become series: pauses, aborts, interleaving, parallel senders, duplicates, late and missing slices."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest
from conftest import require_peer
from ct_builder import phantom, write_series
from holdings import check_holds_one_derived, check_kept, datasets, derived_series
from node_process import NodeProcess, alive
from oracle import StorageOracle
from peers import orthanc, storescu, wait_for
from pydicom import dcmread
from scanner import Image, Scanner, image, send

QUIET_S = 0.5
LONG_QUIET_S = 4.0
SLICES = 6

SETTINGS = {
    "assembly": {"quiet_s": QUIET_S, "quiet_without_evidence_s": LONG_QUIET_S},
    "compute": {"max_worker_deaths": 2},
    "routes": [
        {"name": "localizers", "when": {"ImageType": "LOCALIZER"}, "action": "forward", "send_to": ["pacs"]},
        {"name": "held", "when": {"CallingAETitle": "HELD"}, "pipeline": "test-held", "send_to": ["pacs"]},
        {"name": "stack", "when": {"CallingAETitle": "STACK"}, "pipeline": "test-stack", "send_to": ["pacs"]},
        {
            "name": "crash",
            "when": {"CallingAETitle": "CRASH"},
            "pipeline": "test-crash",
            "send_to": ["pacs"],
            "originals_to": ["pacs"],
        },
        {
            "name": "harmful",
            "when": {"CallingAETitle": "HARMFUL"},
            "pipeline": "test-harmful",
            "send_to": ["pacs"],
            "originals_to": ["pacs"],
        },
        {"name": "ct", "when": {"Modality": "CT"}, "pipeline": "identity", "send_to": ["pacs"]},
        {"name": "rest", "action": "forward", "send_to": ["pacs"]},
    ],
}


def series(folder: Path, name: str, slices: int = SLICES, **overrides: object) -> list[Image]:
    return [image(path) for path in write_series(folder, phantom(slices), name=name, **overrides)]


def pause(seconds: float) -> None:
    """A pause of the sender: the passing of time itself is the condition."""
    end = time.monotonic() + seconds
    wait_for(lambda: time.monotonic() > end, seconds + 1)


def flush(node: NodeProcess, folder: Path, name: str) -> None:
    """Returns when everything sent before is indexed: images are indexed in the order in which they were stored."""
    (one,) = series(folder, f"flush {name}", 1, ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"])
    send(node.port, [one])
    wait_for(lambda: node.series(one.series_uid), what="the index")


def test_a_pause_shorter_than_the_quiet_time_is_one_series(
    node: NodeProcess, pacs: StorageOracle, tmp_path: Path
) -> None:
    images = series(tmp_path, "short pause")
    # A gap is left in the middle: nothing is complete before the second association.
    send(node.port, [*images[:2], *images[4:]])
    pause(2 * QUIET_S)
    assert node.series(images[0].series_uid)["state"] == "OPEN"
    send(node.port, images[2:4])
    (job,) = node.wait_series(images[0].series_uid, "DONE")
    assert (job["n_in"], job["n_out"], job["generation"]) == (SLICES, SLICES, 1)
    assert node.series(images[0].series_uid)["evidence"] == f"{SLICES} slices without a gap"
    check_holds_one_derived(pacs, images)


def test_a_late_slice_supersedes(node: NodeProcess, pacs: StorageOracle, tmp_path: Path) -> None:
    images = series(tmp_path, "late")
    uid = images[0].series_uid
    send(node.port, images[:-1])
    (first,) = node.wait_series(uid, "DONE")
    assert first["n_out"] == SLICES - 1
    first_derived = check_holds_one_derived(pacs, images[:-1])

    send(node.port, images[-1:])
    first, second = node.wait_series(uid, "DONE", "DONE")
    assert (first["superseded_by"], second["superseded_by"]) == (second["id"], None)
    assert any("superseded" in event and second["id"] in event for event in node.events(first["id"]))
    assert (second["generation"], second["n_in"], second["n_out"]) == (2, SLICES, SLICES)
    assert (node.series(uid)["generation"], node.series(uid)["n_instances"]) == (2, SLICES)
    found = derived_series(pacs, images)
    assert set(found) == {first_derived, second["derived_series_uid"]}
    assert sorted(found[second["derived_series_uid"]].values()) == sorted(one.sop_instance_uid for one in images)
    assert not set(found[first_derived]) & set(found[second["derived_series_uid"]])
    check_kept(node, images)


def test_a_late_slice_stops_what_runs(node: NodeProcess, pacs: StorageOracle, tmp_path: Path) -> None:
    images = series(tmp_path, "late while running")
    uid = images[0].series_uid
    with node.holding():
        send(node.port, images[:-1], calling="HELD")
        node.wait_series(uid, "RUNNING")
        child = node.held_child()
        assert child in node.children()
        send(node.port, images[-1:], calling="HELD")
        first, second = node.wait_series(uid, "CANCELLED", "RUNNING")
        assert first["superseded_by"] == second["id"]
        assert not alive(child)
        assert not list((node.spool / "derived").glob(f"{first['id']}*"))
        assert not derived_series(pacs, images)
    _, second = node.wait_series(uid, "CANCELLED", "DONE")
    assert (second["crashes"], second["n_out"]) == (0, SLICES)
    assert check_holds_one_derived(pacs, images) == second["derived_series_uid"]


def test_an_abort_is_a_pause(node: NodeProcess, pacs: StorageOracle, tmp_path: Path) -> None:
    images = series(tmp_path, "abort")
    with Scanner(node.port, images) as scanner:
        for one in (*images[:2], *images[4:]):
            assert scanner.store(one) == 0x0000
        scanner.begin(images[2])
        scanner.abort()
    # The half image was never acknowledged and is nowhere.
    flush(node, tmp_path, "abort")
    assert node.series(images[0].series_uid)["n_instances"] == SLICES - 2
    assert not list(node.spool.rglob("*.part"))
    send(node.port, images[2:4])
    (job,) = node.wait_series(images[0].series_uid, "DONE")
    assert (job["n_in"], job["generation"]) == (SLICES, 1)
    check_kept(node, images)
    check_holds_one_derived(pacs, images)


def test_interleaved_series_stay_apart(node: NodeProcess, pacs: StorageOracle, tmp_path: Path) -> None:
    one, other = series(tmp_path, "interleaved one"), series(tmp_path, "interleaved other")
    send(node.port, [each for pair in zip(one, other, strict=True) for each in pair])
    for images in (one, other):
        (job,) = node.wait_series(images[0].series_uid, "DONE")
        assert (job["n_in"], job["n_out"]) == (SLICES, SLICES)
        check_kept(node, images)
        check_holds_one_derived(pacs, images)


def test_parallel_associations_bring_one_series(node: NodeProcess, pacs: StorageOracle, tmp_path: Path) -> None:
    images = series(tmp_path, "parallel", 12)
    together = threading.Barrier(3)
    failures: list[Exception] = []

    def bring(part: list[Image]) -> None:
        try:
            with Scanner(node.port, part) as scanner:
                together.wait(30)
                assert [scanner.store(one) for one in part] == [0x0000] * len(part)
        except Exception as error:  # shown by the test's own thread
            failures.append(error)

    # The parts overlap: two associations bring the same image at the same time.
    senders = [threading.Thread(target=bring, args=(images[k : k + 6],)) for k in (0, 3, 6)]
    for sender in senders:
        sender.start()
    for sender in senders:
        sender.join(60)
    assert not failures
    (job,) = node.wait_series(images[0].series_uid, "DONE")
    assert (job["n_in"], job["generation"]) == (12, 1)
    assert node.series(images[0].series_uid)["n_conflicts"] == 0
    check_kept(node, images)
    check_holds_one_derived(pacs, images)


def test_a_series_stays_open_while_its_sender_does(node: NodeProcess, pacs: StorageOracle, tmp_path: Path) -> None:
    images = series(tmp_path, "open association")
    with Scanner(node.port, images) as scanner:
        for one in images:
            assert scanner.store(one) == 0x0000
        pause(3 * QUIET_S)
        assert node.series(images[0].series_uid)["state"] == "OPEN"
    node.wait_series(images[0].series_uid, "DONE")
    check_holds_one_derived(pacs, images)


def test_the_same_image_again(node: NodeProcess, pacs: StorageOracle, tmp_path: Path) -> None:
    images = series(tmp_path, "again")
    uid = images[0].series_uid
    send(node.port, images)
    node.wait_series(uid, "DONE")
    jobs, derived = node.jobs(), derived_series(pacs, images)
    copies = {one: list(pacs.received[one]) for one in next(iter(derived.values()))}

    send(node.port, images[2:4])
    flush(node, tmp_path, "again")
    wait_for(lambda: node.series(uid)["state"] == "CLOSED", 10, "the series to be judged again")
    assert (node.jobs(), node.series(uid)["n_instances"]) == (jobs, len(images))
    assert len(list((node.spool / "instances" / uid).iterdir())) == SLICES
    assert not (node.spool / "conflicts" / uid).exists()
    node.wait_series(uid, "DONE")
    assert derived_series(pacs, images) == derived
    assert {one: list(pacs.received[one]) for one in copies} == copies


def test_the_same_image_with_other_bytes_is_kept_apart(node: NodeProcess, pacs: StorageOracle, tmp_path: Path) -> None:
    images = series(tmp_path, "conflict")
    uid = images[0].series_uid
    send(node.port, images)
    node.wait_series(uid, "DONE")
    other = series(tmp_path / "other", "conflict", PatientComments="another content")[2]
    assert (other.sop_instance_uid, other.data == images[2].data) == (images[2].sop_instance_uid, False)

    send(node.port, [other])  # 0x0000: it is safe
    wait_for(lambda: node.series(uid)["n_conflicts"] == 1, what="the flag")
    check_kept(node, images)
    (kept,) = (node.spool / "conflicts" / uid).iterdir()
    assert image(kept) == other
    assert kept.name.startswith(f"{other.sop_instance_uid}.")
    # Neither its arrival nor its content changed anything that went out.
    row = node.series(uid)
    assert (row["state"], row["generation"], row["n_instances"]) == ("CLOSED", 1, SLICES)
    node.wait_series(uid, "DONE")
    check_holds_one_derived(pacs, images)


def test_a_missing_slice_is_named(node: NodeProcess, pacs: StorageOracle, tmp_path: Path) -> None:
    images = series(tmp_path, "gap")
    send(node.port, [*images[:3], *images[4:]], calling="STACK")
    (job,) = node.wait_series(images[0].series_uid, "SKIPPED")
    # Slices at -100, -98, … mm: the fourth, at -94 mm, is not there.
    assert job["reason"].startswith("gap: 1 slice(s) missing between -96.00 and -92.00 mm")
    assert "4.00 mm between the slices at -96.00 mm and -92.00 mm" in node.series(images[0].series_uid)["evidence"]
    assert not derived_series(pacs, images)


def test_an_announced_number_that_does_not_come(node: NodeProcess, pacs: StorageOracle, tmp_path: Path) -> None:
    images = series(tmp_path, "announced", ImagesInAcquisition=SLICES + 2)
    begun = time.monotonic()
    send(node.port, images)
    (job,) = node.wait_series(images[0].series_uid, "DONE")
    assert time.monotonic() - begun > LONG_QUIET_S
    short = f"{SLICES} of {SLICES + 2} images came"
    assert node.series(images[0].series_uid)["evidence"] == short
    assert f"QUEUED series closed: {short}" in node.events(job["id"])
    check_holds_one_derived(pacs, images)


def test_a_localizer_inside_a_series_goes_its_own_way(node: NodeProcess, pacs: StorageOracle, tmp_path: Path) -> None:
    types = [["ORIGINAL", "PRIMARY", "AXIAL"]] * SLICES
    types[0] = ["ORIGINAL", "PRIMARY", "LOCALIZER"]
    images = series(tmp_path, "localizer inside", ImageType=lambda k: types[k])
    send(node.port, images)
    (job,) = node.wait_series(images[0].series_uid, "DONE")
    node.wait_series(images[0].series_uid, "DONE", kind="ORIGINALS")
    assert job["n_in"] == SLICES - 1
    check_holds_one_derived(pacs, images[1:])
    assert pacs.received[images[0].sop_instance_uid] == [images[0].sha256]
    assert not set(pacs.sop_instance_uids()) & {one.sop_instance_uid for one in images[1:]}


@pytest.mark.parametrize(("calling", "state"), [("CRASH", "FAILED"), ("HARMFUL", "WITHHELD")])
def test_originals_go_out_whatever_happens_to_the_denoising(
    node: NodeProcess, pacs: StorageOracle, tmp_path: Path, calling: str, state: str
) -> None:
    images = series(tmp_path, f"originals {calling}")
    uid = images[0].series_uid
    with Scanner(node.port, images, calling=calling) as scanner:
        for one in images[:-1]:
            assert scanner.store(one) == 0x0000
        wait_for(lambda: set(pacs.sop_instance_uids()) >= {one.sop_instance_uid for one in images[:-1]}, 20)
        assert node.series(uid)["state"] == "OPEN"
        assert scanner.store(images[-1]) == 0x0000
    (job,) = node.wait_series(uid, state)
    (originals,) = node.wait_series(uid, "DONE", kind="ORIGINALS")
    assert originals["n_out"] == SLICES
    for one in images:
        assert pacs.received[one.sop_instance_uid] == [one.sha256]
    assert not derived_series(pacs, images)
    assert job["derived_series_uid"] is None
    if state == "WITHHELD":
        assert "moved by +40.0" in job["reason"]
    else:
        assert (job["crashes"], (node.controls / "crashes").read_text()) == (2, "xx")


def test_nothing_came_twice_and_nothing_foreign(node: NodeProcess, pacs: StorageOracle) -> None:
    """Over all tests of this file: every object the PACS holds has one sender, one content and came once."""
    ours = {row["sop_instance_uid"] for row in node.query("SELECT sop_instance_uid FROM transfers")}
    assert set(pacs.sop_instance_uids()) == ours
    assert {uid: len(copies) for uid, copies in pacs.received.items() if len(copies) != 1} == {}
    for ds in datasets(pacs).values():
        assert (ds.ImageType[0] == "DERIVED") == ("SourceImageSequence" in ds)


@pytest.mark.peer
def test_two_scanners_one_series_into_orthanc(tmp_path: Path) -> None:
    require_peer("Orthanc", "storescu")
    paths = write_series(tmp_path / "ct", phantom(SLICES), name="two scanners")
    with orthanc(tmp_path) as pacs, NodeProcess(tmp_path / "node", pacs.port) as node:
        senders = [
            threading.Thread(target=storescu, args=(node.port, part)) for part in (paths[::2], paths[1::2], paths[2:4])
        ]
        for sender in senders:
            sender.start()
        for sender in senders:
            sender.join()
        (job,) = node.wait_jobs("DONE")
        assert job["n_in"] == SLICES
        derived = pacs.series()
        assert list(derived) == [job["derived_series_uid"]]
        assert len(pacs.sop_instance_uids()) == SLICES
        assert node.stop() == 0
    assert not {str(dcmread(path).SOPInstanceUID) for path in paths} & set(*derived.values())
