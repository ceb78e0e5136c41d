"""TLS in the configuration. Every file that is named is opened: what is wrong with it is said before the start."""

from __future__ import annotations

import ssl
from collections.abc import Mapping
from pathlib import Path
from typing import Self

from pydantic import Field, ValidationInfo, field_validator, model_validator

from dicomnode import tls
from dicomnode.config_fields import AETitle, FilePath, Host, Text
from dicomnode.config_section import FOLDER, Section, refuse


class _TlsFiles(Section):
    """Files of a TLS section, relative to the folder of the configuration file; each was opened and found good."""

    @field_validator("ca_file", "client_ca_file", "certificate_file", "key_file", check_fields=False)
    @classmethod
    def _absolute(cls, path: Path | None, info: ValidationInfo) -> Path | None:
        folder: Path | None = (info.context or {}).get(FOLDER)
        return folder / path if folder and path else path

    @model_validator(mode="after")
    def _usable(self) -> Self:
        try:
            self.context()
        except tls.TlsFileError as error:
            refuse("Tls", [((error.key,), str(error))])
        return self

    def context(self) -> ssl.SSLContext:
        """Settings of TLS made of the files as they are now.

        Raises
        ------
        tls.TlsFileError
        """
        raise NotImplementedError


class TlsOut(_TlsFiles):
    """TLS for the connections to a destination."""

    ca_file: FilePath
    """PEM: who vouches for the destination's certificate, or that certificate itself."""
    certificate_file: FilePath | None = None
    key_file: FilePath | None = None
    name: Host | None = None
    """Name in the destination's certificate; None: its host."""

    def context(self) -> ssl.SSLContext:
        return tls.client_context(self.ca_file, self.certificate_file, self.key_file)


class TlsIn(_TlsFiles):
    """TLS for all connections to the node's port."""

    certificate_file: FilePath
    key_file: FilePath
    client_ca_file: FilePath | None = None
    """PEM: who vouches for the certificates that senders must show; None: they need none."""
    subjects: Mapping[AETitle, Text] = Field(default_factory=dict)
    """Calling AE title → common name in the certificate that its sender must show."""

    @field_validator("subjects")
    @classmethod
    def _certificates_are_shown(cls, subjects: Mapping[str, str], info: ValidationInfo) -> Mapping[str, str]:
        if subjects and info.data.get("client_ca_file") is None:
            raise ValueError("senders show no certificates without client_ca_file; add it")
        return subjects

    def context(self) -> ssl.SSLContext:
        return tls.server_context(self.certificate_file, self.key_file, self.client_ca_file)
