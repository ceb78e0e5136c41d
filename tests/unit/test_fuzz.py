"""The fuzz run in small: no reader crashes, and a crash would be told."""

from __future__ import annotations

import random
import struct

import pytest
from caller import request
from fuzz import Reader, converse, mutated, outcome, readers, run

INPUTS = 40
REQUEST = request()


@pytest.fixture(scope="module")
def every() -> dict[str, Reader]:
    return readers([])


def test_no_reader_crashes(every: dict[str, Reader]) -> None:
    seed = f"{random.SystemRandom().randrange(2**32):08x}"
    print(f"seed {seed}")
    for name, reader in every.items():
        counts, crashes = run(name, reader, seed, range(INPUTS))
        assert crashes == {}, name
        assert counts["taken"] + counts["refused"] == INPUTS


def test_every_reader_takes_its_seeds_as_they_are(every: dict[str, Reader]) -> None:
    """Else nothing but the first check of a reader would be tried."""
    for name, reader in every.items():
        taken = [outcome(reader, one) for one in reader.seeds].count("taken")
        assert taken >= (1 if name == "service" else len(reader.seeds) - 1), name


def test_the_same_seed_gives_the_same_inputs() -> None:
    inputs = [mutated([REQUEST], random.Random(f"a/request/{k}")) for k in range(20)]
    assert inputs == [mutated([REQUEST], random.Random(f"a/request/{k}")) for k in range(20)]
    assert len(set(inputs)) > 15


def test_a_crash_is_told_with_its_place() -> None:
    reader = Reader(lambda data: struct.unpack(">L", data[:1]), [b"abcdef"], ValueError)
    counts, crashes = run("broken", reader, "a", range(30))
    assert counts["crashed"] == 30
    assert list(crashes.values()) == [0]
    assert "unpack requires a buffer of 4 bytes (test_fuzz.py:" in next(iter(crashes))


def test_a_fault_that_only_the_log_tells_of_is_a_crash(monkeypatch: pytest.MonkeyPatch) -> None:
    take = converse()
    monkeypatch.setattr("dicomnode.scp.StorageServer.admit", lambda *arguments: 1 / 0)
    assert "aborted: a fault of the node: ZeroDivisionError at <lambda>" in outcome(Reader(take, []), REQUEST)
