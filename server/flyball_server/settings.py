"""How the service is configured: by options, or by environment variables of the same names.

Rule of this module: every setting is checked here, before anything is opened.
"""

from __future__ import annotations

from ipaddress import ip_address
from pathlib import Path

from pydantic import Field, field_validator, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from flyball_server import limits


class Settings(BaseSettings):
    """FLYBALL_HTTP, FLYBALL_GRPC, FLYBALL_STORE, FLYBALL_STORE_BYTES_MAX and so on."""

    model_config = SettingsConfigDict(env_prefix="FLYBALL_", frozen=True)

    http: str = "127.0.0.1:1788"
    grpc: str = "127.0.0.1:1789"
    store: str = "sqlite:///flyball.db"
    store_bytes_max: int | None = Field(default=None, gt=0)
    disk_free_min: int = Field(default=limits.DISK_FREE_MIN_BYTES, ge=0)
    profiles: str = ""
    projects: str = ""
    signing_key: str = ""
    heads_every_s: float = Field(default=limits.HEADS_EVERY_S, gt=0)
    webhooks: str = ""
    auth: bool = False
    tls_cert: str = ""
    tls_key: str = ""
    tls_client_ca: str = ""
    requests_per_s: float = Field(default=limits.REQUESTS_PER_S, gt=0, allow_inf_nan=False)
    insecure: bool = False

    @property
    def own_key(self) -> Path | None:
        """Where the signing key is kept when none is named: beside the store's file; None: with the process."""
        file = self.store.removeprefix("sqlite:///")
        return None if file == self.store else Path(file + ".signing-key")

    @field_validator("http", "grpc")
    @classmethod
    def _address(cls, value: str) -> str:
        split_address(value)
        return value

    @model_validator(mode="after")
    def _no_open_door(self) -> Settings:
        for name in ("http", "grpc"):
            host, _ = split_address(getattr(self, name))
            if not self.auth and not self.insecure and not is_loopback(host):
                raise ValueError(
                    f"{name} is {getattr(self, name)!r}, which other machines can reach: say --auth, so that callers "
                    "need a token, or bind to 127.0.0.1, or say --insecure where the network itself is trusted"
                )
        return self

    @model_validator(mode="after")
    def _whole_tls(self) -> Settings:
        if bool(self.tls_cert) != bool(self.tls_key):
            given, missing = ("tls_cert", "tls_key") if self.tls_cert else ("tls_key", "tls_cert")
            raise ValueError(f"{given} is {getattr(self, given)!r}, but {missing} is not given: TLS takes both files")
        if self.tls_client_ca and not self.tls_cert:
            raise ValueError(f"tls_client_ca is {self.tls_client_ca!r}, but tls_cert and tls_key are not given")
        return self


def split_address(address: str) -> tuple[str, int]:
    """HOST:PORT or [IPV6]:PORT as host and port. Raises ValueError with what is allowed."""
    host, sep, port = address.rpartition(":")
    if not sep or not host or not port.isdigit() or int(port) > 65535:
        raise ValueError(f"{address!r} is no address: give HOST:PORT, such as 127.0.0.1:1788 (port 0: any free one)")
    return host.removeprefix("[").removesuffix("]"), int(port)


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach the host."""
    if host == "localhost":
        return True
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return False
