"""What the sections of the configuration have in common."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic_core import InitErrorDetails, PydanticCustomError

from dicomnode.config_words import CROSS_CHECK
from dicomnode.strict_yaml import Location

FOLDER = "folder"
"""Key of the validation context under which `load` passes the folder of the configuration file."""


class Section(BaseModel):
    """`validate_by_name` lets Python code write ``continue_=True``; a file must write ``continue``, see `load`."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_by_name=True, validate_by_alias=True)


def refuse(title: str, problems: list[tuple[Location, str]]) -> None:
    """Raise all `problems` at once, each at its own place below the value that is being validated."""
    if problems:
        raise ValidationError.from_exception_data(
            title,
            [
                InitErrorDetails(
                    type=PydanticCustomError(CROSS_CHECK, "{reason}", {"reason": reason}), loc=at, input=None
                )
                for at, reason in problems
            ],
        )
