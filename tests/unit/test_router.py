"""Which route an object takes, and in which words the node says why."""

from __future__ import annotations

import math
from io import BytesIO

import pydicom
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydicom.dataelem import RawDataElement
from pydicom.tag import Tag
from pydicom.uid import UID
from routes import ALL_KINDS, CT, denoise, forward

from dicomnode.config import Route
from dicomnode.router import OWN_OUTPUT, Match, Router, header_values, is_identifying


def reason(when: dict[str, object], header: dict[str, object], calling: str = "CT1", called: str = "NODE") -> str:
    """Reason of the match with a single rule, or of its absence, after the route's name."""
    router = Router([forward("r", when=when)])
    matches = router.match(header, calling, called)
    if matches:
        assert len(matches) == 1
        return "yes: " + matches[0].reason.removeprefix("route r: ")
    (line,) = router.explain_no_match(header, calling, called)
    return "no: " + line.removeprefix("route r: ")


@pytest.mark.parametrize(
    ("condition", "value", "expected"),
    [
        # equal
        ("CT", "CT", "yes: Modality is CT"),
        ("CT", " CT\0", "yes: Modality is CT"),
        ("CT", "MR", "no: Modality is MR, not CT"),
        ("CT", "ct", "no: Modality is not CT"),  # no well-formed code string, so it is not quoted
        ("CT", None, "no: Modality is missing"),
        ("CT", "", "no: Modality is missing"),
        ("CT", ["MR", "CT"], "yes: Modality is CT"),
        ("CT", ["MR", "PT"], r"no: Modality is MR\PT, not CT"),
        ("CT", "MR\ninjected", "no: Modality is not CT"),
        (["CT", "PT"], "PT", "yes: Modality is PT"),
        (["CT", "PT"], "MR", "no: Modality is MR, not CT or PT"),
        # expressions
        ({"regex": "^(C|M)"}, "CT", "yes: Modality matches ^(C|M)"),
        ({"regex": "^T$"}, ["CT", "T"], "yes: Modality matches ^T$"),
        ({"regex": "t"}, "CT", "no: Modality does not match t"),
        ({"regex": "(?i)t"}, "CT", "yes: Modality matches (?i)t"),
        ({"regex": "t"}, 3, "no: Modality does not match t"),
        # presence
        ({"exists": True}, "CT", "yes: Modality has a value"),
        ({"exists": True}, None, "no: Modality is missing"),
        ({"exists": True}, "", "no: Modality is missing"),
        ({"exists": False}, None, "yes: Modality is missing"),
        ({"exists": False}, "CT", "no: Modality has a value"),
        # opposite
        ({"not": "CT"}, "MR", "yes: Modality is MR, not CT"),
        ({"not": "CT"}, "CT", "no: Modality is CT"),
        ({"not": "CT"}, None, "yes: Modality is missing"),
        ({"not": {"not": "CT"}}, "CT", "yes: Modality is CT"),
        ({"not": {"exists": True}}, None, "yes: Modality is missing"),
        ({"not": ["CT", "PT"]}, "PT", "no: Modality is PT"),
    ],
)
def test_conditions_on_text(condition: object, value: object, expected: str):
    assert reason({"Modality": condition}, {} if value is None else {"Modality": value}) == expected


