"""What the configuration accepts and what it makes of it, and that no text whatever brings the reader down."""

from __future__ import annotations

import ipaddress
import re
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from dicomnode import conditions, strict_yaml
from dicomnode.config import Config, Destination, Node, PipelineOptions, Reception, Route, load
from dicomnode.errors import ConfigError
from pipelines import base


@pytest.fixture
def read(tmp_path: Path):
    """Load a configuration from its text or bytes."""

    def read(text: str | bytes) -> Config:
        path = tmp_path / "config.yaml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return load(path)

    return read


def test_defaults_are_those_of_the_documentation():
    config = Config()
    assert config.model_dump(exclude={"pipelines"}) == {
        "node": {
            "ae_title": "DICOMNODE",
            "address": "127.0.0.1",
            "port": 11112,
            "spool": Path("var/spool"),
            "database": "sqlite:///var/node.db",
            "log_level": "INFO",
        },
        "reception": {
            "called_ae_titles": (),
            "calling_ae_titles": (),
            "networks": (ipaddress.ip_network("127.0.0.0/8"), ipaddress.ip_network("::1/128")),
            "sop_classes": (),
            "max_associations": 64,
            "max_associations_per_peer": 32,
            "max_object_mb": 1024,
            "min_free_mb": 1024,
            "acse_timeout_s": 30,
            "dimse_timeout_s": 60,
            "network_timeout_s": 60,
            "different_duplicate": "keep",
        },
        "tls": None,
        "assembly": {"quiet_s": 15, "quiet_without_evidence_s": 120},
        "compute": {"threads": 0, "device": "auto", "precision": "auto", "max_worker_deaths": 3},
        "delivery": {"retry_first_s": 10, "retry_max_s": 900, "give_up_after_days": 7, "failure_status_tries": 5},
        "derivation": {
            "series_description_suffix": " denoised",
            "series_number_offset": 1000,
            "image_type_value_2": "SECONDARY",
            "keep_private_attributes": True,
            "image_comments": "Denoised by software; compare with the original series",
        },
        "destinations": {},
        "routes": (),
    }
    assert Destination(ae_title="A", host="h", port=104).model_dump() == {
        "ae_title": "A",
        "host": "h",
        "port": 104,
        "calling_ae_title": None,
        "connect_timeout_s": 10,
        "acse_timeout_s": 30,
        "dimse_timeout_s": 60,
        "commitment_timeout_s": None,
        "tls": None,
    }
    route = Route(name="r", action="ignore")
    assert (route.priority, route.continue_, route.originals_to, dict(route.when)) == (10, False, (), {})


def test_every_installed_pipeline_has_options_and_a_site_may_name_its_own(read):
    config = read("pipelines: {soft: {uses: identity, blend: 0.7}, identity: {strength: 1.5}, st3d: }\nassembly:\n")
    assert set(config.pipelines) == {*base.names(), "soft"}
    assert config.pipelines["soft"] == PipelineOptions(uses="identity", strength=1.0, blend=0.7)
    assert config.pipelines["identity"] == PipelineOptions(uses="identity", strength=1.5)
    assert config.pipelines["st3d"] == PipelineOptions(uses="st3d")


def test_configuration_is_frozen():
    config = Config()
    with pytest.raises(ValidationError, match="frozen"):
        config.node.port = 1  # type: ignore[misc]  # mypy forbids it too
    with pytest.raises(ValidationError, match="frozen"):
        config.node = Node()  # type: ignore[misc]  # mypy forbids it too


def test_relative_paths_count_from_the_file(read, tmp_path: Path):
    for text in ("routes: []\n", "node: {port: 104}\n", "node:\n"):
        node = read(text).node
        assert node.spool == tmp_path / "var/spool"
        assert node.database == f"sqlite:///{tmp_path}/var/node.db"
    node = read("node: {spool: /data/spool, database: sqlite:////data/node.db}\n").node
    assert (node.spool, node.database) == (Path("/data/spool"), "sqlite:////data/node.db")


