"""Types of single values in the configuration: AE titles, hosts, networks, names, seconds.

Numbers and texts are strict: a number in quotes, a number with its unit, and a truth value for a text are refused.
"""

from __future__ import annotations

import ipaddress
import re
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, BeforeValidator, Field, PlainValidator, Strict
from pydicom.uid import UID
from pynetdicom import AllStoragePresentationContexts


def _ae_title(value: str) -> str:
    """AE title as PS3.5 table 6.2-1 has it; spaces at its ends mean nothing and go."""
    title = value.strip(" ")
    if not title:
        raise ValueError("an AE title needs at least one character that is no space")
    if len(title) > 16:
        raise ValueError(f"an AE title has at most 16 characters, {title!r} has {len(title)}")
    if not all(" " <= letter <= "~" and letter != "\\" for letter in title):
        raise ValueError(
            f"an AE title has plain ASCII letters, digits, signs and spaces, but no backslash; not {title!r}"
        )
    return title


def _name(value: str) -> str:
    """Name of a route, destination or pipeline; it becomes part of logs, metrics and command lines."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", value):
        raise ValueError(f"a name has 1 to 64 letters, digits, dots, dashes and underscores; not {value!r}")
    return value


def _host(value: str) -> str:
    """Host name (RFC 1123) or IP address, as text."""
    try:
        return str(ipaddress.ip_address(value))
    except ValueError:
        label = r"[A-Za-z0-9_]([A-Za-z0-9_-]{0,61}[A-Za-z0-9_])?"
        if len(value) > 253 or re.fullmatch(r"[0-9.]+", value) or not re.fullmatch(rf"{label}(\.{label})*\.?", value):
            raise ValueError(
                f"{value!r} is neither a host name nor an IP address; e.g. pacs.hospital.local or 10.1.2.3"
            ) from None
        return value


def _network(value: object) -> ipaddress.IPv4Network | ipaddress.IPv6Network:
    """Network in CIDR notation; a single address is a network of one."""
    if isinstance(value, ipaddress.IPv4Network | ipaddress.IPv6Network):
        return value
    if not isinstance(value, str):
        raise ValueError(f"a network is written as text, e.g. 10.1.2.0/24; not {value!r}")
    try:
        return ipaddress.ip_network(value)
    except ValueError:
        try:
            inner = ipaddress.ip_network(value, strict=False)
        except ValueError:
            raise ValueError(f"{value!r} is no network; write e.g. 10.1.2.0/24, or one address") from None
        raise ValueError(f"{value!r} is an address within a network; write {inner} for the network") from None


def _dicom_text(value: str) -> str:
    """Text that every Specific Character Set can hold (PS3.5 section 6.1.1: the default repertoire)."""
    if not all(" " <= letter <= "~" and letter != "\\" for letter in value):
        raise ValueError("only plain ASCII characters without backslash: it must fit every series' character set")
    return value


def _path(value: object) -> object:
    if isinstance(value, str) and ("\0" in value or not value.strip()):
        raise ValueError("a path is needed")
    return value


_STORAGE_CLASSES = {str(context.abstract_syntax) for context in AllStoragePresentationContexts}
_STORAGE_KEYWORDS = {UID(uid).keyword: uid for uid in _STORAGE_CLASSES if UID(uid).keyword}


def _storage_class(value: str) -> str:
    """UID of a standard storage SOP class (PS3.4 table B.5-1), given as UID or keyword."""
    uid = _STORAGE_KEYWORDS.get(value, value)
    if uid not in _STORAGE_CLASSES:
        raise ValueError(f"{value!r} is no standard storage SOP class; write its UID or keyword, e.g. CTImageStorage")
    return uid


Text = Annotated[str, Strict()]
Flag = Annotated[bool, Strict()]
Count = Annotated[int, Strict(), Field(ge=1)]
Seconds = Annotated[float, Strict(), Field(gt=0, le=7 * 86_400, allow_inf_nan=False)]
AETitle = Annotated[Text, AfterValidator(_ae_title)]
Port = Annotated[int, Strict(), Field(ge=1, le=65_535)]
Host = Annotated[Text, AfterValidator(_host)]
Name = Annotated[Text, AfterValidator(_name)]
Network = Annotated[ipaddress.IPv4Network | ipaddress.IPv6Network, PlainValidator(_network)]
StorageClass = Annotated[Text, AfterValidator(_storage_class)]
DicomText = Annotated[Text, AfterValidator(_dicom_text)]
FilePath = Annotated[Path, BeforeValidator(_path)]
