"""What the documents promise is there: commands, keys, files, and the tables of the conformance statement."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping
from importlib.metadata import distribution
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml
from packaging.requirements import Requirement
from pynetdicom import AllStoragePresentationContexts

from dicomnode import commitment, config, requestor, scp
from dicomnode.answers import Verdict, judge, judge_commitment
from dicomnode.cli import main
from dicomnode.config_section import Section
from dicomnode.db import JobState
from dicomnode.spool import IMPLEMENTATION_CLASS_UID, IMPLEMENTATION_VERSION_NAME
from pipelines.base import Execution
from pipelines.testing import check_pipeline

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
CONFORMANCE = (ROOT / "docs" / "conformance.md").read_text(encoding="utf-8")
OPERATIONS = (ROOT / "docs" / "operations.md").read_text(encoding="utf-8")
PIPELINES = (ROOT / "docs" / "pipelines.md").read_text(encoding="utf-8")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]


def table(text: str, heading: str) -> list[list[str]]:
    """Rows of the table whose first column has this heading, cells without markup of code."""
    _, found, rest = text.partition(f"\n| {heading} |")
    assert found, f"no table {heading!r}"
    lines = rest.partition("\n\n")[0].splitlines()[2:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def code_of(page: Path) -> str:
    """What a page sets as code, in blocks and within lines; one piece a line, comments left out."""
    text = page.read_text(encoding="utf-8")
    blocks = re.findall(r"```\w*\n(.*?)```", text, re.DOTALL)
    rest = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    lines = [line.partition("#")[0].strip() for line in "\n".join([*blocks, *codes(rest)]).splitlines()]
    return "\n".join(lines)


def codes(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


def test_transfer_syntaxes_and_their_order_are_those_of_the_scp() -> None:
    assert [codes(row[1])[0] for row in table(CONFORMANCE, "transfer syntax")] == [
        str(syntax) for syntax in scp.transfer_syntaxes()
    ]


def test_sop_classes_are_those_of_the_scp() -> None:
    assert [codes(row[1])[0] for row in table(CONFORMANCE, "SOP class")] == [
        str(context.abstract_syntax) for context in AllStoragePresentationContexts
    ]


def test_numbers_that_identify_and_limit_the_node() -> None:
    for fact in (
        IMPLEMENTATION_CLASS_UID,
        IMPLEMENTATION_VERSION_NAME,
        f"{scp.MAX_PDU_BYTES} bytes as acceptor",
        f"{requestor.MAX_RECEIVED_PDU} bytes as initiator",
        f"{config.Reception().max_associations} at once",
        f"{config.Reception().max_associations_per_peer} from one address",
    ):
        assert fact in CONFORMANCE


def test_statuses_as_scp() -> None:
    answers = CONFORMANCE.partition("C-STORE answers:")[2]
    assert {int(codes(row[0])[0], 16) for row in table(answers, "status")} == {
        scp.SUCCESS,
        scp.OUT_OF_RESOURCES,
        scp.DOES_NOT_MATCH,
        scp.CANNOT_UNDERSTAND,
        scp.PROCESSING_FAILURE,
        scp.DUPLICATE,
    }


def test_statuses_as_scu() -> None:
    meanings = {
        "accepted": (Verdict.ACCEPTED, Verdict.ACCEPTED),
        "accepted if an earlier request": (Verdict.ACCEPTED, Verdict.REFUSED),
        "refused": (Verdict.REFUSED, Verdict.REFUSED),
        "sent again later": (Verdict.LATER, Verdict.LATER),
        "sent again, at most": (Verdict.COUNTED, Verdict.COUNTED),
    }
    rows = table(CONFORMANCE, "status")
    assert len(rows) == len(meanings)
    for row in rows:
        expected = meanings[max((start for start in meanings if row[1].startswith(start)), key=len)]
        for code in codes(row[0]):
            for digit in "059bf":
                status = int(code.replace("x", digit), 16)
                assert tuple(judge(status, unanswered_before=before) for before in (True, False)) == expected, code
    assert judge(0x1234, unanswered_before=False) is Verdict.COUNTED  # "all others"


def test_reasons_of_failed_commitments() -> None:
    meanings = {"refused": Verdict.REFUSED, "sent again and asked for": Verdict.LATER, "the same": Verdict.COUNTED}
    rows = [row for row in table(CONFORMANCE, "what the destination says") if row[0].startswith("instance failed")]
    found = {
        verdict: [int(code, 16) for code in codes(row[0])]
        for row in rows
        for start, verdict in meanings.items()
        if row[1].startswith(start)
    }
    assert found == {Verdict.REFUSED: [0x0119, 0x0122], Verdict.LATER: [0x0213], Verdict.COUNTED: []}
    for reason in range(0x10000):
        named = [verdict for verdict, reasons in found.items() if reason in reasons]
        assert judge_commitment(reason) is (named[0] if named else Verdict.COUNTED)


def test_statuses_of_reports() -> None:
    answers = CONFORMANCE.partition("N-EVENT-REPORT answers")[2]
    assert {int(codes(row[0])[0], 16) for row in table(answers, "status")} == {
        commitment.SUCCESS,
        commitment.NO_SUCH_EVENT_TYPE,
        commitment.INVALID_ARGUMENT_VALUE,
        commitment.PROCESSING_FAILURE,
    }


def test_every_job_state_is_explained() -> None:
    assert {row[0] for row in table(OPERATIONS, "state")} == {state.value for state in JobState}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_exist(page: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = code_of(page)
    commands = set(re.findall(r"dicomnode ((?:jobs )?[a-z][a-z-]+)(?=[ ,]|$)", text, re.MULTILINE))
    assert commands or page.name not in ("README.md", "operations.md")
    for command in commands:
        with pytest.raises(SystemExit) as ended:
            main([*command.split(), "--help"])
        assert ended.value.code == 0, command
    capsys.readouterr()
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target, variable in re.findall(r"^make (\w+)(?: (\w+)=)?", text, re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
        assert not variable or re.search(rf"^{variable} +\?=", makefile, re.MULTILINE), variable


def test_the_commands_of_the_readme_are_all_there_are(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in ([], ["jobs"]):
        with pytest.raises(SystemExit):
            main([*arguments, "--help"])
        for command in re.findall(r"^    ([a-z-]+) ", capsys.readouterr().out, re.MULTILINE):
            assert f"`{command}`" in README or f"`dicomnode {command}`" in README, command


def known_keys(model: type[Section], above: str = "") -> set[str]:
    """``section.key`` of every field, and ``section.*.key`` below names that a site chooses."""
    found = set()
    for name, field in model.model_fields.items():
        found.add(f"{above}{name}")
        for inner in get_args(field.annotation) or (field.annotation,):  # TlsIn | None
            if isinstance(inner, type) and issubclass(inner, Section):
                found |= known_keys(inner, f"{above}{name}{'.*' if name == 'destinations' else ''}.")
    return found


KEYS = known_keys(config.Config)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_configuration_keys_exist(page: Path) -> None:
    sections = "|".join(set(config.Config.model_fields) - {"pipelines"})  # pipelines.NAME are modules
    named = re.findall(rf"`((?:{sections})\.[a-z0-9_.*]+)(?::[^`]*)?`", page.read_text(encoding="utf-8"))
    assert set(named) <= KEYS
    if page.name in ("README.md", "operations.md", "conformance.md"):
        assert named


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text(encoding="utf-8")):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), target


def test_commands_for_the_installed_node_name_its_configuration_and_its_user() -> None:
    """With another ``config.yaml`` they would look at another database, as another user at none."""
    for page in (ROOT / "README.md", ROOT / "docs" / "operations.md"):
        lines = [
            line for line in code_of(page).splitlines() if re.search(r"dicomnode (jobs \w+ |echo|send|denoise )", line)
        ]
        assert len(lines) >= 3
        for line in lines:
            assert line.endswith("--config /etc/dicomnode/config.yaml"), line
            assert line.startswith("sudo -u dicomnode ") or "dicomnode jobs" not in line, line


def test_every_document_is_about_the_project_alone() -> None:
    for page in PAGES:
        assert not re.search(r"\bissue \d", page.read_text(encoding="utf-8")), page.name


def test_the_example_pipeline_keeps_the_contract() -> None:
    (code,) = re.findall(r"```python\n# hospital_denoise\.py\n(.*?)```", PIPELINES, re.DOTALL)
    namespace: dict[str, Any] = {}
    exec(code, namespace)  # noqa: S102 - our own document
    check_pipeline(namespace["Median"](Execution()))


def test_the_example_route_is_valid() -> None:
    (route,) = yaml.safe_load(re.findall(r"```yaml\n(.*?)```", PIPELINES, re.DOTALL)[0])["routes"]
    assert isinstance(route, Mapping)
    made = config.Route.model_validate(route)
    assert made.pipeline == "hospital-median"
    assert made.action == "pipeline"


def test_the_service_runs_a_command_that_exists() -> None:
    unit = (ROOT / "docs" / "dicomnode.service").read_text(encoding="utf-8")
    (start,) = re.findall(r"^ExecStart=(.+)$", unit, re.MULTILINE)
    assert start.split()[0].endswith("/bin/dicomnode")
    assert start.split()[1:] == ["run", "--config", "/etc/dicomnode/config.yaml"]
    assert "/etc/dicomnode/config.yaml" in README


def test_a_site_installs_no_more_than_the_readme_says() -> None:
    """Sum of the files of what a node needs to run, and of itself; what else an environment holds (pip) is a tenth."""
    wanted = [Requirement(one) for one in PROJECT["project"]["dependencies"]]
    needed: dict[str, float] = {}
    while wanted:
        one = wanted.pop()
        if one.name in needed or (one.marker is not None and not one.marker.evaluate({"extra": ""})):
            continue
        installed = distribution(one.name)
        files = [Path(str(installed.locate_file(file))) for file in installed.files or []]
        needed[one.name] = sum(file.stat().st_size for file in files if file.exists()) / 1e6
        wanted += map(Requirement, installed.requires or [])
    assert not {"torch", "nncf", "scipy", "scikit-image"} & {name.lower() for name in needed}
    assert {"torch"} == {Requirement(one).name for one in PROJECT["project"]["optional-dependencies"]["gpu"]}
    packages = ("dicomnode", "pipelines", "training", "demo")
    own = sum(file.stat().st_size for name in packages for file in (ROOT / name).rglob("*") if file.is_file()) / 1e6
    (printed,) = re.findall(r"pip install \. +# (\d+) MB with everything; no PyTorch", README)
    assert 0.85 * float(printed) < sum(needed.values()) + own < 1.05 * float(printed)


def test_the_picture_is_small_enough_to_load() -> None:
    assert 20_000 < (ROOT / "docs" / "images" / "demo.jpg").stat().st_size < 400_000