@pytest.mark.parametrize(
    ("condition", "value", "expected"),
    [
        ({"max": 1.5}, 1.0, "yes: SliceThickness 1.0 ≤ 1.5"),
        ({"max": 1.5}, 1.5, "yes: SliceThickness 1.5 ≤ 1.5"),
        ({"max": 1.5}, 1.500001, "no: not SliceThickness 1.500001 ≤ 1.5"),
        ({"min": 0.5}, 0.5, "yes: 0.5 ≤ SliceThickness 0.5"),
        ({"min": 0.5}, 0.4, "no: not 0.5 ≤ SliceThickness 0.4"),
        ({"min": 0.5, "max": 1.5}, 1, "yes: 0.5 ≤ SliceThickness 1.0 ≤ 1.5"),
        ({"max": 1.5}, [9.0, 1.0], "yes: SliceThickness 1.0 ≤ 1.5"),
        ({"max": 1.5}, "1.0 mm", "no: SliceThickness is not a number"),
        ({"max": 1.5}, math.nan, "no: SliceThickness is missing"),
        ({"max": 1.5}, -math.inf, "no: SliceThickness is missing"),
        ({"max": 1.5}, None, "no: SliceThickness is missing"),
        ({"max": 1.5}, False, "no: SliceThickness is missing"),
        ({"not": {"max": 1.5}}, 5.0, "yes: not SliceThickness 5.0 ≤ 1.5"),
        ({"not": {"max": 1.5}}, "thin", "yes: SliceThickness is not a number"),
        (1.25, 1.25, "yes: SliceThickness is 1.25"),
        (1, 1.0, "yes: SliceThickness is 1"),
        ([1, 2], 3.0, "no: SliceThickness is 3.0, not 1 or 2"),
        (1, "1", "no: SliceThickness is not 1"),
    ],
)
def test_conditions_on_numbers(condition: object, value: object, expected: str):
    assert reason({"SliceThickness": condition}, {} if value is None else {"SliceThickness": value}) == expected


def test_all_conditions_must_hold_and_each_is_told():
    when = {"Modality": "CT", "SliceThickness": {"max": 1.5}}
    assert reason(when, {"Modality": "CT", "SliceThickness": 1.0}) == "yes: Modality is CT; SliceThickness 1.0 ≤ 1.5"
    assert reason(when, {"Modality": "CT", "SliceThickness": 5.0}) == "no: not SliceThickness 5.0 ≤ 1.5"
    assert reason(when, {}) == "no: Modality is missing; SliceThickness is missing"
    assert reason({}, {}) == "yes: takes everything"


def test_titles_of_the_association_come_from_the_association():
    assert reason({"CallingAETitle": "CT1"}, {}) == "yes: CallingAETitle is CT1"
    assert reason({"CallingAETitle": "CT1"}, {"CallingAETitle": "CT1"}, calling="X") == "no: CallingAETitle is not CT1"
    assert reason({"CalledAETitle": {"regex": "^RESEARCH"}}, {}, called="RESEARCH_2").startswith("yes: ")


def test_first_match_wins_unless_it_says_continue():
    routes = [
        forward("mr", when={"Modality": "MR"}, **{"continue": True}),
        denoise("research", when={"Modality": "CT"}, **{"continue": True}, priority=3),
        forward("thin", when={"SliceThickness": {"max": 1}}),
        forward("rest"),
    ]
    router = Router(routes)

    def names(**header: object) -> list[str]:
        return [match.route.name for match in router.match(header, "A", "B")]

    assert names(Modality="CT", SliceThickness=1.0) == ["research", "thin"]
    assert names(Modality="CT", SliceThickness=2.0) == ["research", "rest"]
    assert names(Modality="MR", SliceThickness=1.0) == ["mr", "thin"]
    assert names() == ["rest"]
    assert Router(reversed(routes[2:])).match({"SliceThickness": 1.0}, "A", "B")[0].route.name == "rest"


def test_no_match_is_explained_by_every_route():
    router = Router([forward("a", when={"Modality": "MR"}), denoise("b", when={"KVP": {"max": 100}})])
    header = {"Modality": "CT", "KVP": 120.0}
    assert router.match(header, "A", "B") == []
    assert router.explain_no_match(header, "A", "B") == [
        "route a: Modality is CT, not MR",
        "route b: not KVP 120.0 ≤ 100",
    ]
    assert Router([]).match(header, "A", "B") == []
    assert Router([]).explain_no_match(header, "A", "B") == ["no routes are configured"]


def test_keywords_are_those_of_the_object_that_rules_need():
    router = Router([forward("a", when={"Modality": "MR", "CallingAETitle": "X"}), forward("b", when={"KVP": 80})])
    assert router.keywords == {"Modality", "KVP", "SOPClassUID", OWN_OUTPUT}


