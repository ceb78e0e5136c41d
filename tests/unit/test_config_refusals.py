"""What the configuration refuses, and in which words and line."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from pydantic import ValidationError

from dicomnode.config import Config, load
from dicomnode.errors import ConfigError, NodeError

DESTINATION = "destinations: {pacs: {ae_title: PACS, host: 127.0.0.1, port: 104}}\n"
ROUTE = DESTINATION + "routes:\n- name: a\n"  # the next line is line 4


@pytest.fixture
def problems(tmp_path: Path):
    """What `load` reports about a text, line by line."""

    def problems(text: str | bytes) -> list[str]:
        path = tmp_path / "config.yaml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        with pytest.raises(ConfigError) as caught:
            load(path)
        assert str(caught.value) == "\n".join(caught.value.problems)
        return list(caught.value.problems)

    return problems


REFUSALS = [
    # the file
    ("", r"config\.yaml:1: the file is empty"),
    ("# only a comment\n", r":1: the file is empty"),
    ("- node\n", r":1: not a configuration; it begins with a section, e\.g\. node:"),
    ("node:\n\tport: 1\n", r":2: a tab stands where spaces are needed; indent with spaces only"),
    ("node: {port: 1\nassembly:\n", r":2: not valid YAML \(.*\); check the indentation"),
    ("node:\n  port: 1\n   address: h\n", r":3: not valid YAML"),
    ("node:\n--- \nnode:\n", r":2: a second document begins here; remove the line '---'"),
    ("node: &x {port: 1}\n", r":1: anchors \(&\) and aliases \(\*\) are not allowed"),
    ("node:\n  ae_title: *PACS\n", r":2: anchors \(&\) and aliases"),
    ("a: 1\nnode: !!python/object:os.system {}\n", r":2: tags \(!\) are not allowed"),
    ("node: !!binary QQ==\n", r":1: tags"),
    (b"node:\n  ae_title: M\xdcNCHEN\n", r":2: not UTF-8 text; save the file with the encoding UTF-8"),
    ("node: {}\n".encode("utf-16"), r":1: not UTF-8"),
    ("node:\n  ae_title: A\x07\n", r":2: control character U\+0007; remove it"),
    ("[" * 100_000, r":1: nested more than 20 levels deep"),
    ("a: {" * 30, r":1: nested more than 20 levels deep"),
    ("#" * 1_000_001, r":1: the file has 1000001 bytes, at most 1000000 are read"),
    ("node: {port: 1}\nassembly:\n\nnode: {port: 2}\n", r":4: 'node' stands here twice, first in line 1; remove one"),
    ("node:\n  port: 1\n  port: 2\n", r":3: 'port' stands here twice, first in line 2"),
    ("? [a]\n: 1\n", r":1: a key must be a plain word"),
    # unknown and missing
    ("nodes: {}\n", r":1: nodes: unknown key; did you mean node\?"),
    ("node:\n  prot: 1\n", r":2: node\.prot: unknown key; did you mean port\?"),
    (
        "node:\n  xyzzy: 1\n",
        r":2: node\.xyzzy: unknown key; there are: address, ae_title, database, log_level, port, spool",
    ),
    ("<<: 1\n", r":1: <<: unknown key"),
    (ROUTE + "  action: ignore\n  continu: true\n", r":5: routes\[a\]\.continu: unknown key; did you mean continue\?"),
    (
        ROUTE + "  action: ignore\n  continue_: true\n",
        r":5: routes\[a\]\.continue_: unknown key; did you mean continue\?",
    ),
    ("destinations:\n  x: {ae_title: A, port: 104}\n", r":2: destinations\.x\.host: is missing; add it"),
    (
        "destinations:\n  x: {ae_title: A, host: h, port: 1, hots: h}\n",
        r":2: destinations\.x\.hots: unknown key; did you mean host\?",
    ),
    ("routes:\n- action: ignore\n", r":2: routes\[1\]\.name: is missing"),
    ("node: 5\n", r":1: node: 5 stands where KEY: VALUE lines belong; check the indentation and the colon"),
    ("destinations: [a]\n", r":1: destinations: \['a'\] stands where KEY: VALUE lines belong"),
    ("pipelines: soft\n", r":1: pipelines: 'soft' stands where KEY: VALUE lines belong"),
    ("pipelines: {identity: 3}\n", r":1: pipelines\.identity: 3 stands where KEY: VALUE lines belong"),
    ("routes: {name: a}\n", r":1: routes: \{'name': 'a'\} is not a list"),
    ("routes:\n- a\n", r":2: routes\[1\]: 'a' stands where KEY: VALUE lines belong"),
    # single values
    ("node: {ae_title: 17_CHARACTERS_ARE}\n", r"node\.ae_title: an AE title has at most 16 characters, .* has 17"),
    ("node: {ae_title: '  '}\n", r"node\.ae_title: an AE title needs at least one character"),
    ("node: {ae_title: ''}\n", r"node\.ae_title: an AE title needs at least one character"),
    ("node: {ae_title: 'A\\B'}\n", r"node\.ae_title: .* no backslash"),
    ('node: {ae_title: "A\\tB"}\n', r"node\.ae_title: an AE title has plain ASCII"),
    ("node: {ae_title: MÜNCHEN}\n", r"node\.ae_title: an AE title has plain ASCII"),
    ("node: {ae_title: true}\n", r"node\.ae_title: True is not text; put it in quotes"),
    ("node: {ae_title: 17}\n", r"node\.ae_title: 17 is not text; put it in quotes"),
    ("node: {ae_title: }\n", r"node\.ae_title: None is not text"),
    (
        "reception:\n  calling_ae_titles:\n  - A\n  - 'B\\C'\n",
        r":4: reception\.calling_ae_titles\[2\]: an AE title has plain",
    ),
    ("reception: {calling_ae_titles: CT1}\n", r"'CT1' is not a list; write \[CT1\]"),
    ("node: {port: 0}\n", r"node\.port: 0 is out of range; write a number of at least 1"),
    ("node: {port: 65536}\n", r"node\.port: 65536 is out of range; write a number of at most 65535"),
    ("node: {port: 011112}\n", r"node\.port: '011112' is not a whole number"),
    ("node: {port: 0x2b}\n", r"node\.port: '0x2b' is not a whole number"),
    ("node: {port: 3:05}\n", r"node\.port: '3:05' is not a whole number"),
    ("node: {port: 11_112}\n", r"node\.port: '11_112' is not a whole number"),
    (
        "node: {port: '104'}\n",
        r"node\.port: '104' is not a whole number; write only the number, without quotes or unit",
    ),
    ("node: {port: 104.0}\n", r"node\.port: 104\.0 is not a whole number"),
    ("node: {port: true}\n", r"node\.port: True is not a whole number"),
    ("node: {address: ''}\n", r"node\.address: '' is neither a host name nor an IP address"),
    ("node: {address: 10.1.2}\n", r"node\.address: '10\.1\.2' is neither"),
    ("node: {address: 'pacs:104'}\n", r"node\.address: 'pacs:104' is neither"),
    ("node: {address: 'a b'}\n", r"node\.address: 'a b' is neither"),
    ("node: {spool: ''}\n", r"node\.spool: a path is needed"),
    ("node: {database: postgresql://x/y}\n", r"node\.database: only SQLite in a file so far"),
    ("node: {database: 'sqlite:///:memory:'}\n", r"node\.database: only SQLite in a file"),
    (
        "node: {log_level: debug}\n",
        r"node\.log_level: 'debug' is not possible; write 'DEBUG', 'INFO', 'WARNING' or 'ERROR'",
    ),
    ("reception: {networks: []}\n", r"reception\.networks: nobody could connect; write at least one network"),
    ("reception: {networks: [10.1.2.3/24]}\n", r"networks\[1\]: .*address within a network; write 10\.1\.2\.0/24"),
    ("reception: {networks: [5]}\n", r"networks\[1\]: a network is written as text, e\.g\. 10\.1\.2\.0/24; not 5"),
    ("reception: {networks: [hospital]}\n", r"networks\[1\]: 'hospital' is no network"),
    (
        "node: {address: 0.0.0.0}\nreception:\n  networks: [127.0.0.0/8, 10.1.2.0/24, 'fd00::/8']\n",
        r":2: reception\.calling_ae_titles: from 10\.1\.2\.0/24, fd00::/8 only who is named may send; write the",
    ),
    (
        "node: {address: 0.0.0.0}\nreception:\n  networks: [0.0.0.0/0]\n  calling_ae_titles: []\n",
        r":4: reception\.calling_ae_titles: from 0\.0\.0\.0/0 only who is named may send",
    ),
    *(
        (
            f"node:\n  address: {address}\nreception: {{networks: [10.1.2.0/24], calling_ae_titles: [CT1]}}\n",
            r":2: node\.address: \S+ is this machine only, where nobody from 10\.1\.2\.0/24 .*write 0\.0\.0\.0",
        )
        for address in ("127.0.0.1", "'::1'", "localhost")
    ),
    (
        "reception: {networks: [10.1.2.0/24], calling_ae_titles: [CT1]}\n",
        r":1: node\.address: 127\.0\.0\.1 is this machine only",
    ),
    (
        "reception: {max_associations_per_peer: 0}\n",
        r"max_associations_per_peer: 0 is out of range; write .* at least 1",
    ),
    (
        "reception: {max_object_mb: 1.5}\n",
        r"max_object_mb: 1\.5 is not a whole number; write only the number \(megabytes\)",
    ),
    (
        "reception: {different_duplicate: drop}\n",
        r"different_duplicate: 'drop' is not possible; write 'keep' or 'refuse'",
    ),
    ('assembly: {quiet_s: "15 s"}\n', r"assembly\.quiet_s: '15 s' is not a number; write only the number \(seconds\)"),
    ("assembly: {quiet_s: 15s}\n", r"assembly\.quiet_s: '15s' is not a number"),
    ('assembly: {quiet_s: "15"}\n', r"assembly\.quiet_s: '15' is not a number"),
    ("assembly: {quiet_s: -1}\n", r"assembly\.quiet_s: -1 is out of range; write a number of more than 0"),
    ("assembly: {quiet_s: 0}\n", r"assembly\.quiet_s: 0 is out of range"),
    (
        "assembly: {quiet_s: 1e9}\n",
        r"assembly\.quiet_s: 1000000000\.0 is out of range; write a number of at most 604800",
    ),
    ("assembly: {quiet_s: .inf}\n", r"assembly\.quiet_s: '\.inf' is not a number"),
    ("assembly: {quiet_s: 1e999}\n", r"assembly\.quiet_s: inf is not a number"),
    ("assembly: {quiet_s: 150}\n", r"assembly\.quiet_without_evidence_s: 120 s is less than quiet_s, 150 s; make"),
    ("compute: {threads: -1}\n", r"compute\.threads: -1 is out of range; write a number of at least 0"),
    (
        "delivery: {retry_first_s: 60, retry_max_s: 30}\n",
        r"delivery\.retry_max_s: 30 s is less than retry_first_s, 60 s",
    ),
    ("derivation: {keep_private_attributes: yes}\n", r"'yes' is neither true nor false; write one of these"),
    ("derivation: {series_description_suffix: ' '}\n", r"a reader must see that a series is derived"),
    ("derivation: {series_description_suffix: ' entrauscht ü'}\n", r"only plain ASCII characters"),
    ("derivation: {series_description_suffix: " + 33 * "x" + "}\n", r"longer than 32 characters; shorten it"),
    ("derivation: {image_type_value_2: LOCALIZER}\n", r"'LOCALIZER' is not possible; write 'PRIMARY' or 'SECONDARY'"),
    ("destinations: {'a b': {ae_title: A, host: h, port: 1}}\n", r":1: destinations\.a b: a name has 1 to 64 letters"),
    ("destinations: {me: {ae_title: A, host: 127.0.0.1, port: 11112}}\n", r"destinations\.me: this is the node itself"),
    # pipelines
    (
        "pipelines:\n  soft: {uses: identiti}\n",
        r":2: pipelines\.soft\.uses: no pipeline 'identiti' is installed; did you mean",
    ),
    (
        "pipelines:\n  soft: {blend: 0.5}\n",
        r":2: pipelines\.soft\.uses: no pipeline 'soft' is installed; there are:.*identity",
    ),
    ("pipelines: {identity: {blend: 70}}\n", r"pipelines\.identity\.blend: 70 is out of range; .* at most 1"),
    (
        "pipelines: {identity: {strength: 1.6}}\n",
        r"pipelines\.identity\.strength: 1\.6 is out of range; .* at most 1\.5",
    ),
    (
        "pipelines: {identity: {strength: -0.1}}\n",
        r"pipelines\.identity\.strength: -0\.1 is out of range; .* at least 0",
    ),
    ("pipelines: {identity: {uses: st3d}}\n", r"identity is the name of an installed pipeline; choose another"),
    # routes
    (ROUTE + "  priority: 0\n  action: ignore\n", r":4: routes\[a\]\.priority: 0 is out of range; .* at least 1"),
    (ROUTE + "  priority: 101\n  action: ignore\n", r":4: .* at most 100"),
    (ROUTE + "  continue: yes\n  action: ignore\n", r":4: routes\[a\]\.continue: 'yes' is neither true nor false"),
    (ROUTE + "  send_to: [pacs]\n", r":3: routes\[a\]\.action: is missing"),
    (ROUTE + "  action: drop\n", r":4: .*'drop' is not possible; write 'pipeline', 'forward' or 'ignore'"),
    (
        ROUTE + "  action: pipeline\n  send_to: [pacs]\n",
        r":4: routes\[a\]\.action: action pipeline needs the name of one",
    ),
    (ROUTE + "  action: forward\n  pipeline: identity\n  send_to: [pacs]\n", r":4: .*action forward runs no pipeline"),
    (
        ROUTE + "  pipeline: identity\n",
        r":3: routes\[a\]\.send_to: a route with the action pipeline needs a destination",
    ),
    (ROUTE + "  action: forward\n", r":3: routes\[a\]\.send_to: a route with the action forward needs a destination"),
    (ROUTE + "  action: ignore\n  send_to: [pacs]\n", r":5: routes\[a\]\.send_to: a route that ignores sends nothing"),
    (ROUTE + "  action: ignore\n  originals_to: [pacs]\n", r":5: routes\[a\]\.originals_to: a route that ignores"),
    (
        ROUTE + "  action: forward\n  send_to:\n  - pacs\n  - pacs\n",
        r":7: routes\[a\]\.send_to\[2\]: pacs is named twice",
    ),
    (
        ROUTE + "  action: forward\n  send_to: [pacs]\n  originals_to: [pacs]\n",
        r":6: .*pacs would get each object twice",
    ),
    (
        ROUTE + "  action: forward\n  send_to: [pcs]\n",
        r":5: routes\[a\]\.send_to\[1\]: no destination 'pcs'; did you mean pacs\?",
    ),
    (
        ROUTE + "  pipeline: identity\n  send_to: [pacs]\n  originals_to: [x]\n",
        r":6: .*no destination 'x'; there are: pacs",
    ),
    (
        ROUTE + "  pipeline: sted\n  send_to: [pacs]\n",
        r":4: routes\[a\]\.pipeline: no pipeline 'sted'; did you mean st3d\?",
    ),
    (
        ROUTE + "  action: ignore\n- name: b\n  action: ignore\n",
        r":5: routes\[b\]: never reached, because route a before it",
    ),
    (
        ROUTE + "  when: {Modality: CT}\n  action: ignore\n- name: a\n  action: ignore\n",
        r":6: routes\[a\]\.name: a route 'a' is there already",
    ),
    # conditions; the condition stands in line 5
    (ROUTE + "  when: CT\n  action: ignore\n", r":4: routes\[a\]\.when: conditions are written as KEYWORD: value"),
]

CONDITIONS = [
    ("SliceThicknes: 1", r"SliceThicknes: unknown DICOM keyword 'SliceThicknes'; did you mean SliceThickness"),
    ("CallingAeTitle: A", r"did you mean CallingAETitle"),
    ("xyzzy: 1", r"unknown DICOM keyword 'xyzzy'; use a keyword of DICOM PS3\.6"),
    ("Modality: {max: 3}", r"Modality: min and max are for numbers, Modality is none \(VR CS\)"),
    ("Modality: 3", r"Modality is text \(VR CS\), 3 is not; put it in quotes"),
    ("Modality: true", r"Modality is text \(VR CS\), True is not; put it in quotes"),
    ("Modality:", r"no value; write one, or \{exists: false\}"),
    ("Modality: [CT, 3]", r"Modality\[2\]: Modality is text"),
    ("Modality: [[CT]]", r"Modality\[1\]: Modality is text"),
    ("Modality: []", r"an empty list is met by nothing"),
    ("Modality: {}", r"no condition has the keys \(none\)"),
    ("Modality: {equals: CT}", r"no condition has the keys equals; write a value"),
    ("Modality: {not: CT, exists: true}", r"no condition has the keys not, exists"),
    ("Modality: {exists: yes}", r"Modality\.exists: exists wants true or false"),
    ("Modality: {not: 3}", r"Modality\.not: Modality is text"),
    ("Modality: {not: {not: {not: {not: CT}}}}", r"not within not"),
    ("SliceThickness: '1.5'", r"SliceThickness is a number \(VR DS\), '1\.5' is not; write the number without quotes"),
    ("SliceThickness: 1.5 mm", r"SliceThickness is a number \(VR DS\), '1\.5 mm' is not"),
    (
        "SliceThickness: {max: 1.5 mm}",
        r"SliceThickness\.max: '1\.5 mm' is not a number; write the number in the unit of",
    ),
    ("SliceThickness: {max: }", r"SliceThickness\.max: None is not a number"),
    ("SliceThickness: {max: 1e999}", r"SliceThickness\.max: inf is not a number"),
    ("SliceThickness: {min: 2, max: 1}", r"SliceThickness\.max: max 1 is below min 2"),
    ("SliceThickness: {regex: '1'}", r"a regex is for text, SliceThickness is none \(VR DS\)"),
    ("PixelData: 1", r"PixelData \(VR OB or OW\) cannot be compared"),
    ("ReferencedImageSequence: a", r"ReferencedImageSequence \(VR SQ\) cannot be compared"),
    ("SeriesDescription: {regex: 3}", r"a regex wants a text in quotes"),
    ("SeriesDescription: {regex: '(a'}", r"SeriesDescription\.regex: '\(a' is no regular expression \(missing \)"),
    ("SeriesDescription: {regex: '(a+)+b'}", r"could take hours on some texts: a choice within a repetition"),
    ("SeriesDescription: {regex: " + 257 * "a" + "}", r"longer than 256 characters"),
]


@pytest.mark.parametrize(("text", "expected"), REFUSALS)
def test_refusal_names_line_place_and_reason(problems, text: str | bytes, expected: str):
    (problem,) = problems(text)
    assert re.match(r"(config\.yaml(?=:)|)config\.yaml.*", problem)
    assert re.search(expected, problem), problem


@pytest.mark.parametrize(("line", "reason"), CONDITIONS)
def test_condition_is_refused_in_its_line(problems, line: str, reason: str):
    (problem,) = problems(f"{ROUTE}  when:\n    {line}\n  action: ignore\n")
    assert re.match(r"config\.yaml:5: routes\[a\]\.when\.", problem), problem
    assert re.search(reason, problem), problem


def test_all_errors_are_listed_in_the_order_of_the_file(problems):
    found = problems(
        "node: {prot: 3}\n"
        "assembly: {quiet_s: a, quiet_without_evidence_s: -1}\n"
        "destinations: {pacs: {ae_title: PACS, host: h}}\n"
        "routes:\n"
        "- name: a\n"
        "  when: {Modalit: CT, KVP: {max: x}}\n"
        "  action: ignore\n"
        "- name: b\n"
        "  when: {Modality: CT}\n"
        "  pipeline: nope\n"
        "  send_to: [pacs, pasc]\n"
        "- name: b\n"
        "  action: ignore\n"
    )
    assert [problem.split(": ")[:2] for problem in found] == [
        ["config.yaml:1", "node.prot"],
        ["config.yaml:2", "assembly.quiet_s"],
        ["config.yaml:2", "assembly.quiet_without_evidence_s"],
        ["config.yaml:3", "destinations.pacs.port"],
        ["config.yaml:6", "routes[a].when.KVP.max"],
        ["config.yaml:6", "routes[a].when.Modalit"],
        ["config.yaml:10", "routes[b].pipeline"],
        ["config.yaml:11", "routes[b].send_to[2]"],
        ["config.yaml:12", "routes[b].name"],
    ]


def test_billion_laughs_is_refused_at_once(problems):
    lines = ["a: &a [x, x, x, x, x, x, x, x, x]"]
    lines += [f"{b}: &{b} [{', '.join(9 * [f'*{a}'])}]" for a, b in zip("abcdefgh", "bcdefghi", strict=True)]
    assert problems("\n".join(lines)) == [
        "config.yaml:1: anchors (&) and aliases (*) are not allowed; write the value out, or quote it"
    ]


def test_missing_file_and_folder_are_named(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"no\.yaml: cannot be read: No such file or directory; check the path"):
        load(tmp_path / "no.yaml")
    with pytest.raises(NodeError, match="cannot be read: Is a directory"):
        load(tmp_path)


@pytest.mark.parametrize("value", ["CTStorage", "1.2.3", "Verification", ""])
def test_what_is_no_storage_class_is_refused(value: str) -> None:
    with pytest.raises(ValidationError, match="no standard storage SOP class"):
        Config.model_validate({"reception": {"sop_classes": [value]}})
