"""Which way an object goes: the configured rules applied to its header, with the reason in words.

Rules are applied to each object by itself, so a localizer inside a CT series takes its own route; the objects of one
series that match one route are one job. Reasons are stored and shown, so they never hold free text off the network or
anything that may identify a patient: they quote the configuration, numbers, and well-formed code strings.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Collection, Iterable, Mapping, MutableSequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Literal, assert_never

from pydicom import DataElement, Dataset, Sequence
from pydicom.charset import decode_bytes
from pydicom.config import IGNORE
from pydicom.datadict import dictionary_VR, tag_for_keyword
from pydicom.dataelem import RawDataElement
from pydicom.tag import BaseTag
from pydicom.uid import UID, CTImageStorage, EnhancedCTImageStorage, LegacyConvertedEnhancedCTImageStorage
from pydicom.valuerep import TEXT_VR_DELIMS

from dicomnode.conditions import (
    ASSOCIATION_KEYWORDS,
    MAX_TEXT_CHARS,
    TEXT_VRS,
    Between,
    Condition,
    Equals,
    Exists,
    Matches,
    Not,
    Scalar,
    compiled,
    vr_of,
)
from dicomnode.config import Route
from dicomnode.received_header import dictionary_vr, tag_of
from pipelines.ct_slice import OWN_MANUFACTURER, is_own_output

Action = Literal["pipeline", "forward", "ignore"]

OWN_OUTPUT = "OwnOutput"
"""Key in a header, no DICOM keyword: true if the node derived the object itself."""

MAX_VALUES = 64
"""Values of one attribute that rules look at; ImageType, the longest usual one, has about eight."""

MAX_VALUE_BYTES = 16_384
"""Bytes of one attribute that are decoded."""
_USUAL_VALUE_BYTES = 64
"""Of an attribute whose values are remembered for the next image."""

MAX_HEADER_CHARS = 1024
"""Characters of one value that are kept."""

_NUMBER_STRING_VRS = frozenset({"DS", "IS"})
_NUMBER_TYPES = (int, float, Decimal)
_NUMBER = re.compile(r"[-+]?([0-9]{1,18}(\.[0-9]*)?|\.[0-9]+)([eE][-+]?[0-9]{1,4})?", re.ASCII)

_CHARSET_VRS = frozenset({"LO", "LT", "PN", "SH", "ST", "UC", "UT"})
"""Text that Specific Character Set applies to (PS3.5 section 6.1.2.2); the other text is ASCII."""

_UNDIVIDED_VRS = frozenset({"LT", "ST", "UT", "UR"})
"""Text in which a backslash separates nothing (PS3.5 section 6.4)."""

_PATIENT_GROUP = 0x0010
_IDENTIFYING_VRS = frozenset({"PN", "DA", "DT", "TM"})
_IDENTIFYING = frozenset(
    {
        "AccessionNumber",
        "AdmissionID",
        "RequestedProcedureID",
        "ScheduledProcedureStepID",
        "ServiceEpisodeID",
        "StudyID",
    }
)


_OWN_OUTPUT_ROUTE = Route(name="own-output", action="ignore")
"""Before all routes of the site: a PACS that sends everything to the node must not have it denoised, or sent, again."""


@dataclass(frozen=True, slots=True)
class Match:
    """A route that an object takes, what is done with it there, and why."""

    route: Route
    action: Action
    """The route's, or ``forward`` where its pipeline cannot read this kind of object."""
    reason: str

    @property
    def send_to(self) -> tuple[str, ...]:
        """Destinations of what the job makes; a forwarded object is not sent where the original went at once."""
        if self.action == "forward":
            return tuple(name for name in self.route.send_to if name not in self.route.originals_to)
        return self.route.send_to


class Router:
    """The routes of a site, in their order."""

    def __init__(self, routes: Iterable[Route]) -> None:
        self._routes = tuple(routes)
        subjects = {keyword for route in self._routes for keyword in route.when}
        self.keywords: frozenset[str] = frozenset(subjects - ASSOCIATION_KEYWORDS | {"SOPClassUID", OWN_OUTPUT})
        """What `match` needs to know of an object."""

    def match(self, header: Mapping[str, object], calling_ae: str, called_ae: str) -> list[Match]:
        """Routes that the object takes: the first that matches, and later ones as long as each says ``continue``.

        What the node derived itself takes none of them and is ignored.

        Parameters
        ----------
        header
            DICOM keyword → value or list of values (text, or a number in the attribute's unit), as `header_values`
            makes it; a missing keyword is left out. Nothing in it can make this raise.
        calling_ae, called_ae
            AE titles of the association that brought the object.
        """
        if header.get(OWN_OUTPUT) is True:
            reason = f"own-output: derived by {OWN_MANUFACTURER} already, as its equipment item says; it takes no route"
            return [Match(_OWN_OUTPUT_ROUTE, "ignore", reason)]
        subject = {**header, "CallingAETitle": calling_ae, "CalledAETitle": called_ae}
        matches = []
        for route in self._routes:
            met, unmet = _judge(route, subject)
            if unmet:
                continue
            facts = "; ".join(met) or "takes everything"
            action, remark = _action(route, header.get("SOPClassUID"))
            matches.append(Match(route, action, f"route {route.name}: {facts}{remark}"))
            if not route.continue_:
                break
        return matches

    def explain_no_match(self, header: Mapping[str, object], calling_ae: str, called_ae: str) -> list[str]:
        """For each route one line that says which of its conditions the object does not meet."""
        subject = {**header, "CallingAETitle": calling_ae, "CalledAETitle": called_ae}
        if not self._routes:
            return ["no routes are configured"]
        verdicts = ((route, _judge(route, subject)[1]) for route in self._routes)
        return [f"route {route.name}: {'; '.join(unmet) or 'matches'}" for route, unmet in verdicts]


