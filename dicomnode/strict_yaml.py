"""Read a YAML file by the letter: each value as it looks, each key once, and the line where everything stands.

YAML 1.1 has surprises: ``no`` is false, ``011`` is nine, ``1:30`` is ninety, ``2024-01-01`` is a date. Here only
``true`` and ``false``, plain decimal numbers and ``null`` are more than text, as in the YAML 1.2 core schema, and other
spellings of numbers stay text, so that a field that wants a number refuses them. Anchors, aliases and tags are refused:
no file of ours needs them, and a few lines of them can unfold into gigabytes.
"""

from __future__ import annotations

import re
from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Any

import yaml

MAX_BYTES = 1_000_000
"""A larger file is not a configuration."""

MAX_DEPTH = 20
"""Levels of nesting; keeps a file of opening brackets from exhausting the stack."""

Location = tuple[str | int, ...]
"""Keys and list positions (from 0) from the top of the file to a value."""

_INTEGER = re.compile(r"[-+]?(0|[1-9][0-9]{0,17})")
_NUMBER = re.compile(r"[-+]?(0|[1-9][0-9]{0,17})(\.[0-9]{0,30})?([eE][-+]?[0-9]{1,3})?")
_CONSTANTS = {"true": True, "True": True, "TRUE": True, "false": False, "False": False, "FALSE": False}
_NULLS = {"", "~", "null", "Null", "NULL"}


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is wrong: where (line from 1) and why, in words."""

    line: int
    reason: str


class YamlError(ValueError):
    """The file is not YAML as described above; `problems` says where and why."""

    def __init__(self, *problems: Problem) -> None:
        super().__init__("; ".join(f"line {problem.line}: {problem.reason}" for problem in problems))
        self.problems = problems


@dataclass(slots=True)
class Document:
    """The values of a file, and the line of each."""

    value: Any
    lines: dict[Location, int] = field(default_factory=dict)

    def line(self, location: Location) -> int:
        """Line of the value at `location`, or of the nearest thing around it that is in the file."""
        while location and location not in self.lines:
            location = location[:-1]
        return self.lines.get(location, 1)


class _Loader(yaml.SafeLoader):
    """PyYAML's scanner and parser without aliases, anchors, tags and bottomless nesting."""

    depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event = self.peek_event()  # type: ignore[no-untyped-call]  # PyYAML's C parser has no types
        line = event.start_mark.line + 1
        if isinstance(event, yaml.AliasEvent) or event.anchor is not None:
            raise YamlError(
                Problem(line, "anchors (&) and aliases (*) are not allowed; write the value out, or quote it")
            )
        if getattr(event, "tag", None) is not None:
            raise YamlError(Problem(line, "tags (!) are not allowed; write the plain value, or quote it"))
        if self.depth >= MAX_DEPTH:
            raise YamlError(
                Problem(line, f"nested more than {MAX_DEPTH} levels deep; check the brackets and the indentation")
            )
        self.depth += 1
        try:
            return super().compose_node(parent, index)
        finally:
            self.depth -= 1


def parse(data: bytes) -> Document:
    """Values and lines of the one YAML document in `data`.

    Raises
    ------
    YamlError
        With every duplicate key, or with the first thing that keeps the rest from being read.
    """
    loader = _Loader(_text(data))
    try:
        root = loader.get_single_node()
    except yaml.MarkedYAMLError as error:
        raise YamlError(_syntax(error)) from error
    finally:
        loader.dispose()
    if root is None:
        raise YamlError(Problem(1, "the file is empty"))
    document = Document(None)
    problems: list[Problem] = []
    document.value = _build(root, (), document.lines, problems)
    if problems:
        raise YamlError(*problems)
    return document


def _text(data: bytes) -> str:
    """`data` as text; a byte order mark, which Windows editors write, is allowed."""
    if len(data) > MAX_BYTES:
        raise YamlError(
            Problem(1, f"the file has {len(data)} bytes, at most {MAX_BYTES} are read; is it the right file?")
        )
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise YamlError(Problem(line, "not UTF-8 text; save the file with the encoding UTF-8")) from error
    strange = yaml.reader.Reader.NON_PRINTABLE.search(text)
    if strange:
        line = text.count("\n", 0, strange.start()) + 1
        raise YamlError(Problem(line, f"control character U+{ord(strange.group()):04X}; remove it"))
    return text


def _syntax(error: yaml.MarkedYAMLError) -> Problem:
    """PyYAML's error in words that say what to do."""
    mark = error.problem_mark or error.context_mark
    line = mark.line + 1 if mark else 1
    problem = error.problem or error.context or "cannot be read"
    if "'\\t'" in problem:
        return Problem(line, "a tab stands where spaces are needed; indent with spaces only")
    if "single document" in (error.context or ""):
        return Problem(line, "a second document begins here; remove the line '---'")
    return Problem(line, f"not valid YAML ({problem}); check the indentation, colons, brackets and quotes around here")


def _build(node: yaml.Node, at: Location, lines: dict[Location, int], problems: list[Problem]) -> Any:
    """Value of `node`; the line of each of its parts goes to `lines`, duplicate keys to `problems`."""
    lines.setdefault(at, node.start_mark.line + 1)
    if isinstance(node, yaml.SequenceNode):
        return [_build(child, (*at, position), lines, problems) for position, child in enumerate(node.value)]
    if isinstance(node, yaml.MappingNode):
        mapping: dict[Hashable, Any] = {}
        for key_node, value_node in node.value:
            line = key_node.start_mark.line + 1
            if not isinstance(key_node, yaml.ScalarNode):
                problems.append(Problem(line, "a key must be a plain word; check the brackets"))
                continue
            key: str = key_node.value
            if key in mapping:
                problems.append(
                    Problem(line, f"{key!r} stands here twice, first in line {lines[*at, key]}; remove one")
                )
                continue
            lines[*at, key] = line
            mapping[key] = _build(value_node, (*at, key), lines, problems)
        return mapping
    assert isinstance(node, yaml.ScalarNode)
    return _scalar(node)


def _scalar(node: yaml.ScalarNode) -> str | int | float | bool | None:
    """Quoted text as it is, other text as the number, truth value or nothing that it looks like."""
    text: str = node.value
    if node.style is not None:
        return text
    if text in _NULLS:
        return None
    if text in _CONSTANTS:
        return _CONSTANTS[text]
    if _INTEGER.fullmatch(text):
        return int(text)
    if _NUMBER.fullmatch(text):
        return float(text)
    return text
