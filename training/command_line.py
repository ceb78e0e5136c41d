"""The command that made a result, as cards and reports state it."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Sequence
from pathlib import Path


def without_folders(words: Sequence[str], paths: Iterable[Path | None]) -> str:
    """`words` as a shell takes them, with the last part alone of each that is one of `paths`.

    Where folders lay is nobody's business. Recognised however they were typed: ``data/``, ``./data``, ``--data=data``.
    """
    known = {path for path in paths if path is not None}

    def shown(word: str) -> str:
        option, equals, value = word.partition("=") if word.startswith("--") else ("", "", word)
        return f"{option}{equals}{Path(value).resolve().name}" if value and Path(value) in known else word

    return shlex.join(map(shown, words))
