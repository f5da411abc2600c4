"""TLS of both ports, from the files that the settings name.

Rule of this module: what cannot serve is refused at the start, by the file's name; of what is in a key nothing is said.
"""

from __future__ import annotations

import ssl
from pathlib import Path
from typing import NamedTuple

import grpc

from flyball_server.core.errors import Invalid


class Tls(NamedTuple):
    """Files (PEM): the certificate and those that vouch for it, its key, and, where clients must show a certificate as
    well, those that may vouch for theirs ("": none need to)."""

    cert: str
    key: str
    client_ca: str

    def uvicorn(self) -> dict[str, object]:
        """The options of uvicorn.Config."""
        required = ssl.CERT_REQUIRED if self.client_ca else ssl.CERT_NONE
        return {
            "ssl_certfile": self.cert,
            "ssl_keyfile": self.key,
            "ssl_ca_certs": self.client_ca or None,
            "ssl_cert_reqs": required,
        }

    def grpc(self) -> grpc.ServerCredentials:
        """The same for gRPC."""
        return grpc.ssl_server_credentials(
            [(_read("tls_key", self.key), _read("tls_cert", self.cert))],
            root_certificates=_read("tls_client_ca", self.client_ca) if self.client_ca else None,
            require_client_auth=bool(self.client_ca),
        )


def open_tls(cert: str, key: str, client_ca: str) -> Tls | None:
    """TLS as the settings say; None without a certificate. Raises Invalid where a file is not what it should be."""
    if not cert:
        return None
    for name, path in (("tls_cert", cert), ("tls_key", key), ("tls_client_ca", client_ca)):
        if path:
            _read(name, path)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        # A key with a password would have OpenSSL ask for it on the terminal.
        context.load_cert_chain(cert, key, password=lambda: b"")
    except (ssl.SSLError, ValueError) as error:
        raise Invalid(
            f"tls_cert {cert} and tls_key {key} are no certificate and its key ({_said(error)}): give PEM files, the "
            "key without a password"
        ) from None
    if client_ca:
        try:
            context.load_verify_locations(client_ca)
        except ssl.SSLError as error:
            raise Invalid(f"tls_client_ca {client_ca} holds no certificate ({_said(error)}): give a PEM file") from None
    return Tls(cert, key, client_ca)


def _said(error: Exception) -> str:
    return (error.reason if isinstance(error, ssl.SSLError) else "") or type(error).__name__


def _read(name: str, path: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise Invalid(f"{name} {path} cannot be read ({error.strerror}): name another file") from None
