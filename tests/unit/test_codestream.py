"""A compressed frame must not ask for more memory than its header does."""

from __future__ import annotations

import struct
import tracemalloc
from pathlib import Path

import pytest
from ct_builder import edit, phantom, write_series
from pydicom import dcmread
from pydicom.dataset import Dataset
from pydicom.encaps import get_frame
from pydicom.uid import JPEGLSLossless

from pipelines.codestream import declared_size
from pipelines.volume import SeriesRefused, read_volume

SIZ = b"\xff\x4f\xff\x51" + struct.pack(">HHIIIIIIII", 41, 0, 520, 700, 8, 60, 512, 512, 0, 0)
"""JPEG 2000 with an image offset: 640 rows, 512 columns."""
APP0 = b"\xff\xe0" + struct.pack(">H", 16) + b"JFIF".ljust(14, b"\0")
SOF = struct.pack(">HBHHB", 11, 12, 48, 80, 1)


@pytest.mark.parametrize(
    ("frame", "size"),
    [
        (SIZ, (640, 512)),
        (b"\0\0\0\x0cjP  \r\n\x87\n" + SIZ, None),
        (b"\xff\xd8\xff\xc3" + SOF, (48, 80)),
        (b"\xff\xd8" + APP0 + b"\xff\xff\xff\xc0" + SOF, (48, 80)),
        (b"\xff\xd8" + b"\xff\xc4" + struct.pack(">H", 5) + b"abc" + b"\xff\xf7" + SOF, (48, 80)),
        (b"\xff\xd8" + APP0, None),
        (b"\xff\xd8garbage", None),
        (b"\xff\xd8\xff\xc3\x00", None),
        (b"\xff\xd8\xff\xe0\x00\x00" * 9, None),
        (b"", None),
    ],
)
def test_size(frame: bytes, size: tuple[int, int] | None) -> None:
    assert declared_size(frame) == size


def test_size_of_what_an_encoder_made(tmp_path: Path) -> None:
    (path,) = write_series(tmp_path, phantom(1, 40)[:, :, :24], transfer_syntax=JPEGLSLossless)
    assert declared_size(get_frame(dcmread(path).PixelData, 0, number_of_frames=1)) == (40, 24)


def test_a_frame_that_says_65535_is_refused_before_the_decoder_believes_it(tmp_path: Path) -> None:
    (path,) = write_series(tmp_path, phantom(1), transfer_syntax=JPEGLSLossless)

    def inflate(ds: Dataset) -> None:
        at = ds.PixelData.index(b"\xff\xf7")
        ds.PixelData = ds.PixelData[: at + 5] + b"\xff\xff\xff\xff" + ds.PixelData[at + 9 :]

    edit(path, inflate)
    tracemalloc.start()
    with pytest.raises(SeriesRefused, match=r"undecodable.*\(65535, 65535\)"):
        read_volume([path])
    assert tracemalloc.get_traced_memory()[1] < 2**22
    tracemalloc.stop()
