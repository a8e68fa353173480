"""Where am I running: settings from environment variables (``PRECEPTOR_...``) and, for secrets, files.

What experiment is run is another question, answered by ``preceptor.config``. The two never mix.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, SecretStr, ValidationInfo, field_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from preceptor.errors import PreceptorError


class SecuritySettings(BaseSettings):
    """Who may talk to whom; ``preceptor.security`` reads what is named here. None of it is in a dump of the settings:
    dumps are written to files and shown. A child process gets it through ``environment()``."""

    # Whatever is wrong with a setting, its value stays out of the message: it may be a password.
    model_config = SettingsConfigDict(env_prefix="PRECEPTOR_", extra="ignore", hide_input_in_errors=True)

    token: SecretStr = Field(SecretStr(""), exclude=True, description="what every call must carry; empty: none")
    token_file: Path | None = Field(None, exclude=True, description="the file that holds the token, instead of it")
    tls: Path | None = Field(None, exclude=True, description="folder with ca.pem, cert.pem and key.pem: mutual TLS")

    @field_validator("token_file", "tls", mode="before")
    @classmethod
    def _empty_is_not_set(cls, value: object) -> object:
        return value or None  # compose hands on what is not set as ""

    @field_validator("token_file")
    @classmethod
    def _one_token(cls, value: Path | None, info: ValidationInfo) -> Path | None:
        if value and (token := info.data.get("token")) and token.get_secret_value():
            raise ValueError("PRECEPTOR_TOKEN is set too; give one of the two")
        return value

    def environment(self) -> dict[str, str]:
        """All settings as environment variables, secrets in clear: for the environment of a child process."""
        values: dict[str, object] = dict(self)
        return {
            f"PRECEPTOR_{name.upper()}": value.get_secret_value() if isinstance(value, SecretStr) else str(value)
            for name, value in values.items()
            if value is not None
        }


class HouseSettings(SecuritySettings):
    """Settings every process shares. Addresses are ``host:port``."""

    home: Path = Field(Path(".preceptor"), description="folder of all durable state of this machine's processes")
    broker_url: str = Field(
        "redis://127.0.0.1:6379/0", repr=False, description="Redis (with its password): the queue, results and leases"
    )
    teacher_address: str = "127.0.0.1:7101"
    student_address: str = "127.0.0.1:7102"
    evaluator_address: str = "127.0.0.1:7103"
    orchestrator_address: str = "127.0.0.1:7104"
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = "INFO"
    log_format: Literal["text", "json"] = "text"
    parent_pid: int = Field(0, description="end when this parent process is gone; 0: never (set by the embedded stack)")

    @field_validator("broker_url")
    @classmethod
    def _is_redis(cls, url: str) -> str:
        if not url.startswith(("redis://", "rediss://", "unix://")):
            raise ValueError("is not a Redis URL (redis://, rediss:// or unix://)")
        return url

    @property
    def artifacts(self) -> Path:
        """Root of the artifact store."""
        return self.home / "artifacts"


class ServiceSettings(HouseSettings):
    """Settings of a gRPC service."""

    host: str = Field("127.0.0.1", description="interface to listen on; only loopback by default")
    port: int = Field(0, ge=0, le=65535, description="0: any free port")
    database_url: str = Field("", description="SQLAlchemy URL; empty: SQLite under home")
    grace_seconds: float = Field(10.0, description="time for calls under way after SIGTERM")
    max_threads: int = Field(32, ge=1, description="unary calls served at once; four times as many may wait")
    max_streams: int = Field(256, ge=1, description="open streams (watches); each holds a thread")

    def database(self, service: str) -> str:
        """The SQLAlchemy URL of one service's own database; makes the folder for SQLite."""
        if self.database_url:
            return self.database_url
        try:
            self.home.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise PreceptorError(
                "DATABASE_UNREACHABLE",
                f"PRECEPTOR_HOME={self.home} cannot be made: {error.strerror}",
                file=str(self.home),
            ) from None
        return f"sqlite:///{(self.home / service).resolve()}.db"
