"""The configuration: one frozen object, read and checked once from ``config.yaml`` and passed down.

Every default stands here, on its field, and nowhere else. Names end in their unit: ``_s`` seconds, ``_mb`` 10⁶ bytes,
``_days`` days. Keys that no field has are refused, and so is whatever could only fail later: names of destinations,
pipelines and DICOM keywords that do not exist, ranges, units, AE titles.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    Field,
    PlainValidator,
    Strict,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from dicomnode import conditions, strict_yaml
from dicomnode.conditions import Condition
from dicomnode.config_fields import (
    AETitle,
    Count,
    DicomText,
    FilePath,
    Flag,
    Host,
    Name,
    Port,
    Seconds,
    Text,
)
from dicomnode.config_reception import Reception as Reception  # re-exported: the node takes every section from here
from dicomnode.config_section import FOLDER, Section, refuse
from dicomnode.config_tls import TlsIn, TlsOut
from dicomnode.config_words import did_you_mean, in_words, where
from dicomnode.errors import ConfigError
from pipelines import base

_SQLITE = "sqlite:///"


class Node(Section):
    """Who the node is, where it listens, where it keeps its things.

    `load` makes `spool` and `database` absolute: what is relative in the file counts from the file's folder.
    """

    ae_title: AETitle = "DICOMNODE"
    address: Host = "127.0.0.1"
    port: Port = 11112
    spool: FilePath = Field(default=Path("var/spool"), validate_default=True)
    database: Text = Field(default="sqlite:///var/node.db", validate_default=True)
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = "INFO"

    @field_validator("spool")
    @classmethod
    def _absolute_spool(cls, spool: Path, info: ValidationInfo) -> Path:
        folder: Path | None = (info.context or {}).get(FOLDER)
        return folder / spool if folder else spool

    @field_validator("database")
    @classmethod
    def _absolute_database(cls, database: str, info: ValidationInfo) -> str:
        path = database.removeprefix(_SQLITE)
        if path == database or not path or path.startswith(":") or "?" in path or path.endswith("/"):
            raise ValueError(
                "only SQLite in a file so far; write sqlite:/// and the path of the file, e.g. sqlite:///var/node.db"
            )
        folder: Path | None = (info.context or {}).get(FOLDER)
        return f"{_SQLITE}{folder / path}" if folder else database


class Assembly(Section):
    """How long a series must be silent before it counts as whole."""

    quiet_s: Seconds = 15
    """After evidence that nothing is missing."""
    quiet_without_evidence_s: Seconds = 120

    @model_validator(mode="after")
    def _without_evidence_is_longer(self) -> Assembly:
        if self.quiet_without_evidence_s < self.quiet_s:
            reason = f"{self.quiet_without_evidence_s:g} s is less than quiet_s, {self.quiet_s:g} s; make it longer"
            refuse("Assembly", [(("quiet_without_evidence_s",), reason)])
        return self


class Compute(Section):
    """What denoising may use."""

    threads: Annotated[int, Strict(), Field(ge=0, le=1024)] = 0
    """0: all cores; the process is nice, so reception goes first."""
    device: base.Device = "auto"
    """auto: a GPU if there is one and PyTorch (the extra gpu) is installed, else the CPU."""
    precision: base.Precision = "auto"
    """auto: the fastest number format that the device has and the card of the pipeline vouches for."""
    max_worker_deaths: Count = 3
    """A job whose compute process dies this often has failed."""


class Delivery(Section):
    """How often and how long sending is tried again."""

    retry_first_s: Seconds = 10
    retry_max_s: Seconds = 900
    give_up_after_days: Annotated[float, Strict(), Field(gt=0, le=365, allow_inf_nan=False)] = 7
    failure_status_tries: Count = 5
    """Tries of an object that the destination answers with a failure which may pass."""

    @model_validator(mode="after")
    def _longest_is_not_below_first(self) -> Delivery:
        if self.retry_max_s < self.retry_first_s:
            reason = f"{self.retry_max_s:g} s is less than retry_first_s, {self.retry_first_s:g} s; make it longer"
            refuse("Delivery", [(("retry_max_s",), reason)])
        return self


class Derivation(Section):
    """What tells the derived series from the original (PS3.3 C.7.6.1.1.2, C.8.2.1)."""

    series_description_suffix: Annotated[DicomText, Field(max_length=32)] = " denoised"
    series_number_offset: Annotated[int, Strict(), Field(ge=0, le=1_000_000_000)] = 1000
    image_type_value_2: Literal["PRIMARY", "SECONDARY"] = "SECONDARY"
    keep_private_attributes: Flag = True
    image_comments: Annotated[DicomText, Field(max_length=1024)] = (
        "Denoised by software; compare with the original series"
    )

    @field_validator("series_description_suffix")
    @classmethod
    def _visible(cls, suffix: str) -> str:
        if not suffix.strip():
            raise ValueError('a reader must see that a series is derived; write a word, e.g. " denoised"')
        return suffix


class Destination(Section):
    """A system that the node sends to."""

    ae_title: AETitle
    host: Host
    port: Port
    calling_ae_title: AETitle | None = None
    """Title under which the node calls it; None: the node's own."""
    connect_timeout_s: Seconds = 10
    acse_timeout_s: Seconds = 30
    dimse_timeout_s: Seconds = 60
    commitment_timeout_s: Seconds | None = None
    """Longest wait for the report of a Storage Commitment, before it is asked for again; None: it is not asked for."""
    tls: TlsOut | None = None


