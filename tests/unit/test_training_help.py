"""Each command of `python -m training` explains itself, and the documents name no other."""

from __future__ import annotations

import argparse
import importlib
import re
from pathlib import Path

import pytest

from training.__main__ import COMMANDS, main

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def _parser(command: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser()
    importlib.import_module(COMMANDS[command]).arguments(parser)
    return parser


def _options(command: str) -> set[str]:
    return {option for action in _parser(command)._actions for option in action.option_strings}


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself_and_its_options(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main([command, "--help"])
    assert end.value.code == 0
    said = " ".join(capsys.readouterr().out.split())
    assert " ".join((importlib.import_module(COMMANDS[command]).__doc__ or "").split())[:70] in said
    for action in _parser(command)._actions:
        assert len((action.help or "").split()) > 1, action


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_and_options_in_the_documents_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    found = re.findall(r"python -m training ([a-z]+)([^`\n]*)", text)
    assert found or page.name != "training.md"
    for command, words in found:
        assert command in COMMANDS
        assert set(re.findall(r"(?<!\S)--[a-z-]+", words)) <= _options(command), (command, words)
    if page.name == "training.md":
        every = set().union(*map(_options, COMMANDS))
        assert {
            one for code in re.findall(r"`([^`\n]+)`", text) for one in re.findall(r"(?<!\S)--[a-z-]+", code)
        } <= every


@pytest.mark.parametrize(
    ("command", "option", "says"),
    [
        ("train", "--start", "runs/drl after `train drl --out runs/drl`"),
        ("train", "--features", "ct-ae, our auto-encoder of CT images"),
        ("train", "--feature-weights", "`--features vgg16 --feature-weights vgg16-397923af.pth`"),
        ("evaluate", "--lpips", "never downloaded: torchvision's alexnet"),
        ("evaluate", "--doses", "0.25 is a quarter of the mAs"),
    ],
)
def test_help_explains_what_is_no_common_word(
    command: str, option: str, says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main([command, "--help"])
    words = " ".join(capsys.readouterr().out.split()).replace("- ", "-")  # broken at hyphens, too
    assert says in words[words.index(f" {option} ", words.index("options:")) :]
