"""What a PACS holds after a series went through the node, judged without any code of the node."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path

from node_process import NodeProcess
from oracle import StorageOracle
from pydicom import Dataset
from scanner import Image, data_set_of, header


def datasets(oracle: StorageOracle) -> dict[str, Dataset]:
    """SOP Instance UID → data set, of everything that the oracle holds."""
    return {uid: header(oracle.datasets[uid], oracle.syntax_of[uid]) for uid in oracle.sop_instance_uids()}


def derived_series(oracle: StorageOracle, images: Sequence[Image]) -> dict[str, dict[str, str]]:
    """Series UID → {derived SOP Instance UID → its source's}, of all that refers to `images` as its source."""
    sources = {one.sop_instance_uid for one in images}
    found: dict[str, dict[str, str]] = {}
    for uid, ds in datasets(oracle).items():
        at_same_place = [
            str(item.ReferencedSOPInstanceUID)
            for item in ds.get("SourceImageSequence", [])
            if item.get("SpatialLocationsPreserved") == "YES"
        ]
        if sources & set(at_same_place):
            (source,) = at_same_place
            found.setdefault(str(ds.SeriesInstanceUID), {})[uid] = source
    return found


def check_holds_one_derived(oracle: StorageOracle, images: Sequence[Image]) -> str:
    """One derived series, one derived slice per image, one set of bytes each, nothing of `images` itself; its UID."""
    found = derived_series(oracle, images)
    assert len(found) == 1, f"{len(found)} derived series"
    ((series_uid, source_of),) = found.items()
    assert sorted(source_of.values()) == sorted(one.sop_instance_uid for one in images)
    assert series_uid not in {one.series_uid for one in images}
    assert not set(source_of) & {one.sop_instance_uid for one in images}
    for uid in source_of:
        assert len(set(oracle.received[uid])) == 1, "the same UID came with different bytes"
    return series_uid


def check_holds_the_result(oracle: StorageOracle, node: NodeProcess, job_id: str) -> None:
    """The oracle holds exactly what the job's result folder holds, byte for byte."""
    folder = node.spool / "derived" / job_id
    names = [one["path"] for one in json.loads((folder / "manifest.json").read_text())["instances"]]
    for name in names:
        one = data_set_of((folder / name).read_bytes())
        uid = str(header(one).SOPInstanceUID)
        assert set(oracle.received.get(uid, [])) == {hashlib.sha256(one).hexdigest()}, uid


def check_kept(node: NodeProcess, images: Iterable[Image]) -> None:
    """Every acknowledged image is in the spool with the bytes that were sent, and indexed."""
    for one in images:
        path = node.spool / "instances" / one.series_uid / f"{one.sop_instance_uid}.dcm"
        assert data_set_of(path.read_bytes()) == one.data, f"{path} is not what was sent"
        rows = node.query(
            "SELECT sha256, path FROM instances WHERE series_uid = ? AND sop_instance_uid = ?",
            one.series_uid,
            one.sop_instance_uid,
        )
        assert [row["sha256"] for row in rows] == [one.sha256]
        assert node.spool / Path(rows[0]["path"]) == path