@pytest.mark.parametrize(
    ("sop_class", "action", "remark"),
    [
        (CT, "pipeline", ""),
        (UID(CT), "pipeline", ""),
        (CT + ".1", "forward", "; Enhanced CT Image Storage cannot be read yet: forwarded unchanged"),
        (CT + ".2", "forward", "; Legacy Converted Enhanced CT Image Storage cannot be read yet: forwarded unchanged"),
        (
            "1.2.840.10008.5.1.4.1.1.7",
            "forward",
            "; not CT Image Storage but Secondary Capture Image Storage: forwarded unchanged",
        ),
        ("1.2.3\nroot", "forward", "; not CT Image Storage but an unknown SOP class: forwarded unchanged"),
        ("\x1b\r", "forward", "; not CT Image Storage but an unknown SOP class: forwarded unchanged"),
        (None, "forward", "; not CT Image Storage but an unknown SOP class: forwarded unchanged"),
        ([CT], "forward", "; not CT Image Storage but an unknown SOP class: forwarded unchanged"),
    ],
)
def test_only_ct_images_reach_a_pipeline(sop_class: object, action: str, remark: str):
    header = {"Modality": "CT"} | ({} if sop_class is None else {"SOPClassUID": sop_class})
    (match,) = Router([denoise("r", when={"Modality": "CT"})]).match(header, "A", "B")
    assert (match.action, match.reason) == (action, f"route r: Modality is CT{remark}")


def test_a_forwarded_object_is_not_sent_twice_to_where_the_original_went():
    route = denoise("r", send_to=["pacs", "research"], originals_to=["pacs"])
    router = Router([route])
    assert router.match({"SOPClassUID": CT}, "A", "B")[0].send_to == ("pacs", "research")
    assert router.match({"SOPClassUID": CT + ".1"}, "A", "B")[0].send_to == ("research",)


def test_other_actions_take_any_object():
    (match,) = Router([Route(name="i", action="ignore")]).match({"SOPClassUID": CT + ".1"}, "A", "B")
    assert match == Match(match.route, "ignore", "route i: takes everything")


@pytest.mark.parametrize(
    "keyword",
    [
        "PatientName",
        "PatientID",
        "PatientBirthDate",
        "OtherPatientIDs",
        "PatientAge",
        "PatientSex",
        "AccessionNumber",
        "StudyID",
        "ReferringPhysicianName",
        "StudyDate",
        "AcquisitionDateTime",
        "ContentTime",
    ],
)
def test_reasons_never_tell_identifying_values(keyword: str):
    assert is_identifying(keyword)
    for condition in ("SECRET", {"regex": "SECRET"}, {"not": "SECRET"}, {"not": {"regex": "SECRET"}}):
        for value in ("SECRET", "OTHER"):
            told = reason({keyword: condition}, {keyword: value})
            assert told in {f"yes: {keyword} meets its condition", f"no: {keyword} does not meet its condition"}
    assert (
        reason({"PatientWeight": {"max": 61}}, {"PatientWeight": 61.5})
        == "no: PatientWeight does not meet its condition"
    )


@pytest.mark.parametrize(
    "keyword", ["Modality", "SeriesDescription", "SliceThickness", "CallingAETitle", "SOPClassUID"]
)
def test_reasons_tell_values_that_identify_nobody(keyword: str):
    assert not is_identifying(keyword)


def test_text_off_the_network_is_never_quoted():
    when = {"SeriesDescription": "LDCT", "StationName": {"regex": "^CT"}, "CallingAETitle": "A"}
    header = {"SeriesDescription": "Mueller, Anna\n2024 INFO faked", "StationName": "\x1b[31mred"}
    assert reason(when, header, calling="\nX") == (
        "no: SeriesDescription is not LDCT; StationName does not match ^CT; CallingAETitle is not A"
    )


SCALARS = (
    st.text()
    | st.integers()
    | st.integers(min_value=10**400, max_value=10**401)
    | st.floats()
    | st.booleans()
    | st.none()
    | st.binary()
    | st.sampled_from(["CT", CT, "1.5", "\ud800", "\0"])
)


