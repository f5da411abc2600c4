"""What proves who is who on the way to the service: the bearer token, and the certificates of TLS.

Rule of this module: no message ever holds a token or a key.
"""

from __future__ import annotations

import ssl
from pathlib import Path
from typing import NamedTuple

from flyball.errors import FlyballError


class Certificates(NamedTuple):
    """Files (PEM): who vouches for the service ("": whom the machine trusts), and the certificate and key that this
    process shows ("": none)."""

    ca: str = ""
    cert: str = ""
    key: str = ""

    def context(self) -> ssl.SSLContext:
        """For HTTP. Raises FlyballError for a file that cannot be read, or holds something else."""
        self.contents()
        try:
            context = ssl.create_default_context(cafile=self.ca or None)
        except ssl.SSLError:
            raise FlyballError(f"FLYBALL_CA is {self.ca!r}, which holds no certificate: give a PEM file") from None
        if self.cert:
            try:
                # Without a password of our own OpenSSL would ask for one on the terminal.
                context.load_cert_chain(self.cert, self.key or None, password=lambda: b"")
            except (ssl.SSLError, ValueError):
                raise FlyballError(
                    f"FLYBALL_CERT {self.cert!r} and FLYBALL_KEY {self.key!r} are no certificate and its key: give PEM "
                    "files, the key without a password"
                ) from None
        return context

    def contents(self) -> tuple[bytes | None, bytes | None, bytes | None]:
        """ca, cert and key as gRPC wants them, where there are any. Raises FlyballError for one that cannot be read."""
        if self.key and not self.cert:
            raise FlyballError(f"FLYBALL_KEY is {self.key!r}, but FLYBALL_CERT is not given: give both")
        return (
            _read("FLYBALL_CA", self.ca),
            _read("FLYBALL_CERT", self.cert),
            _read("FLYBALL_KEY", self.key or self.cert),
        )


def tls_hint(scheme: str, error: object) -> str:
    """What to look at where a connection over `scheme` ended without any answer: TLS tells no more than that."""
    if not scheme.endswith("s"):
        return f"if the service speaks TLS, its address begins with {scheme}s://"
    if "CERTIFICATE_VERIFY_FAILED" in str(error):
        return "FLYBALL_CA names the file of who vouches for the service"
    return "if the service wants a certificate of yours, FLYBALL_CERT and FLYBALL_KEY name it"


def checked_token(token: str | None) -> str | None:
    """The token without the spaces and line ends around it that files and variables have; None for an empty one.

    Raises FlyballError for one that no header can carry: whoever sends that would be told of it, token and all.
    """
    token = (token or "").strip()
    if not all("!" <= character <= "~" for character in token):
        raise FlyballError("the token (token= or FLYBALL_TOKEN) holds what no token does: give it just as it was shown")
    return token or None


def _read(name: str, path: str) -> bytes | None:
    if not path:
        return None
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise FlyballError(f"{name} is {path!r}, which cannot be read ({error.strerror})") from None
