"""Where the teacher runs: settings from ``PRECEPTOR_...`` environment variables."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, Self
from urllib.parse import urlsplit

from pydantic import Field, SecretStr, field_validator, model_validator

from preceptor.settings import ServiceSettings, read_secret
from preceptor.stack import WORLDS, shipped_models


class TeacherSettings(ServiceSettings):
    """Settings of the teacher service."""

    port: int = Field(7101, ge=0, le=65535, description="0: any free port")
    teacher_backend: Literal["transformers", "vllm", "openai"] = Field(
        "transformers",
        description="who writes: this process, a vLLM server (this process trains), or a vendor's chat model (fixed)",
    )
    teacher_source: str = Field(
        "",
        description="folder or hub id of the base model, or the world whose tiny teacher that ships it is (almanac, "
        "mosaic); empty: almanac; not for openai",
    )
    teacher_revision: str = Field("", description="hub revision; ignored for a folder")
    teacher_device: str = Field("auto", description="auto, cpu, cuda or cuda:N; fp32 on the CPU, bf16 on a GPU")
    teacher_templates: Path | None = Field(
        None, description="folder of prompt formats of your own, one .toml file each (docs/formats.md)"
    )
    teacher_rows: int = Field(
        128, ge=1, description="self-edits written together, in whole tasks; the first batch is an eighth of it"
    )
    teacher_answer_room: int = Field(
        64, ge=1, description="tokens that must be left for a self-edit behind the prompt, else the passage is too long"
    )
    teacher_cached_policies: int = Field(
        2, ge=1, description="policies kept ready for writing; each costs the memory of the weights that LoRA targets"
    )
    teacher_server_url: str = Field("", description="the inference server of vllm and openai, like http://vllm:8000")
    teacher_server_model: str = Field(
        "", max_length=200, description="what the server calls the model; empty, vllm: its only one"
    )
    teacher_server_api_key: SecretStr = Field(SecretStr(""), exclude=True, description="what the server wants to see")
    teacher_server_api_key_file: Path | None = Field(
        None, exclude=True, description="the file that holds the server's key, instead of it"
    )
    teacher_server_concurrency: int = Field(128, ge=1, le=4096, description="self-edits asked of the server at once")
    teacher_server_timeout_seconds: float = Field(
        900.0, gt=0, le=86_400, description="for one self-edit, from its request to its last byte"
    )
    # A vendor's incident is minutes; a large model that is loaded anew is a few.
    teacher_server_patience_seconds: float = Field(
        900.0, ge=0, le=86_400, description="for a server that is away, starts or is too busy"
    )
    teacher_server_adapters: int = Field(
        1, ge=1, le=1024, description="policies loaded into vLLM at once, at most; its --max-loras"
    )
    teacher_server_mount: str = Field(
        "",
        description="where vLLM sees the artifacts (and their cache), if not at the teacher's path: HERE:THERE, like "
        "/var/lib/preceptor:/data",
    )
    teacher_shares_gpu: bool = Field(
        False, description="vLLM sleeps during an update; it needs --enable-sleep-mode and VLLM_SERVER_DEV_MODE=1"
    )

    @field_validator("teacher_server_api_key_file", "teacher_templates", mode="before")
    @classmethod
    def _no_path_is_not_set(cls, value: object) -> object:
        return value or None

    @field_validator("teacher_server_url")
    @classmethod
    def _is_http(cls, url: str) -> str:
        try:
            parts = urlsplit(url)
            whole = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.username is None
        except ValueError:
            whole = False
        if url and not whole:
            raise ValueError("is no http:// or https:// address (a key goes into PRECEPTOR_TEACHER_SERVER_API_KEY)")
        return url

    @field_validator("teacher_server_mount")
    @classmethod
    def _is_a_pair(cls, mount: str) -> str:
        here, colon, there = mount.partition(":")
        if mount and not (colon and Path(here).is_absolute() and there.startswith("/")):
            raise ValueError("is not HERE:THERE, two absolute paths")
        return mount

    @model_validator(mode="after")
    def _server(self) -> Self:
        if self.teacher_backend != "transformers" and not self.teacher_server_url:
            raise ValueError(f"PRECEPTOR_TEACHER_BACKEND={self.teacher_backend} needs PRECEPTOR_TEACHER_SERVER_URL")
        if self.teacher_backend == "openai" and not self.teacher_server_model:
            raise ValueError("PRECEPTOR_TEACHER_BACKEND=openai needs PRECEPTOR_TEACHER_SERVER_MODEL")
        key, file = self.teacher_server_api_key.get_secret_value().strip(), self.teacher_server_api_key_file
        if file is not None:
            if key:
                raise ValueError(
                    "PRECEPTOR_TEACHER_SERVER_API_KEY and PRECEPTOR_TEACHER_SERVER_API_KEY_FILE are set; give one"
                )
            key = read_secret("PRECEPTOR_TEACHER_SERVER_API_KEY_FILE", file)
        if not key.isascii() or (key and not key.isprintable()):
            raise ValueError("PRECEPTOR_TEACHER_SERVER_API_KEY has characters that no key has")
        self.teacher_server_api_key, self.teacher_server_api_key_file = SecretStr(key), None
        return self

    @property
    def base_source(self) -> str:
        """The base's folder or hub id."""
        world = self.teacher_source or WORLDS[0]
        return str(shipped_models(world) / "teacher") if world in WORLDS else self.teacher_source

    def seen_by_server(self, path: Path) -> str:
        """Where vLLM sees a path of this machine."""
        here, _, there = self.teacher_server_mount.partition(":")
        resolved = path.resolve()
        if here and resolved.is_relative_to(Path(here).resolve()):
            return str(Path(there) / resolved.relative_to(Path(here).resolve()))
        return str(resolved)
