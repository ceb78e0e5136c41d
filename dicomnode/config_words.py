"""What is wrong with a configuration, in words for the person who has to correct it."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import Any

from pydantic_core import ErrorDetails

from dicomnode.strict_yaml import Location

CROSS_CHECK = "cross_check"
"""Type of the errors that we found and worded ourselves."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {near[0]}?" if near else f"there are: {', '.join(sorted(known)) or 'none'}"


def in_words(detail: ErrorDetails, known_keys: Iterable[str]) -> str:
    """What pydantic found, in words, and what to do; `known_keys` are those of the section where it was."""
    kind, context, value = detail["type"], detail.get("ctx", {}), detail["input"]
    key = str(detail["loc"][-1]) if detail["loc"] else ""
    if kind == CROSS_CHECK:
        return str(context["reason"])
    if kind == "value_error":
        return str(context["error"])
    if kind == "missing":
        return "is missing; add it"
    if kind == "extra_forbidden":
        return f"unknown key; {did_you_mean(key, known_keys)}"
    if kind in {"greater_than", "greater_than_equal", "less_than", "less_than_equal"}:
        limit = next(iter(context.values()))
        words = {"greater_than": "more than", "greater_than_equal": "at least", "less_than": "less than"}
        return f"{_short(value)} is out of range; write a number of {words.get(kind, 'at most')} {limit}{_unit(key)}"
    if kind.startswith(("float_", "int_", "finite_")):
        whole = "a whole number" if kind.startswith("int_") else "a number"
        return f"{_short(value)} is not {whole}; write only the number{_unit(key)}, without quotes or unit"
    if kind.startswith("bool_"):
        return f"{_short(value)} is neither true nor false; write one of these"
    if kind == "too_long":
        return f"longer than {context['max_length']} characters; shorten it"
    if kind.startswith("string_"):
        return f"{_short(value)} is not text; put it in quotes"
    if kind == "literal_error":
        return f"{_short(value)} is not possible; write {context['expected']}"
    if kind == "tuple_type":
        return f"{_short(value)} is not a list; write [{value if isinstance(value, str) else '...'}]"
    if kind in {"dict_type", "mapping_type", "model_type", "model_attributes_type"}:
        return f"{_short(value)} stands where KEY: VALUE lines belong; check the indentation and the colon"
    return f"{detail['msg']}; correct it"


def _unit(key: str) -> str:
    for ending, unit in (("_s", "seconds"), ("_mb", "megabytes"), ("_days", "days")):
        if key.endswith(ending):
            return f" ({unit})"
    return ""


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def where(at: Location, raw: Mapping[str, Any]) -> str:
    """``routes[chest-low-dose].when.SliceThickness``: a route by its name, else by its number from 1."""
    text = ""
    for depth, part in enumerate(at):
        if part == "[key]":
            continue
        if isinstance(part, int):
            name = None
            if depth == 1 and at[0] == "routes" and isinstance(raw["routes"][part], dict):
                name = raw["routes"][part].get("name")
            text += f"[{name if isinstance(name, str) else part + 1}]"
        else:
            text += f".{part}" if text else part
    return text or "the file"
