"""Keeps pydicom's remarks out of the log: they quote values, which may be names. What matters is checked by us."""

from __future__ import annotations

import logging
import threading
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager


class _Silence:
    """Lasts until the last of those who asked for it is through.

    Levels of logging and filters of warnings belong to the process: who puts them back as he found them would, beside
    another thread, end its silence, or leave the process silent for good.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._wanted_by = 0
        self._before = ExitStack()
        """Puts things back as they were."""

    @contextmanager
    def __call__(self) -> Iterator[None]:
        with self._lock:
            if not self._wanted_by:
                logger = logging.getLogger("pydicom")
                self._before.callback(logger.setLevel, logger.level)
                logger.setLevel(logging.CRITICAL)
                self._before.enter_context(warnings.catch_warnings())
                warnings.simplefilter("ignore")
            self._wanted_by += 1
        try:
            yield
        finally:
            with self._lock:
                self._wanted_by -= 1
                if not self._wanted_by:
                    self._before.close()


pydicom_silent = _Silence()
"""A context in which pydicom says nothing, in whatever thread."""
