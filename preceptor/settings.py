"""Where am I running: settings from environment variables (``PRECEPTOR_...``) and, for secrets, files.

What experiment is run is another question, answered by ``preceptor.config``. The two never mix.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, field_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from preceptor.errors import PreceptorError


class HouseSettings(BaseSettings):
    """Settings every process shares. Addresses are ``host:port``."""

    model_config = SettingsConfigDict(env_prefix="PRECEPTOR_", extra="ignore")

    home: Path = Field(Path(".preceptor"), description="folder of all durable state of this machine's processes")
    broker_url: str = Field("redis://127.0.0.1:6379/0", description="Redis: the queue, results and leases")
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
    max_threads: int = Field(32, description="calls served at once; each open watch holds one")

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
