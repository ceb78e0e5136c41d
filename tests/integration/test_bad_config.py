"""A wrong configuration is refused at the start, with the file, the line and what to do; nothing is made or opened."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from node_process import NodeProcess


def ct_route(**changes: Any) -> dict[str, Any]:
    return {
        "routes": [{"name": "ct", "when": {"Modality": "CT"}, "pipeline": "identity", "send_to": ["pacs"], **changes}]
    }


@pytest.mark.parametrize(
    ("settings", "wrong", "reason"),
    [
        ({"assembly": {"quite_s": 1.0}}, "quite_s: 1.0", "unknown key; did you mean quiet_s?"),
        (ct_route(pipeline="identty"), "pipeline: identty", "did you mean identity?"),
        (ct_route(when={"Modalty": "CT"}), "Modalty: CT", "Modality"),
        (ct_route(when={"SliceThickness": {"max": "1.5 mm"}}), "max: 1.5 mm", "1.5 mm"),
        ({"assembly": {"quiet_s": "15 s"}}, "quiet_s: 15 s", "write only the number (seconds)"),
        (ct_route(send_to=["packs"]), "- packs", "did you mean pacs?"),
    ],
    ids=["key", "pipeline", "keyword", "unit-of-a-rule", "unit", "destination"],
)
def test_refused_with_the_line(tmp_path: Path, settings: dict[str, Any], wrong: str, reason: str) -> None:
    node = NodeProcess(tmp_path, 11112, settings)
    lines = node.config.read_text().splitlines()
    (number,) = [k for k, line in enumerate(lines, 1) if line.strip() == wrong]
    done = node.command("run")
    assert done.returncode == 2
    (told,) = done.stderr.splitlines()
    assert told.startswith(f"config.yaml:{number}: ")
    assert reason in told
    assert not node.spool.exists()
    assert not node.database.exists()
