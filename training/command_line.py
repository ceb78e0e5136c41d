"""What the commands share: numbers that they take, and how cards and reports state them."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Iterable, Sequence
from pathlib import Path


def dose_fraction(word: str) -> float:
    """A fraction of full dose, above 0 and below 1; anything else is an error of usage."""
    value = float(word)
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"a fraction of full dose is above 0 and below 1, not {word}")
    return value


def positive(word: str) -> int:
    """A number of things, at least 1; anything else is an error of usage."""
    value = int(word)
    if value < 1:
        raise argparse.ArgumentTypeError(f"at least 1 is needed, not {word}")
    return value


def without_folders(words: Sequence[str], paths: Iterable[Path | None]) -> str:
    """`words` as a shell takes them, with the last part alone of each that is one of `paths`.

    Where folders lay is nobody's business. Recognised however they were typed: ``data/``, ``./data``, ``--data=data``.
    """
    known = {path for path in paths if path is not None}

    def shown(word: str) -> str:
        option, equals, value = word.partition("=") if word.startswith("--") else ("", "", word)
        return f"{option}{equals}{Path(value).resolve().name}" if value and Path(value) in known else word

    return shlex.join(map(shown, words))
