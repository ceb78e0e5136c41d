"""TLS 1.2 and 1.3 as PS3.15 B.12 asks (the BCP 195 profile): contexts made of files, and what is wrong with the files.

Ciphers and curves are those that the installed OpenSSL recommends. Nothing here touches a network.
"""

from __future__ import annotations

import ssl
from pathlib import Path
from typing import Any

_NOT_TLS = frozenset({"WRONG_VERSION_NUMBER", "HTTP_REQUEST"})
"""What OpenSSL says of bytes that begin no TLS record."""


class TlsFileError(ValueError):
    """A file cannot be used; `key` is the setting that names it."""

    def __init__(self, key: str, reason: str) -> None:
        super().__init__(reason)
        self.key = key


def client_context(ca_file: Path, certificate_file: Path | None, key_file: Path | None) -> ssl.SSLContext:
    """For connections to a peer whose certificate, and host name in it, `ca_file` vouches for.

    Parameters
    ----------
    ca_file
        PEM: certificates of authorities, or the peer's own if nobody signed it.
    certificate_file, key_file
        PEM: what the node shows of itself, if the peer wants to see it.

    Raises
    ------
    TlsFileError
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    _trust(context, "ca_file", ca_file)
    if certificate_file is not None and key_file is not None:
        _show(context, certificate_file, key_file)
    elif certificate_file is not None or key_file is not None:
        missing = "certificate_file" if certificate_file is None else "key_file"
        raise TlsFileError(missing, "a certificate and its key belong together; write certificate_file and key_file")
    return _modern(context)


def server_context(certificate_file: Path, key_file: Path, client_ca_file: Path | None) -> ssl.SSLContext:
    """For connections that peers open; with `client_ca_file` they must show a certificate that it vouches for.

    Raises
    ------
    TlsFileError
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    _show(context, certificate_file, key_file)
    if client_ca_file is not None:
        _trust(context, "client_ca_file", client_ca_file)
        context.verify_mode = ssl.CERT_REQUIRED
    return _modern(context)


def common_name(connection: ssl.SSLSocket) -> str | None:
    """Common name in the subject of the certificate that the peer has shown and that was verified."""
    shown = connection.getpeercert() or {}
    subject: Any = shown.get("subject", ())
    names = [str(value) for part in subject for kind, value in part if kind == "commonName"]
    return names[0] if names else None


def in_words(error: ssl.SSLError) -> str:
    """Why TLS failed."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"its certificate is not accepted: {error.verify_message}"
    reason = error.reason or "no reason given"
    if reason in _NOT_TLS:
        return f"TLS failed: {reason}; it does not speak TLS"
    return f"TLS failed: {reason}"


def _modern(context: ssl.SSLContext) -> ssl.SSLContext:
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    return context


def _trust(context: ssl.SSLContext, key: str, ca_file: Path) -> None:
    _readable(key, ca_file)
    try:
        context.load_verify_locations(ca_file)
    except ssl.SSLError:
        raise TlsFileError(key, f"{ca_file} holds no certificate that can be read; it must be PEM") from None


def _show(context: ssl.SSLContext, certificate_file: Path, key_file: Path) -> None:
    _readable("certificate_file", certificate_file)
    _readable("key_file", key_file)
    try:
        # A key with a pass phrase is refused; without this OpenSSL would ask for it at the terminal.
        context.load_cert_chain(certificate_file, key_file, password=lambda: "")
    except ssl.SSLError as error:
        if error.reason == "KEY_VALUES_MISMATCH":
            why = f"{key_file} is not the key of the certificate in {certificate_file}"
            raise TlsFileError("key_file", why) from None
        try:
            ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(certificate_file)
        except ssl.SSLError:
            why = f"{certificate_file} holds no certificate that can be read; it must be PEM"
            raise TlsFileError("certificate_file", why) from None
        raise TlsFileError(
            "key_file", f"{key_file} holds no private key that can be read; it must be PEM, without a pass phrase"
        ) from None


def _readable(key: str, path: Path) -> None:
    try:
        with path.open("rb"):
            pass
    except OSError as error:
        why = f"{path} cannot be read: {error.strerror}; check the path and the permissions"
        raise TlsFileError(key, why) from error