class PipelineOptions(Section):
    """A pipeline under a site's own name, with the site's settings (see `pipelines.base.Options`)."""

    uses: Text
    """Name of an installed pipeline; in the file the name of the entry, unless given."""
    strength: Annotated[float, Strict(), Field(ge=0.0, le=base.HIGHEST_STRENGTH)] = 1.0
    blend: Annotated[float, Strict(), Field(ge=0.0, le=1.0)] = 1.0

    @field_validator("uses")
    @classmethod
    def _installed(cls, uses: str) -> str:
        if uses not in base.names():
            raise ValueError(f"no pipeline {uses!r} is installed; {did_you_mean(uses, base.names())}")
        return uses


def _conditions(value: object) -> Mapping[str, Condition]:
    """The rules of a route, each checked against its attribute; names every wrong one."""
    if not isinstance(value, Mapping):
        raise ValueError("conditions are written as KEYWORD: value, e.g. {Modality: CT}")
    made: dict[str, Condition] = {}
    problems: list[tuple[strict_yaml.Location, str]] = []
    for keyword, condition in value.items():
        try:
            made[keyword] = conditions.parse(keyword, condition)
        except conditions.ConditionError as problem:
            problems.append(((keyword, *problem.where), problem.reason))
    refuse("when", problems)
    return made


class Route(Section):
    """Which objects go which way; routes are tried in the order of the file."""

    name: Name
    when: Annotated[Mapping[str, Condition], PlainValidator(_conditions)] = Field(default_factory=dict)
    """DICOM keyword → condition; all must be met. Empty: everything."""
    action: Literal["pipeline", "forward", "ignore"]
    """In the file it may be left out where `pipeline` is given."""
    pipeline: Text | None = None
    send_to: tuple[Text, ...] = ()
    originals_to: tuple[Text, ...] = ()
    """Destinations that get the originals at once, as they arrive, whatever becomes of the denoising."""
    priority: Annotated[int, Strict(), Field(ge=1, le=100)] = 10
    """1 is the most urgent."""
    continue_: Flag = Field(default=False, alias="continue")
    """After a match, try the later routes too."""

    @model_validator(mode="before")
    @classmethod
    def _action_of_pipeline(cls, data: Any) -> Any:
        if isinstance(data, dict) and "action" not in data and data.get("pipeline") is not None:
            return {**data, "action": "pipeline"}
        return data

    @model_validator(mode="after")
    def _consistent(self) -> Route:
        problems: list[tuple[strict_yaml.Location, str]] = []
        if self.action == "pipeline" and self.pipeline is None:
            problems.append((("action",), "action pipeline needs the name of one; add pipeline: NAME"))
        if self.action != "pipeline" and self.pipeline is not None:
            problems.append((("action",), f"action {self.action} runs no pipeline; remove one of the two lines"))
        if self.action != "ignore" and not self.send_to:
            problems.append(
                (("send_to",), f"a route with the action {self.action} needs a destination; add send_to: [NAME]")
            )
        for key in ("send_to", "originals_to"):
            names: tuple[str, ...] = getattr(self, key)
            if self.action == "ignore" and names:
                problems.append(((key,), f"a route that ignores sends nothing; remove {key}, or write action: forward"))
            for position, name in enumerate(names):
                if name in names[:position]:
                    problems.append(((key, position), f"{name} is named twice; remove one"))
        twice = sorted(set(self.send_to) & set(self.originals_to)) if self.action == "forward" else []
        if twice:
            problems.append(
                (("originals_to",), f"{', '.join(twice)} would get each object twice; remove it here or in send_to")
            )
        refuse("Route", problems)
        return self


class Config(Section):
    """Everything a site decides."""

    node: Node = Field(default_factory=Node)
    reception: Reception = Field(default_factory=Reception)
    tls: TlsIn | None = None
    assembly: Assembly = Field(default_factory=Assembly)
    compute: Compute = Field(default_factory=Compute)
    delivery: Delivery = Field(default_factory=Delivery)
    derivation: Derivation = Field(default_factory=Derivation)
    destinations: Mapping[Name, Destination] = Field(default_factory=dict)
    pipelines: Mapping[Name, PipelineOptions] = Field(default_factory=dict, validate_default=True)
    """By name: every installed pipeline, with the site's settings or the defaults, and the site's own names."""
    routes: tuple[Route, ...] = ()

    @field_validator("pipelines", mode="before")
    @classmethod
    def _with_installed(cls, value: Any) -> Any:
        if not isinstance(value, Mapping):
            return value
        named = {
            name: {"uses": name} | (given or {}) if given is None or isinstance(given, dict) else given
            for name, given in value.items()
        }
        # Not validated: to look up twenty names among all installed packages takes longer than all else here.
        return {name: PipelineOptions.model_construct(uses=name) for name in base.names()} | named

    @field_validator("pipelines")
    @classmethod
    def _installed_keep_their_names(cls, pipelines: Mapping[str, PipelineOptions]) -> Mapping[str, PipelineOptions]:
        installed = base.names()
        refuse(
            "pipelines",
            [
                (
                    (name, "uses"),
                    f"{name} is the name of an installed pipeline; choose another for one that uses {options.uses}",
                )
                for name, options in pipelines.items()
                if name in installed and options.uses != name
            ],
        )
        return pipelines

    @model_validator(mode="after")
    def _fits_together(self) -> Config:
        problems = _mismatches(dict(enumerate(self.routes)), self.destinations, self.pipelines)
        for name, destination in self.destinations.items():
            if (destination.host, destination.port) == (self.node.address, self.node.port):
                problems.append((("destinations", name), "this is the node itself; write the address of the PACS"))
        refuse("Config", problems + self.reception.open_doors(self.node.address))
        return self


