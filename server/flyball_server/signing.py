"""The service's signing key: who wrote an export.

Rule of this module: the private key leaves its file for this process and nothing else; it is neither logged nor told.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from flyball_server.core.errors import Invalid

_HOW = "`openssl genpkey -algorithm ed25519 -out FILE` makes one"


class Signer:
    """An Ed25519 key that signs."""

    def __init__(self, key: Ed25519PrivateKey) -> None:
        self._key = key
        self.public = key.public_key().public_bytes_raw()

    def sign(self, data: bytes) -> bytes:
        """The signature, 64 bytes."""
        return self._key.sign(data)


def new_signer() -> Signer:
    """A signer that lasts as long as the process."""
    return Signer(Ed25519PrivateKey.generate())


def open_signer(path: Path, *, make: bool) -> Signer:
    """The signer of a key file (PEM); `make`: a file that is not there is made, for its owner's eyes only.

    Raises Invalid where it cannot be read or made, or holds something else.
    """
    try:
        if make and not path.exists():
            _write_key(path)
        data = path.read_bytes()
    except OSError as error:
        raise Invalid(f"signing_key {path} cannot be read ({error.strerror}): name another file; {_HOW}") from error
    try:
        key = serialization.load_pem_private_key(data, password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise Invalid(f"signing_key {path} holds no private key without a password (PEM): {_HOW}") from error
    if not isinstance(key, Ed25519PrivateKey):
        raise Invalid(f"signing_key {path} holds a key of another kind than Ed25519: {_HOW}")
    return Signer(key)


def read_public_key(path: Path) -> bytes:
    """The public key in a PEM file, as `flyball-server key` prints it. Raises Invalid."""
    try:
        key = serialization.load_pem_public_key(path.read_bytes())
    except OSError as error:
        raise Invalid(f"public_key {path} cannot be read ({error.strerror})") from error
    except (ValueError, UnsupportedAlgorithm) as error:
        raise Invalid(f"public_key {path} holds no public key (PEM): `flyball-server key` prints one") from error
    if not isinstance(key, Ed25519PublicKey):
        raise Invalid(f"public_key {path} holds a key of another kind than Ed25519: `flyball-server key` prints one")
    return key.public_bytes_raw()


def is_signed(public: bytes, signature: bytes, data: bytes) -> bool:
    """Whether the owner of the public key signed the data."""
    try:
        Ed25519PublicKey.from_public_bytes(public).verify(signature, data)
    except (InvalidSignature, ValueError):
        return False
    return True


def pem(public: bytes) -> str:
    """A public key as PEM."""
    key = Ed25519PublicKey.from_public_bytes(public)
    form = serialization.PublicFormat.SubjectPublicKeyInfo
    return key.public_bytes(serialization.Encoding.PEM, form).decode()


def fingerprint(public: bytes) -> str:
    """What people compare: sha256 over the key's DER form, as `openssl pkey -pubin -outform der` writes it."""
    key = Ed25519PublicKey.from_public_bytes(public)
    der = key.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    return "sha256:" + hashlib.sha256(der).hexdigest()


def _write_key(path: Path) -> None:
    data = Ed25519PrivateKey.generate().private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    # Whole or not at all: a start that is killed here must not leave half a key to the next one.
    new = path.with_name(path.name + ".new")
    new.unlink(missing_ok=True)
    with os.fdopen(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    new.replace(path)
