"""Where am I running: settings from environment variables (``PRECEPTOR_...``) and, for secrets, files.

What experiment is run is another question, answered by ``preceptor.config``. The two never mix.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Literal, Self
from urllib.parse import quote, urlencode, urlsplit, urlunsplit

from pydantic import Field, SecretStr, ValidationInfo, field_validator, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from preceptor.artifact_cache import ArtifactCache
from preceptor.errors import PreceptorError

# Of a PRECEPTOR_TLS folder.
CA_FILE, CERTIFICATE_FILE, KEY_FILE = "ca.pem", "cert.pem", "key.pem"
STUDENT_NAME = re.compile(r"[a-z0-9_.-]{1,64}")


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
        """All settings as environment variables, secrets in clear: for the environment of a child process. What is not
        set here is set to nothing there, whatever the child inherits."""
        values: dict[str, object] = {name: "" if value is None else value for name, value in self}
        return {
            f"PRECEPTOR_{name.upper()}": value.get_secret_value() if isinstance(value, SecretStr) else str(value)
            for name, value in values.items()
        }


class HouseSettings(SecuritySettings):
    """Settings every process shares. Addresses are ``host:port``."""

    home: Path = Field(Path(".preceptor"), description="folder of all durable state of this machine's processes")
    broker_url: str = Field(
        "redis://127.0.0.1:6379/0", repr=False, description="Redis (with its password): the queue, results and leases"
    )
    broker_password_file: Path | None = Field(
        None, exclude=True, description="the file that holds the password of Redis, where its URL has none"
    )
    artifacts_url: str = Field(
        "", description="where weights are kept: a folder, file:// or s3://bucket/prefix; empty: artifacts under home"
    )
    artifact_cache_gb: float = Field(
        100.0, gt=0, description="copies of what lies in buckets, kept under home; the least recently used leave first"
    )
    teacher_address: str = Field("127.0.0.1:7101", description="where the teacher serves")
    student_address: str = Field("127.0.0.1:7102", description="where the student serves")
    evaluator_address: str = Field("127.0.0.1:7103", description="where the evaluator serves")
    orchestrator_address: str = Field("127.0.0.1:7104", description="where the orchestrator serves")
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = Field("INFO", description="the least that is logged")
    log_format: Literal["text", "json"] = Field("text", description="lines for people, or JSON for machines")
    metrics_port: int = Field(0, ge=0, le=65535, description="Prometheus metrics over HTTP; 0: none")
    metrics_host: str = Field("127.0.0.1", description="interface of the metrics; only loopback by default")
    otlp_endpoint: str = Field(
        "", description="OpenTelemetry collector (OTLP over HTTP), like http://127.0.0.1:4318; empty: no traces"
    )
    parent_pid: int = Field(0, description="end when this parent process is gone; 0: never (set by the embedded stack)")

    @field_validator("broker_password_file", mode="before")
    @classmethod
    def _no_file_is_not_set(cls, value: object) -> object:
        return value or None

    @model_validator(mode="after")
    def _broker_password(self) -> Self:
        """The broker's URL has its password from here on, whichever way it was given."""
        if self.broker_password_file is not None:
            self.broker_url = _with_password("PRECEPTOR_BROKER", self.broker_url, self.broker_password_file)
            self.broker_password_file = None
        return self

    @model_validator(mode="after")
    def _broker_certificates(self) -> Self:
        """With TLS, Redis is one of the house, unless its URL names other files."""
        if self.tls and self.broker_url.startswith("rediss://") and "ssl_" not in urlsplit(self.broker_url).query:
            files = {"ssl_ca_certs": CA_FILE, "ssl_certfile": CERTIFICATE_FILE, "ssl_keyfile": KEY_FILE}
            query = urlencode({name: str(self.tls.resolve() / file) for name, file in files.items()})
            self.broker_url += f"{'&' if urlsplit(self.broker_url).query else '?'}{query}"
        return self

    @field_validator("otlp_endpoint")
    @classmethod
    def _is_http(cls, url: str) -> str:
        if url and not url.startswith(("http://", "https://")):
            raise ValueError("is no URL like http://127.0.0.1:4318")
        return url

    @field_validator("broker_url")
    @classmethod
    def _is_redis(cls, url: str) -> str:
        if not url.startswith(("redis://", "rediss://", "unix://")):
            raise ValueError("is not a Redis URL (redis://, rediss:// or unix://)")
        return _readable(url)

    @field_validator("artifacts_url")
    @classmethod
    def _is_a_place(cls, url: str) -> str:
        scheme, found, rest = url.rpartition("://")
        if found and scheme not in ("file", "s3"):
            raise ValueError("is no folder, file:// or s3://bucket/prefix")
        if scheme == "s3" and (not rest.strip("/") or rest.startswith("/") or "@" in rest):
            raise ValueError("names no bucket (s3://bucket/prefix; keys are AWS_ACCESS_KEY_ID and so on)")
        return url.rstrip("/")

    @property
    def artifacts(self) -> str:
        """URL or folder of the artifact store (``preceptor.artifacts.artifact_store``)."""
        return self.artifacts_url or str(self.home / "artifacts")

    @property
    def artifact_cache(self) -> ArtifactCache:
        """Where copies of what lies in a bucket are kept on this machine."""
        return ArtifactCache(self.home / "artifact-cache", int(self.artifact_cache_gb * 1e9))


