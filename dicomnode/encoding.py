"""A DICOM file as the data set bytes that one accepted transfer syntax carries: its own bytes, or pydicom's rewriting.

Nothing is ever compressed here. A lossy compressed image may go out uncompressed; its data set then still says that it
once was compressed with loss (PS3.3 C.7.6.1.1.5).
"""

from __future__ import annotations

import hashlib
import struct
from pathlib import Path

from pydicom import Dataset, dcmread
from pydicom.filebase import DicomBytesIO
from pydicom.filewriter import write_dataset
from pydicom.uid import (
    UID,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEGBaseline8Bit,
    JPEGExtended12Bit,
    JPEGLSNearLossless,
)

from dicomnode.errors import UnreadableFile, UnsendableFile
from pipelines.element_index import LONG_VRS

UNCOMPRESSED: tuple[str, ...] = (str(ExplicitVRLittleEndian), str(ImplicitVRLittleEndian))
"""What every file can be rewritten to, the preferred first."""

LOSSY_METHODS = {
    JPEGBaseline8Bit: b"ISO_10918_1",
    JPEGExtended12Bit: b"ISO_10918_1",
    JPEGLSNearLossless: b"ISO_14495_1",
}
"""Transfer syntaxes that are always lossy → LossyImageCompressionMethod (PS3.3 C.7.6.1.1.5.1)."""

_META_OFFSET = 132
_SOP_INSTANCE_UID = 0x0003
_TRANSFER_SYNTAX_UID = 0x0010
_WORD_BYTES = {"OW": 2, "OL": 4, "OF": 4, "OD": 8, "OV": 8}
"""VRs whose words pydicom leaves in the byte order of the file."""


def data_set(
    path: Path, sop_instance_uid: str, file_syntax: str, wanted_syntax: str, sha256: str | None = None
) -> memoryview:
    """Data set of the file in the wanted transfer syntax; exactly the file's bytes where that is its own.

    Parameters
    ----------
    path
        A DICOM Part 10 file.
    sop_instance_uid, file_syntax
        What the caller believes to be in the file; must be true.
    wanted_syntax
        `file_syntax` or one of `UNCOMPRESSED`.
    sha256
        Hexadecimal, of the data set as the file must hold it; None if nobody recorded it.

    Raises
    ------
    UnsendableFile
        The file is gone, forbidden, no DICOM file, not the one it should be, was damaged, or cannot be rewritten.
    UnreadableFile
        It cannot be read for a reason that may pass: no free descriptor or memory, a disk that does not answer.
    """
    try:
        content = path.read_bytes()
    except (FileNotFoundError, IsADirectoryError, PermissionError) as error:
        raise UnsendableFile(
            f"file cannot be read ({error.strerror}); the spool must keep it until it is sent"
        ) from error
    except OSError as error:
        raise UnreadableFile(f"the file of {sop_instance_uid} cannot be read now ({error.strerror})") from error
    meta, offset = _file_meta(content)
    if meta.get(_SOP_INSTANCE_UID) != sop_instance_uid:
        raise UnsendableFile(f"file holds SOP instance {meta.get(_SOP_INSTANCE_UID)}, not the one to be sent")
    if meta.get(_TRANSFER_SYNTAX_UID) != file_syntax:
        raise UnsendableFile(f"file is in transfer syntax {meta.get(_TRANSFER_SYNTAX_UID)}, not in {file_syntax}")
    if offset >= len(content):
        raise UnsendableFile("file ends after its file meta information; it holds no data set")
    data = memoryview(content)[offset:]
    if sha256 is not None and hashlib.sha256(data).hexdigest() != sha256:
        raise UnsendableFile(
            "file was changed on disk since it was written (SHA-256 of its data set); check the disk, "
            "put the file back from a backup and retry the job"
        )
    if wanted_syntax == file_syntax:
        return data
    if wanted_syntax not in UNCOMPRESSED:
        raise ValueError(f"cannot write transfer syntax {wanted_syntax}")
    try:
        return memoryview(_rewritten(content, UID(file_syntax), UID(wanted_syntax)))
    except Exception as error:  # pydicom and the codecs raise anything; their texts may quote patient data
        raise UnsendableFile(
            f"file in {_named(file_syntax)} cannot be rewritten in {_named(wanted_syntax)}, "
            f"which is all that the destination accepts ({type(error).__name__})"
        ) from error


def _file_meta(content: bytes) -> tuple[dict[int, str], int]:
    """Element number → text of the file meta information (PS3.10 section 7.1), and where the data set begins."""
    if content[_META_OFFSET - 4 : _META_OFFSET] != b"DICM":
        raise UnsendableFile("not a DICOM file (no DICM prefix)")
    meta: dict[int, str] = {}
    offset = _META_OFFSET
    while content[offset : offset + 2] == b"\2\0":
        try:
            number, vr, length = struct.unpack_from("<2xH2sH", content, offset)
            offset += 8
            if vr in LONG_VRS:
                (length,) = struct.unpack_from("<L", content, offset)
                offset += 4
        except struct.error:
            raise UnsendableFile("file ends inside its file meta information") from None
        meta[number] = content[offset : offset + length].rstrip(b"\0 ").decode("ascii", "replace")
        offset += length
    return meta, offset


def _rewritten(content: bytes, source: UID, target: UID) -> bytes:
    ds = dcmread(DicomBytesIO(content))
    if source.is_compressed:
        ds.decompress(generate_instance_uid=False)
        # An icon may itself be compressed, is optional, and is worth no decoder of its own.
        ds.pop("IconImageSequence", None)
        if source in LOSSY_METHODS:
            ds.LossyImageCompression = "01"
    elif source == ExplicitVRBigEndian:
        _swap_words(ds)
    out = DicomBytesIO()
    out.is_little_endian = True
    out.is_implicit_VR = target == ImplicitVRLittleEndian
    write_dataset(out, ds)
    return out.getvalue()


def _swap_words(ds: Dataset) -> None:
    """Turn the words of binary elements, which pydicom passes on as they are, from big to little endian."""
    for element in ds.iterall():
        size = _WORD_BYTES.get(element.VR)
        if size is not None and element.value:
            words = bytearray(len(element.value))
            for byte in range(size):
                words[byte::size] = element.value[size - 1 - byte :: size]
            element.value = bytes(words)


def _named(syntax: str) -> str:
    name = UID(syntax).name
    return syntax if name == syntax else f"{name} ({syntax})"
