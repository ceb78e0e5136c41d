"""Progress for people and for logs: one line that moves on a terminal, now and then a line elsewhere."""

from __future__ import annotations

import sys
import time
from types import TracebackType

_LINE_EVERY_S = 10.0
_REDRAW_EVERY_S = 0.1
_BAR_CHARACTERS = 24
_COLUMNS = 100


class Step:
    """One step of the demo, with a name and the seconds it took; a context manager.

    On a terminal its line is drawn again and again; elsewhere it is printed every 10 s. The last line stays.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self._begun = time.monotonic()
        self._moving = sys.stdout.isatty()
        self._printed = self._begun
        self._result = ""

    def __enter__(self) -> Step:
        if self._moving:
            self._draw("")
        else:
            print(f"  {self.name} ...", flush=True)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if kind is None:
            self._line(f"{self._result}  ({self.seconds:.1f} s)".strip(), last=True)
        elif self._moving:
            print()

    @property
    def seconds(self) -> float:
        """Since the step began."""
        return time.monotonic() - self._begun

    def at(self, fraction: float, what: str = "") -> None:
        """Show that `fraction` (0 to 1) is done, with a word on what is going on."""
        if time.monotonic() - self._printed < (_REDRAW_EVERY_S if self._moving else _LINE_EVERY_S):
            return
        self._printed = time.monotonic()
        if self._moving:
            full = round(min(max(fraction, 0), 1) * _BAR_CHARACTERS)
            self._draw(f"[{'#' * full}{'.' * (_BAR_CHARACTERS - full)}] {fraction:4.0%} {what}")
        else:
            self._line(f"{fraction:4.0%} {what}", last=False)

    def result(self, text: str) -> None:
        """What the last line says."""
        self._result = text

    def _draw(self, text: str) -> None:
        print(f"\r{f'  {self.name}: {text}':{_COLUMNS}.{_COLUMNS}}", end="", flush=True)

    def _line(self, text: str, *, last: bool) -> None:
        if self._moving:
            self._draw("")
            print("\r", end="")
        print(f"  {self.name}: {text}", flush=True)