def _judge(route: Route, subject: Mapping[str, object]) -> tuple[list[str], list[str]]:
    """The facts that meet the conditions of `route`, and those that do not."""
    met: list[str] = []
    unmet: list[str] = []
    for keyword, condition in route.when.items():
        holds, fact = _test(condition, keyword, _values(subject.get(keyword)))
        if is_identifying(keyword):
            fact = f"{keyword} {'meets' if holds else 'does not meet'} its condition"
        (met if holds else unmet).append(fact)
    return met, unmet


def _action(route: Route, sop_class: object) -> tuple[Action, str]:
    """What `route` does with an object of this SOP class, and the remark if that is not what it says."""
    if route.action != "pipeline" or sop_class == CTImageStorage:
        return route.action, ""
    uid = UID(sop_class if isinstance(sop_class, str) else "", validation_mode=IGNORE)
    name = uid.name if uid.name != uid else "an unknown SOP class"  # the name of an unknown UID is its own text
    if sop_class in (EnhancedCTImageStorage, LegacyConvertedEnhancedCTImageStorage):
        return "forward", f"; {name} cannot be read yet: forwarded unchanged"
    return "forward", f"; not CT Image Storage but {name}: forwarded unchanged"


def _values(value: object) -> list[Scalar]:
    """The values that conditions can be tested on; whatever else a header may hold counts as missing."""
    found: list[Scalar] = []
    for one in value[:MAX_VALUES] if isinstance(value, list | tuple) else [value]:
        if isinstance(one, str):
            found += [text] if (text := one.strip(" \0")) else []
        elif isinstance(one, int | float) and _is_number(one):
            found.append(one)
    return found


def _is_number(value: int | float) -> bool:
    """True for a finite number that any numeric VR can hold; Python counts truth values as numbers."""
    if isinstance(value, bool):
        return False
    return math.isfinite(value) if isinstance(value, float) else -(2**63) <= value < 2**64


def _test(condition: Condition, keyword: str, values: list[Scalar]) -> tuple[bool, str]:
    """Whether `values` meet the condition, and the fact that decides it."""
    match condition:
        case Not(inner):
            holds, fact = _test(inner, keyword, values)
            return not holds, fact
        case Exists(wanted_there):
            return bool(values) == wanted_there, f"{keyword} {'has a value' if values else 'is missing'}"
        case _ if not values:
            return False, f"{keyword} is missing"
        case Equals(wanted_values):
            for wanted in wanted_values:
                if wanted in values:
                    return True, f"{keyword} is {_quoted(wanted)}"
            none_of = " or ".join(_quoted(wanted) for wanted in wanted_values)
            shown = _showable(keyword, values)
            return False, f"{keyword} is {shown}, not {none_of}" if shown else f"{keyword} is not {none_of}"
        case Between(lowest, highest):
            below = "" if lowest is None else f"{lowest:g} ≤ "
            above = "" if highest is None else f" ≤ {highest:g}"
            numbers = [value for value in values if not isinstance(value, str)]
            for number in numbers:
                if (lowest is None or lowest <= number) and (highest is None or number <= highest):
                    return True, f"{below}{keyword} {float(number)}{above}"
            if not numbers:
                return False, f"{keyword} is not a number"
            return False, f"not {below}{keyword} {float(numbers[0])}{above}"
        case Matches(regex):
            search = compiled(regex).search
            for value in values:
                if isinstance(value, str) and search(value[:MAX_TEXT_CHARS]):
                    return True, f"{keyword} matches {_quoted(regex)}"
            return False, f"{keyword} does not match {_quoted(regex)}"
        case _:
            assert_never(condition)


def _quoted(wanted: Scalar) -> str:
    """A value from the configuration as it is shown in a reason: on one line."""
    return wanted if isinstance(wanted, str) and wanted.isprintable() else repr(wanted)


