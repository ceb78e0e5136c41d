"""Pipelines that misbehave on purpose, announced like a hospital's own package: by entry points on the path.

They look at files in the folder ``$TEST_PIPELINES``, so that a test can hold one in the middle and let it go.
"""

import errno
import os
import signal
import time
from dataclasses import replace
from pathlib import Path

import numpy as np

from pipelines.identity import Identity

_POLL_S = 0.02
_DEADLINE_S = 60.0


def folder() -> Path:
    return Path(os.environ["TEST_PIPELINES"])


class _Named(Identity):
    def __init__(self, execution) -> None:
        super().__init__(execution)
        self.card = replace(self.card, name=self.name)


class Held(_Named):
    """The identity, which says that it runs (``running``) and waits while ``hold`` exists."""

    name = "test-held"

    def denoise(self, series, options):
        (folder() / "running").write_text(str(os.getpid()))
        end = time.monotonic() + _DEADLINE_S
        while (folder() / "hold").exists() and time.monotonic() < end:
            time.sleep(_POLL_S)
        yield from super().denoise(series, options)


class Stack(Identity):
    """The identity for a network that looks at neighbouring slices: the gate wants them to be neighbours."""

    card = replace(Identity.card, name="test-stack", input="volume")


class Crash(_Named):
    """Kills its own process, as a fault in native code would."""

    name = "test-crash"

    def denoise(self, series, options):
        with (folder() / "crashes").open("a") as file:
            file.write("x")
        os.kill(os.getpid(), signal.SIGKILL)


class Harmful(_Named):
    """Moves soft tissue by 40 HU: must never leave the node."""

    name = "test-harmful"

    def denoise(self, series, options):
        for hu in super().denoise(series, options):
            yield hu + np.float32(40) * (hu > -500)


class NoSpace(_Named):
    """Fails for lack of space until ``space`` exists."""

    name = "test-no-space"

    def denoise(self, series, options):
        if not (folder() / "space").exists():
            raise OSError(errno.ENOSPC, "No space left on device")
        return super().denoise(series, options)


class Broken(_Named):
    """A programming error in a pipeline."""

    name = "test-broken"

    def denoise(self, series, options):
        raise ValueError("a fault at Doe^Jane")


def with_weights(execution):
    """``st3d`` with the card and weights that lie in the folder, if any do."""
    from pipelines.shipped import st3d

    return st3d(execution, folder())
