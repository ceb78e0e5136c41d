"""Certificates for tests, made by openssl: an authority, what it signs, and a stranger."""

from __future__ import annotations

import subprocess
from dataclasses import dataclass
from pathlib import Path


def _openssl(folder: Path, *arguments: str) -> None:
    subprocess.run(["openssl", *arguments], cwd=folder, check=True, capture_output=True, timeout=60)


@dataclass(frozen=True, slots=True)
class Certificates:
    """A folder with ``ca.pem``, and NAME.pem and NAME.key for each name that was made."""

    folder: Path

    @classmethod
    def made(cls, folder: Path) -> Certificates:
        """An authority; what it signs are ``node``, ``pacs`` and ``ct1``, all for 127.0.0.1. And a ``stranger``."""
        folder.mkdir()
        _openssl(folder, *_request("ca"), "-x509", "-days", "3650")
        _openssl(folder, *_request("stranger"), "-x509", "-days", "3650", "-addext", "subjectAltName=IP:127.0.0.1")
        (folder / "names").write_text("subjectAltName=IP:127.0.0.1,DNS:pacs.hospital\n")
        for name in ("node", "pacs", "ct1"):
            _openssl(folder, *_request(name)[:-2], "-out", f"{name}.csr")
            signing = ["-CA", "ca.pem", "-CAkey", "ca.key", "-CAcreateserial", "-extfile", "names", "-days", "3650"]
            _openssl(folder, "x509", "-req", "-in", f"{name}.csr", *signing, "-out", f"{name}.pem")
        return cls(folder)

    @property
    def authority(self) -> Path:
        return self.folder / "ca.pem"

    def pair(self, name: str) -> dict[str, str]:
        """As the configuration names them."""
        return {"certificate_file": str(self.certificate(name)), "key_file": str(self.key(name))}

    def certificate(self, name: str) -> Path:
        return self.folder / f"{name}.pem"

    def key(self, name: str) -> Path:
        return self.folder / f"{name}.key"

    def dcmtk(self, name: str) -> list[str]:
        """Options of DCMTK's programs."""
        return ["+tls", str(self.key(name)), str(self.certificate(name)), "+cf", str(self.authority)]


def _request(name: str) -> list[str]:
    return [
        *("req", "-newkey", "rsa:2048", "-nodes", "-subj", f"/O=hospital/CN={name}.hospital"),
        *("-keyout", f"{name}.key", "-out", f"{name}.pem"),
    ]
