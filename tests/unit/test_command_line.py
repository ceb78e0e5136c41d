"""Numbers that the commands take, and what a card says of them: everything but where the folders lay."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from training.command_line import dose_fraction, positive, without_folders


@pytest.mark.parametrize("typed", ["/a/secret/run 1", "/a/secret/run 1/", "/a/secret//run 1", "/a/secret/./run 1"])
def test_only_the_last_part_of_a_path_is_told(typed: str) -> None:
    path = Path(typed)
    assert without_folders(["train", "--out", typed, "--seed", "1"], [path, None]) == "train --out 'run 1' --seed 1"
    assert without_folders(["train", f"--out={typed}"], [path]) == "train '--out=run 1'"


def test_a_relative_path_is_told_by_the_name_of_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "data").mkdir()
    monkeypatch.chdir(tmp_path / "data")
    assert without_folders(["--data", "."], [Path()]) == "--data data"


def test_other_words_stay() -> None:
    assert (
        without_folders(["evaluate", "st3d", "--doses", "0.25", ""], [Path("/b/out")])
        == "evaluate st3d --doses 0.25 ''"
    )


@pytest.mark.parametrize("word", ["0", "1", "-0.1", "25", "nan", "inf"])
def test_impossible_fractions_are_refused(word: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match=f"above 0 and below 1, not {word}"):
        dose_fraction(word)


def test_possible_numbers_are_taken() -> None:
    assert (dose_fraction("0.25"), positive("1")) == (0.25, 1)
    with pytest.raises(argparse.ArgumentTypeError, match="at least 1 is needed, not 0"):
        positive("0")
    for number in (dose_fraction, positive):
        with pytest.raises(ValueError, match="a quarter"):
            number("a quarter")
