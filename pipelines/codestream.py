"""The image size that a compressed frame itself declares.

Decoders believe the code stream, not the DICOM header, and ask for memory accordingly: a few hundred bytes may say
65535 x 65535. So the two are compared first.
"""

from __future__ import annotations

_SOC_SIZ = b"\xff\x4f\xff\x51"
"""JPEG 2000: start of code stream, then image and tile size (ISO/IEC 15444-1, A.5.1)."""
_NO_LENGTH = {0x01, *range(0xD0, 0xDA)}
"""JPEG markers without a segment: TEM, RSTn, SOI, EOI (ISO/IEC 10918-1, B.1.1.3)."""
_FRAME = {*range(0xC0, 0xD0), 0xF7} - {0xC4, 0xC8, 0xCC}
"""JPEG markers that start a frame: SOFn, and SOF55 of JPEG-LS (ISO/IEC 14495-1, C.1.1)."""


def declared_size(frame: bytes) -> tuple[int, int] | None:
    """(rows, columns) of a JPEG, JPEG-LS or JPEG 2000 frame; None if it is none of these, or broken before it says."""
    if frame.startswith(_SOC_SIZ):  # never behind a JP2 header, which PS3.5 A.4.4 excludes and which could hold a decoy
        right, bottom, left, top = (int.from_bytes(frame[8 + 4 * i : 12 + 4 * i], "big") for i in range(4))
        return bottom - top, right - left
    if frame[:2] != b"\xff\xd8":
        return None
    at = 2
    while at + 9 <= len(frame) and frame[at] == 0xFF:
        marker = frame[at + 1]
        if marker == 0xFF:  # fill byte
            at += 1
        elif marker in _NO_LENGTH:
            at += 2
        elif marker in _FRAME:
            return int.from_bytes(frame[at + 5 : at + 7], "big"), int.from_bytes(frame[at + 7 : at + 9], "big")
        else:
            at += 2 + int.from_bytes(frame[at + 2 : at + 4], "big")
    return None
