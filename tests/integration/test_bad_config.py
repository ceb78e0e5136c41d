"""A configuration that cannot be used is refused at the start, with what is wrong and what to do.

A mistake in the file has its line, and nothing is made or opened; a pipeline whose weights are no good has its name.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from node_process import NodeProcess
from untrained import damaged


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
        (
            {"node": {"address": "0.0.0.0"}, "reception": {"networks": ["10.1.2.0/24"]}},
            "reception:",
            "reception.calling_ae_titles: from 10.1.2.0/24 only who is named may send",
        ),
        (
            {"reception": {"networks": ["10.1.2.3/24"]}},
            "- 10.1.2.3/24",
            "'10.1.2.3/24' is an address within a network; write 10.1.2.0/24 for the network",
        ),
    ],
    ids=["key", "pipeline", "keyword", "unit-of-a-rule", "unit", "destination", "open-to-any-title", "no-network"],
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


@pytest.mark.parametrize("command", ["run", "check-config"])
@pytest.mark.parametrize(
    ("there", "told"),
    [
        (False, "WeightsMissing: there are no weights of 'st3d' in controls (st3d.json is missing): train them"),
        (True, "WeightsDamaged: the weights of 'st3d' are damaged: st3d.safetensors has SHA-256"),
    ],
    ids=["missing", "damaged"],
)
def test_a_route_with_a_pipeline_that_has_no_good_weights(tmp_path: Path, command: str, there: bool, told: str) -> None:
    both = {"pipelines": {"soft": {"uses": "test-weights", "blend": 0.5}}}
    routes = [
        {"name": name, "when": {"BodyPartExamined": name}, "pipeline": pipeline, "send_to": ["pacs"]}
        for name, pipeline in (("CHEST", "test-weights"), ("HEAD", "soft"), ("NECK", "identity"))
    ]
    node = NodeProcess(tmp_path, 11112, {**both, "routes": routes})
    if there:
        damaged("st3d", node.controls)
    done = node.command(command)
    assert done.returncode == 2
    assert done.stdout == ""
    (line,) = (line for line in done.stderr.splitlines() if " INFO " not in line)
    assert line.startswith(f"pipeline 'test-weights' cannot be loaded: {told}")
    assert "install" in line


def test_a_pipeline_that_no_route_names_is_not_loaded(tmp_path: Path) -> None:
    done = NodeProcess(tmp_path, 11112).command("check-config")
    assert done.returncode == 0, done.stderr
    assert "good." in done.stdout