def _mismatches(
    routes: Mapping[int, Route], destinations: Mapping[str, object], pipelines: Mapping[str, object]
) -> list[tuple[strict_yaml.Location, str]]:
    """What is wrong with `routes` (by position) among themselves and with the names they use."""
    problems: list[tuple[strict_yaml.Location, str]] = []
    first: dict[str, int] = {}
    catches_all: str | None = None
    for position, route in routes.items():
        at = ("routes", position)
        if route.name in first:
            problems.append(((*at, "name"), f"a route {route.name!r} is there already; give each its own name"))
        first.setdefault(route.name, position)
        if catches_all is not None:
            problems.append(
                (at, f"never reached, because route {catches_all} before it takes everything; change the order")
            )
        if not route.when and not route.continue_:
            catches_all = catches_all or route.name
        for key in ("send_to", "originals_to"):
            for place, name in enumerate(getattr(route, key)):
                if name not in destinations:
                    problems.append(((*at, key, place), f"no destination {name!r}; {did_you_mean(name, destinations)}"))
        if route.pipeline is not None and route.pipeline not in pipelines:
            problems.append(
                ((*at, "pipeline"), f"no pipeline {route.pipeline!r}; {did_you_mean(route.pipeline, pipelines)}")
            )
    return problems


def load(path: Path) -> Config:
    """Read and check the configuration file at `path`.

    Raises
    ------
    ConfigError
        With a line ``FILE:LINE: where.it.is: reason; what to do`` for every error that can be seen. (What depends on a
        value that is itself wrong is seen once that is right.)
    """
    try:
        with path.open("rb") as file:
            data = file.read(strict_yaml.MAX_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}; check the path and the permissions") from error
    try:
        document = strict_yaml.parse(data)
    except strict_yaml.YamlError as error:
        raise ConfigError(*(f"{path.name}:{problem.line}: {problem.reason}" for problem in error.problems)) from error
    if not isinstance(document.value, dict):
        raise ConfigError(f"{path.name}:1: not a configuration; it begins with a section, e.g. node:")
    # A section whose lines are all commented out is read as nothing and has its defaults.
    raw = {"node": {}} | {key: value for key, value in document.value.items() if value is not None}
    try:
        return Config.model_validate(raw, context={FOLDER: path.resolve().parent}, by_alias=True, by_name=False)
    except ValidationError as error:
        problems = [(tuple(detail["loc"]), in_words(detail, _known_keys(detail["loc"]))) for detail in error.errors()]
        problems += [problem for problem in _mismatches_of_the_valid(raw) if problem not in problems]
        lines = [(document.line(at), f"{where(at, raw)}: {reason}") for at, reason in problems]
        raise ConfigError(*(f"{path.name}:{line}: {text}" for line, text in sorted(lines))) from error


def _mismatches_of_the_valid(raw: Mapping[str, Any]) -> list[tuple[strict_yaml.Location, str]]:
    """`_mismatches` of those routes in the file that are valid by themselves."""
    routes: dict[int, Route] = {}
    listed = raw.get("routes")
    for position, route in enumerate(listed if isinstance(listed, list) else ()):
        try:
            routes[position] = Route.model_validate(route, by_alias=True, by_name=False)
        except ValidationError:
            continue  # reported already: the whole file was validated first
    destinations, pipelines = (
        names if isinstance(names := raw.get(key), dict) else {} for key in ("destinations", "pipelines")
    )
    return _mismatches(routes, destinations, pipelines | dict.fromkeys(base.names()))


_SECTIONS: dict[str, type[Section]] = {
    "node": Node,
    "reception": Reception,
    "tls": TlsIn,
    "assembly": Assembly,
    "compute": Compute,
    "delivery": Delivery,
    "derivation": Derivation,
    "destinations": Destination,
    "pipelines": PipelineOptions,
    "routes": Route,
}


def _known_keys(at: strict_yaml.Location) -> list[str]:
    """Keys that may stand beside the one at `at`, as the file spells them."""
    section = Config if len(at) == 1 else _SECTIONS.get(str(at[0]))
    if section is Destination and "tls" in at[2:-1]:
        section = TlsOut
    return [field.alias or name for name, field in section.model_fields.items()] if section else []
