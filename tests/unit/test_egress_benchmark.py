"""What benchmarks/egress.py calls lost when it sends again and again, against a peer that loses what it is told to."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest
from ct_builder import phantom, write_series
from oracle import Script, StorageOracle
from peers import free_port

sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks"))  # they are scripts, not a package
egress = importlib.import_module("egress")


@pytest.mark.parametrize(
    ("script", "successes", "lost", "said"),
    [
        (Script(), 12, 0, ""),
        (Script(status_of_nth={3: 0xB000, 6: 0xA900}), 10, 0, ""),
        # The second send ends at its second image.
        (Script(drop_stored_at={6}), 9, 3, "send 2, after 1 answers: target (ANY at 127.0.0.1"),
    ],
    ids=["all answered", "no successes", "dropped"],
)
def test_answers_are_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], script: Script, successes: int, lost: int, said: str
) -> None:
    write_series(tmp_path / "ct", phantom(2, 16))
    (tmp_path / "in").mkdir()
    (tmp_path / "out").mkdir()
    items = egress.series(tmp_path / "ct", tmp_path / "in", 4)
    with StorageOracle(script) as oracle:
        found = egress.again(oracle.port, items, 3, tmp_path / "out")
    assert found == (12, successes, lost, 0)
    assert capsys.readouterr().err.startswith(said)


def test_files_of_each_send_are_counted_and_removed(tmp_path: Path) -> None:
    (tmp_path / "1").touch()
    (tmp_path / "2").touch()
    assert egress.again(free_port(), [], 3, tmp_path).kept == 2
    assert list(tmp_path.iterdir()) == []
