"""What every test may use: the real CT series, where they are to be had, and the peers."""

from __future__ import annotations

import os
import shutil
import tarfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import sqlalchemy as sa
from certificates import Certificates
from child import requests
from ct_builder import phantom, write_series
from node_process import PLUGINS, NodeProcess
from oracle import StorageOracle
from sender import COUNT, Sender
from small_disk import require_small_disks
from tables import database_in

from dicomnode.worker import Request, Worker

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
"""Real CT beside the checkout; never part of the repository."""


def require_peer(*programs: str) -> None:
    """Skip (fail, when CI is set) unless these programs are installed."""
    missing = [program for program in programs if shutil.which(program) is None]
    if missing:
        reason = f"{', '.join(missing)} not installed (Debian packages orthanc, dcmtk, dicom3tools)"
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)


@pytest.fixture(scope="session")
def ct_series(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], list[Path]]:
    """Files of one real series by name, unpacked once for all testers, who only read them; skips without the data."""
    base = tmp_path_factory.getbasetemp()
    root = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "ct"

    def files(name: str) -> list[Path]:
        archive = DATA / "series" / f"{name}.tar.xz"
        if not archive.exists():
            pytest.skip(f"real CT series {name} is not here")
        if not (root / name).exists():
            unpacked = tmp_path_factory.mktemp("unpacked")
            with tarfile.open(archive) as tar:
                tar.extraction_filter = getattr(tarfile, "data_filter", None)  # Debian 12's Python 3.11.2 has none
                tar.extractall(unpacked)
            root.mkdir(exist_ok=True)
            with suppress(OSError):  # another tester was first
                (unpacked / name).rename(root / name)
        return sorted((root / name).rglob("*.dcm"))

    return files


@pytest.fixture(scope="session")
def odd_dir() -> Path:
    """Folder of single odd DICOM files; skips without the data."""
    if not (DATA / "odd").exists():
        pytest.skip("odd DICOM files are not here")
    return DATA / "odd"


# what several modules about jobs and deliveries stand on


@pytest.fixture
def database(tmp_path: Path) -> sa.Engine:
    """Empty tables."""
    return database_in(tmp_path)


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> sa.Engine:
    """Tables for `connection`, made once."""
    return database_in(tmp_path_factory.mktemp("shared"))


@pytest.fixture
def connection(shared: sa.Engine) -> Iterator[sa.Connection]:
    """In a transaction that is rolled back: every test finds empty tables."""
    with shared.connect() as made:
        yield made
        made.rollback()


@pytest.fixture(scope="session")
def sent_series(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Files of `COUNT` slices."""
    return write_series(tmp_path_factory.mktemp("sent"), phantom(COUNT, 16))


@pytest.fixture
def oracle() -> Iterator[StorageOracle]:
    """A storage SCP that does as it is told."""
    with StorageOracle() as made:
        yield made


@pytest.fixture(scope="module")
def pacs() -> Iterator[StorageOracle]:
    """The destination of `node`."""
    with StorageOracle(ae_title="PACS") as made:
        yield made


@pytest.fixture(scope="module")
def node(
    tmp_path_factory: pytest.TempPathFactory, pacs: StorageOracle, request: pytest.FixtureRequest
) -> Iterator[NodeProcess]:
    """One node for all tests of a file, configured by its `SETTINGS`."""
    with NodeProcess(tmp_path_factory.mktemp("node"), pacs.port, request.module.SETTINGS) as made:
        yield made


@pytest.fixture
def sender(database: sa.Engine, sent_series: list[Path], oracle: StorageOracle) -> Sender:
    """Delivers the series to the oracle."""
    return Sender(database, sent_series, {"pacs": oracle.port})


@pytest.fixture(scope="session")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    """Of an authority, those whom it knows, and a stranger."""
    require_peer("openssl")
    return Certificates.made(tmp_path_factory.mktemp("tls") / "certificates")


@pytest.fixture(scope="session")
def small_disks(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Skips where no small disk can be mounted; a failure with CI set."""
    require_small_disks(tmp_path_factory.mktemp("probe"))


@pytest.fixture
def controls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Folder through which the pipelines of tests/plugins are steered in a compute child."""
    monkeypatch.setenv("PYTHONPATH", str(PLUGINS))
    monkeypatch.setenv("TEST_PIPELINES", str(tmp_path))
    return tmp_path


@pytest.fixture
def worker(controls: Path) -> Iterator[Worker]:
    """A compute child of one thread, with those pipelines."""
    made = Worker(1)
    yield made
    made.stop()


@pytest.fixture(scope="module")
def worker_files(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The series of `request_for`."""
    return write_series(tmp_path_factory.mktemp("ct"), phantom(6, 64))


@pytest.fixture
def request_for(worker_files: list[Path], tmp_path: Path) -> Callable[..., Request]:
    """A maker of requests to denoise a small series."""
    return requests(worker_files, tmp_path)