@settings(max_examples=400, deadline=None)
@given(
    st.dictionaries(
        st.sampled_from([*ALL_KINDS.keywords - {OWN_OUTPUT}]) | st.text(),
        SCALARS | st.lists(SCALARS | st.lists(SCALARS), max_size=4) | st.dictionaries(st.text(), SCALARS, max_size=2),
    ),
    st.text(),
    st.text(),
)
def test_match_never_raises_and_says_one_printable_line(header: dict[str, object], calling: str, called: str):
    matches = ALL_KINDS.match(header, calling, called)
    unmatched = ALL_KINDS.explain_no_match(header, calling, called)
    for line in [match.reason for match in matches] + unmatched:
        assert line.isprintable()
    taken = {match.route.name for match in matches}
    assert {line.split(":")[0].removeprefix("route ") for line in unmatched if line.endswith(": matches")} == taken


# --- our own output ---


def equipment(manufacturer: str | None = "dicomnode", purpose: str = "109102") -> pydicom.Dataset:
    """Item of ContributingEquipmentSequence (PS3.3 C.12.1)."""
    item, code = pydicom.Dataset(), pydicom.Dataset()
    code.CodeValue, code.CodingSchemeDesignator, code.CodeMeaning = purpose, "DCM", "any"
    item.Manufacturer = manufacturer
    item.PurposeOfReferenceCodeSequence = [code]
    return item


def over_the_wire(*items: pydicom.Dataset, implicit: bool = False) -> pydicom.Dataset:
    """A header with these items, encoded and read again."""
    ds = pydicom.Dataset()
    ds.SOPClassUID = CT
    ds.ContributingEquipmentSequence = list(items)
    buffer = BytesIO()
    pydicom.dcmwrite(buffer, ds, implicit_vr=implicit, little_endian=True)
    buffer.seek(0)
    return pydicom.dcmread(buffer, force=True)


BROKEN = RawDataElement(Tag("Manufacturer"), "FD", 3, b"abc", 0, False, True)


def broken_item() -> pydicom.Dataset:
    """An item whose Manufacturer has no value that can be read."""
    item = equipment()
    item[Tag("Manufacturer")] = BROKEN
    return item


@pytest.mark.parametrize(
    ("items", "own"),
    [
        ([], False),
        ([equipment()], True),
        ([equipment("DICOMNODE ")], True),  # a PACS may have changed case and blanks
        ([equipment("Somebody", "109103"), equipment()], True),
        ([equipment("Somebody")], False),
        ([equipment(None)], False),
        ([equipment(purpose="109103")], False),  # of the same maker, but not what processed the image
        ([pydicom.Dataset()], False),
    ],
)
@pytest.mark.parametrize("implicit", [False, True])
def test_own_output_is_known_by_its_equipment_item(items: list[pydicom.Dataset], own: bool, implicit: bool):
    router = Router([denoise("all", originals_to=["pacs"])])
    header = header_values(over_the_wire(*items, implicit=implicit), router.keywords)
    (match,) = router.match(header, "PACS", "NODE")
    assert (match.action, match.send_to, match.route.originals_to) == (
        ("ignore", (), ()) if own else ("pipeline", ("pacs",), ("pacs",))
    )
    assert match.reason.startswith("own-output: derived by dicomnode already") == own


def test_an_item_that_cannot_be_read_hides_no_other():
    ds = pydicom.Dataset()
    ds.ContributingEquipmentSequence = [broken_item()]
    assert OWN_OUTPUT not in header_values(ds, {OWN_OUTPUT})
    ds.ContributingEquipmentSequence = [broken_item(), equipment()]
    assert header_values(ds, {OWN_OUTPUT}) == {OWN_OUTPUT: True}


def test_own_output_goes_before_every_route_and_only_a_header_can_claim_it():
    router = Router([forward("everything", **{"continue": True}), forward("rest")])
    assert [match.action for match in router.match({OWN_OUTPUT: True}, "PACS", "NODE")] == ["ignore"]
    assert pydicom.datadict.tag_for_keyword(OWN_OUTPUT) is None
