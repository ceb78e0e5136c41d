"""``python -m training COMMAND``: train networks, measure and install them, make low-dose series, compare radiomics."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

COMMANDS = {
    "train": "training.train",
    "evaluate": "training.evaluate",
    "simulate": "training.simulation.simulated_series",
    "radiomics": "training.radiomics.command",
    "export": "training.export",
    "quantize": "training.quantize",
    "curve": "training.curve",
}
"""Module of each command: ``HELP``, one line, and ``arguments(parser)``, which sets ``run``."""


def main(arguments: Sequence[str] = tuple(sys.argv[1:])) -> None:
    """Run one command; only its module is imported."""
    parser = argparse.ArgumentParser(prog="python -m training", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    wanted = next((word for word in arguments if word in COMMANDS), None)
    for name in COMMANDS if wanted is None else (wanted,):
        module = importlib.import_module(COMMANDS[name])
        one = commands.add_parser(name, help=module.HELP, description=module.__doc__)
        module.arguments(one)
    args = parser.parse_args(arguments)
    args.words = tuple(arguments)
    args.run(args)


if __name__ == "__main__":
    main()