def test_values_read(read):
    config = read(
        b"\xef\xbb\xbf"  # byte order mark, as Windows Notepad writes it
        b"node: {ae_title: ' NO ', address: '::'}\n"
        b"reception: {calling_ae_titles: [no, on, 007], networks: [10.1.2.0/24, 192.168.0.9, 'fe80::/10']}\n"
        b"destinations: {pacs: {ae_title: PACS, host: 127.0.0.1, port: 104}}\n"
        b"routes:\n"
        b"  - name: a\n"
        b"    when:\n"
        b"      Modality: CT\n"
        b"      BodyPartExamined: [NO, 'LUNG ']\n"
        b"      SliceThickness: {max: 1.5}\n"
        b"      KVP: [100, 120.5]\n"
        b"      StudyDate: 2024-01-31\n"
        b"      SeriesDescription: {not: {regex: '(?i)low.?dose'}}\n"
        b"      ReferencedImageSequence: {exists: false}\n"
        b"      CallingAETitle: on\n"
        b"    pipeline: identity\n"
        b"    send_to: [pacs]\n"
        b"    continue: true\n"
    )
    assert config.node.ae_title == "NO"
    assert config.node.address == "::"
    assert config.reception.calling_ae_titles == ("no", "on", "007")
    assert [str(network) for network in config.reception.networks] == ["10.1.2.0/24", "192.168.0.9/32", "fe80::/10"]
    (route,) = config.routes
    assert (route.action, route.pipeline, route.continue_) == ("pipeline", "identity", True)
    assert route.when == {
        "Modality": conditions.Equals(("CT",)),
        "BodyPartExamined": conditions.Equals(("NO", "LUNG")),
        "SliceThickness": conditions.Between(max=1.5),
        "KVP": conditions.Equals((100, 120.5)),
        "StudyDate": conditions.Equals(("2024-01-31",)),
        "SeriesDescription": conditions.Not(conditions.Matches("(?i)low.?dose")),
        "ReferencedImageSequence": conditions.Exists(False),
        "CallingAETitle": conditions.Equals(("on",)),
    }


def test_storage_classes_by_keyword_and_uid() -> None:
    config = Config.model_validate({"reception": {"sop_classes": ["CTImageStorage", "1.2.840.10008.5.1.4.1.1.4"]}})
    assert config.reception.sop_classes == ("1.2.840.10008.5.1.4.1.1.2", "1.2.840.10008.5.1.4.1.1.4")


@settings(max_examples=200, deadline=None)
@given(st.text() | st.binary())
def test_yaml_reader_returns_or_refuses_whatever_it_is_given(data: str | bytes):
    try:
        strict_yaml.parse(data if isinstance(data, bytes) else data.encode("utf-8", "surrogatepass"))
    except strict_yaml.YamlError as error:
        found = error.problems
    else:
        return
    assert found
    assert all(problem.line >= 1 and problem.reason for problem in found)


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-10, 10)
    | st.floats(allow_nan=False)
    | st.sampled_from(["CT", "pacs", "a", ""]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                [
                    *Config.model_fields,
                    *Route.model_fields,
                    *Node.model_fields,
                    *Reception.model_fields,
                    "uses",
                    "Modality",
                    "not",
                ]
            ),
            inner,
            max_size=4,
        )
    ),
    max_leaves=12,
)


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.dictionaries(st.sampled_from([*Config.model_fields]), VALUES, min_size=1, max_size=4))
def test_load_returns_or_lists_problems_whatever_stands_in_the_file(tmp_path: Path, document: dict[str, object]):
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(document))
    try:
        load(path)
    except ConfigError as error:
        found = error.problems
    else:
        return
    assert found
    assert all(re.match(r"config\.yaml:[0-9]+: .", problem) for problem in found)