class ServiceSettings(HouseSettings):
    """Settings of a gRPC service."""

    host: str = Field("127.0.0.1", description="interface to listen on; only loopback by default")
    port: int = Field(0, ge=0, le=65535, description="0: any free port")
    database_url: str = Field(
        "",
        repr=False,
        description="SQLAlchemy URL, on PostgreSQL with a schema for each service; empty: SQLite under home",
    )
    database_password_file: Path | None = Field(
        None, exclude=True, description="the file that holds the password of the database, where its URL has none"
    )
    grace_seconds: float = Field(10.0, description="time for calls under way after SIGTERM")
    max_threads: int = Field(32, ge=1, description="unary calls served at once; four times as many may wait")
    rate_limit: float = Field(
        0.0,
        ge=0,
        allow_inf_nan=False,
        description="calls a second of one client; for the service whose port others reach, 0: no limit",
    )
    max_streams: int = Field(256, ge=1, description="open streams (watches); each holds a thread")

    @field_validator("database_url")
    @classmethod
    def _is_a_url(cls, url: str) -> str:
        return _readable(url)

    @field_validator("database_password_file", mode="before")
    @classmethod
    def _no_database_file_is_not_set(cls, value: object) -> object:
        return value or None

    @model_validator(mode="after")
    def _database_password(self) -> Self:
        if self.database_password_file is not None:
            if not self.database_url:
                raise ValueError("PRECEPTOR_DATABASE_PASSWORD_FILE is set, and PRECEPTOR_DATABASE_URL is not")
            self.database_url = _with_password("PRECEPTOR_DATABASE", self.database_url, self.database_password_file)
            self.database_password_file = None
        return self

    def database(self, service: str) -> str:
        """The SQLAlchemy URL of one service's own database; makes the folder for SQLite.

        On PostgreSQL all services may be given the same URL: each has a schema of its name there.
        """
        if self.database_url.startswith("postgresql"):
            parts = urlsplit(self.database_url)
            query = "&".join(filter(None, (parts.query, f"options=-csearch_path%3D{service}")))
            return urlunsplit(("postgresql+psycopg", parts.netloc, parts.path, query, ""))
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


def student_names(listed: str) -> tuple[str, ...]:
    """The names in a setting, which has commas between them. Raises ValueError naming what is no student's name."""
    names = tuple(dict.fromkeys(name for part in listed.split(",") if (name := part.strip())))
    for name in names:
        if not STUDENT_NAME.fullmatch(name):
            raise ValueError(f"{name!r} is no student's name (lower-case letters, digits, '-', '_', '.')")
    return names


def read_secret(variable: str, file: Path) -> str:
    """What a secret's file holds. Raises ValueError with the variable that named it."""
    try:
        secret = file.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is no text"
        raise ValueError(f"{variable}={file} cannot be read: {reason}") from None
    if not secret:
        raise ValueError(f"{variable}={file} is empty")
    return secret


def _readable(url: str) -> str:
    """A URL that can be taken apart. Raises ValueError."""
    try:
        urlsplit(url)
    except ValueError:
        raise ValueError("is no URL: what is special in a password is written as %5B and so on") from None
    return url


def _with_password(prefix: str, url: str, file: Path) -> str:
    """The URL with the password that the file holds."""
    password = read_secret(f"{prefix}_PASSWORD_FILE", file)
    parts = urlsplit(url)
    user, at, place = parts.netloc.rpartition("@")
    if ":" in user:
        raise ValueError(f"{prefix}_URL has a password too; give one of the two")
    return urlunsplit(parts._replace(netloc=f"{user if at else ''}:{quote(password, safe='')}@{place}"))