def _showable(keyword: str, values: list[Scalar]) -> str:
    """Values off the network, if they are numbers or well-formed code strings (PS3.5 VR CS); else nothing."""
    if vr_of(keyword) == "CS":
        safe = [value for value in values if isinstance(value, str) and re.fullmatch(r"[A-Z0-9_ ]{1,16}", value)]
    else:
        safe = [str(float(value)) for value in values if not isinstance(value, str)]
    return "\\".join(safe) if len(safe) == len(values) <= 8 else ""


def is_identifying(keyword: str) -> bool:
    """True if the values of this attribute say who the patient is, or when they came; rules may use it, reasons not.

    The whole patient group (0010), names, dates and times, and the numbers that a hospital gives to a visit.
    """
    tag = tag_for_keyword(keyword)
    if tag is None:
        return False
    return tag >> 16 == _PATIENT_GROUP or dictionary_VR(tag) in _IDENTIFYING_VRS or keyword in _IDENTIFYING


def header_values(ds: Dataset, keywords: Collection[str]) -> dict[str, object]:
    """Plain values of the attributes `keywords` that have one: text, number, or a list of these.

    Malformed values never raise: a decimal or integer string that is no number stays text, which no numeric condition
    meets. A sequence or binary attribute gives its number of items or bytes, enough for ``exists``. `OWN_OUTPUT` among
    the keywords asks whether the node derived the object itself.
    """
    found: dict[str, object] = {OWN_OUTPUT: True} if OWN_OUTPUT in keywords and is_own_output(ds) else {}
    for keyword in keywords:
        tag = tag_of(keyword)
        # Raw, else pydicom reads what is empty, and may not know how.
        item = None if tag is None else ds.get_item(tag, keep_deferred=True)
        if tag is None or item is None:
            continue
        values = [value for value in _element_values(ds, tag, item) if value != ""]
        if values:
            found[keyword] = values[0] if len(values) == 1 else values
    return found


def _element_values(ds: Dataset, tag: BaseTag, item: DataElement | RawDataElement) -> tuple[Scalar, ...]:
    """Values of `item`, the element `tag` of `ds`; empty ones are ``""``."""
    value = item.value
    vr = item.VR if item.VR not in (None, "UN") else dictionary_vr(tag)
    if isinstance(item, RawDataElement) and isinstance(value, bytes):
        if vr in TEXT_VRS or vr in _NUMBER_STRING_VRS:
            # Not ds[tag]: for some of what is out there pydicom raises, or warns with the value in the text.
            if len(value) <= _USUAL_VALUE_BYTES and vr not in _CHARSET_VRS:
                return _usual_values(value, vr)
            return _divided(_text(value[:MAX_VALUE_BYTES], ds, vr), vr)
        try:
            value = ds[tag].value
        except Exception:  # whatever a malformed element makes pydicom raise: its bytes are still there to be counted
            value = item.value
    if isinstance(value, bytes | Sequence):
        return (len(value),) if value else ()
    several = list(value) if isinstance(value, MutableSequence) else [value]
    return tuple(_plain(vr, part) for part in several[:MAX_VALUES])


def _divided(text: str, vr: str) -> tuple[Scalar, ...]:
    return tuple(_plain(vr, part) for part in ([text] if vr in _UNDIVIDED_VRS else text.split("\\")[:MAX_VALUES]))


@functools.lru_cache(maxsize=1024)
def _usual_values(value: bytes, vr: str) -> tuple[Scalar, ...]:
    """Of a short value in the default character set; images of a series share most of theirs."""
    return _divided(value.decode("latin-1"), vr)


def _text(data: bytes, ds: Dataset, vr: str) -> str:
    """`data` as text; what does not fit the character set is replaced."""
    if vr not in _CHARSET_VRS:
        return data.decode("latin-1")
    charset = ds.original_character_set or "iso8859"
    encodings = [charset] if isinstance(charset, str) else list(charset)
    try:
        if len(encodings) == 1:
            return data.decode(encodings[0], errors="replace")
        return decode_bytes(data, encodings, TEXT_VR_DELIMS)
    except (UnicodeError, LookupError):  # a character set that is none, e.g. "zlib"
        return data.decode("latin-1")


def _plain(vr: str | None, value: object) -> Scalar:
    """One value as text or number; ``""`` for an empty one."""
    if value is None:
        return ""
    if isinstance(value, _NUMBER_TYPES) and vr != "AT":
        number = int(value) if isinstance(value, int) else float(value)
        return number if _is_number(number) else str(value)
    text = str(value).strip(" \0")[:MAX_HEADER_CHARS]
    if not text.isascii():
        text = text.encode("utf-8", "replace").decode()
    if vr not in _NUMBER_STRING_VRS or not _NUMBER.fullmatch(text):
        return text
    if vr == "IS" and text.lstrip("+-").isdigit():
        return int(text)
    number = float(text)
    return number if math.isfinite(number) else text
