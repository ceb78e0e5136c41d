"""A PACS that sends back what the node derived: kept, ignored, never denoised or sent a second time."""

from __future__ import annotations

from pathlib import Path

from ct_builder import phantom, write_series
from holdings import check_holds_one_derived, check_kept
from node_process import NodeProcess
from oracle import StorageOracle
from scanner import Image, image, send

SLICES = 4


def derived_images(folder: Path) -> list[Image]:
    return [image(path) for path in sorted(folder.glob("*.dcm"))]


def test_own_output_is_recognised_whatever_the_site_calls_it(tmp_path: Path) -> None:
    # no suffix that a rule could look for: the source has no name, and the site's word is a common one
    settings = {"derivation": {"series_description_suffix": " Std", "series_number_offset": 0}}
    images = [image(path) for path in write_series(tmp_path / "ct", phantom(SLICES), SeriesDescription=None)]
    with StorageOracle(ae_title="PACS") as oracle, NodeProcess(tmp_path / "node", oracle.port, settings) as node:
        send(node.port, images)
        (job,) = node.wait_series(images[0].series_uid, "DONE")
        derived_uid = check_holds_one_derived(oracle, images)

        back = derived_images(node.spool / "derived" / job["id"])
        send(node.port, back, calling="PACS")
        (ignored,) = node.wait_series(derived_uid, "SKIPPED")
        assert "derived by dicomnode already" in ignored["reason"]
        assert ignored["route"] == "own-output"
        check_kept(node, back)
        assert node.query("SELECT * FROM jobs WHERE kind = 'ORIGINALS'") == []
        assert check_holds_one_derived(oracle, images) == derived_uid
        assert oracle.images == SLICES
