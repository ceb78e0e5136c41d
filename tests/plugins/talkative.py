"""Pipelines that say a word too many, cannot be loaded, or take what they do not get; see `testpipelines`."""

import os
import subprocess
from dataclasses import replace
from pathlib import Path

from pipelines.identity import Identity

print("a word while the module is loaded", flush=True)


class Talkative(Identity):
    def __init__(self, execution=None):
        super().__init__()
        self.card = replace(self.card, name="test-talkative")
        with (Path(os.environ["TEST_PIPELINES"]) / "loads").open("a") as file:
            file.write("x")

    def denoise(self, series, options):
        print('{"kind": "done"}', flush=True)
        os.write(1, b'{"kind": "failed"}' + bytes([10]))
        subprocess.run(["echo", "noise of a child of the child"], check=True)
        return super().denoise(series, options)


class Unloadable(Identity):
    def __init__(self, execution=None):
        raise RuntimeError("no weights here")


class Quoting(Identity):
    def denoise(self, series, options):
        from dicomnode.errors import DerivationError

        try:
            int("Phantom^Synthetic")
        except ValueError as error:
            raise DerivationError("1.2.3 cannot be derived from") from error


class Keeping(Identity):
    def __init__(self, execution=None):
        from pipelines.openvino_core import core

        super().__init__()
        core()

    def denoise(self, series, options):
        blocks = [b"x" * 2**24 for _ in range(16)]
        _above = [b"x" * 1000 for _ in range(1000)]
        del blocks
        (Path(os.environ["TEST_PIPELINES"]) / "memory").write_text(Path("/proc/self/status").read_text())
        yield from super().denoise(series, options)


class Greedy(Identity):
    def denoise(self, series, options):
        bytes(2**62)


class GreedyWhileLoading(Identity):
    def __init__(self, execution=None):
        bytes(2**62)


class Unreachable(Identity):
    def denoise(self, series, options):
        raise ConnectionRefusedError(111, "Connection refused for Doe^Jane")


class Unfinished(Identity):
    def denoise(self, series, options):
        return os.open("/nonexistent/table-of-the-plug-in", os.O_RDONLY)


class Untrained(Identity):
    def __init__(self, execution=None):
        from pipelines.runtime import read_card

        read_card("absent")
