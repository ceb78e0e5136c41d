"""TLS in the configuration: what is wrong with a file, or missing, is said before the start."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest
from certificates import Certificates
from pydantic import ValidationError

from dicomnode.cli import main
from dicomnode.config import load
from dicomnode.config_tls import TlsIn, TlsOut


def encrypted_key(certificates: Certificates, folder: Path) -> Path:
    path = folder / "encrypted.key"
    command = ["openssl", "rsa", "-aes256", "-passout", "pass:secret", "-in", str(certificates.key("node"))]
    subprocess.run([*command, "-out", str(path)], check=True, capture_output=True, timeout=60)
    return path


@pytest.mark.parametrize(
    ("wrong", "key", "words"),
    [
        ("missing", "key_file", "cannot be read: No such file or directory"),
        ("another's", "key_file", "is not the key of the certificate in"),
        ("no key", "key_file", "holds no private key that can be read"),
        ("encrypted", "key_file", "without a pass phrase"),
        ("no certificate", "certificate_file", "holds no certificate that can be read"),
        ("no authority", "client_ca_file", "holds no certificate that can be read"),
    ],
)
def test_what_is_wrong_with_a_file_is_said_before_the_start(
    certificates: Certificates, tmp_path: Path, capsys: pytest.CaptureFixture[str], wrong: str, key: str, words: str
) -> None:
    garbage = tmp_path / "garbage.pem"
    garbage.write_text("no PEM\n")
    chosen = {
        "missing": tmp_path / "missing.key",
        "another's": certificates.key("pacs"),
        "no key": garbage,
        "encrypted": encrypted_key(certificates, tmp_path) if wrong == "encrypted" else garbage,
        "no certificate": garbage,
        "no authority": garbage,
    }[wrong]
    settings = {**certificates.pair("node"), key: str(chosen)}
    for section, at in ((["tls:"], "tls"), (["destinations:", " pacs:", "  tls:"], "destinations.pacs.tls")):
        if at != "tls":
            settings = {k.removeprefix("client_"): v for k, v in settings.items()}
            settings.setdefault("ca_file", str(certificates.authority))
            key = key.removeprefix("client_")
        indent = " " * len(section)
        config = tmp_path / "config.yaml"
        entries = [f"{indent}{name}: {value}" for name, value in settings.items()]
        beside = [] if at == "tls" else ["  ae_title: PACS", "  host: pacs.hospital", "  port: 104"]
        config.write_text("\n".join([*section, *entries, *beside]) + "\n")
        assert main(["check-config", "--config", str(config)]) == 2
        line = next(
            n for n, text in enumerate(config.read_text().splitlines(), 1) if text.strip().startswith(f"{key}:")
        )
        (told,) = capsys.readouterr().err.splitlines()
        assert told.startswith(f"config.yaml:{line}: {at}.{key}: {chosen}"), told
        assert words in told


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"certificate_file": None}, "a certificate and its key belong together"),
        ({"key_file": None}, "a certificate and its key belong together"),
    ],
)
def test_a_certificate_has_a_key(certificates: Certificates, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        TlsOut.model_validate({"ca_file": str(certificates.authority), **certificates.pair("node"), **changes})


def test_subjects_need_certificates(certificates: Certificates) -> None:
    with pytest.raises(ValidationError, match="client_ca_file"):
        TlsIn.model_validate({**certificates.pair("node"), "subjects": {"CT1": "ct1.hospital"}})


def test_paths_count_from_the_folder_of_the_file(certificates: Certificates) -> None:
    config = certificates.folder / "config.yaml"
    config.write_text("tls: {certificate_file: node.pem, key_file: node.key, client_ca_file: ca.pem}\n")
    made = load(config).tls
    assert made is not None
    assert made.certificate_file == certificates.certificate("node")
    assert made.client_ca_file == certificates.authority
