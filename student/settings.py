"""Where the student's service and its workers run (environment, ``PRECEPTOR_...``)."""

from __future__ import annotations

from pathlib import Path
from typing import Self

from pydantic import Field, SecretStr, field_validator, model_validator

from preceptor.settings import HouseSettings, ServiceSettings, read_secret, student_names


class StudentSettings(ServiceSettings):
    """Settings of the student service."""

    watch_seconds: float = Field(0.5, gt=0, description="how often a watched deployment is looked at")
    default_student: str = Field(
        "",
        description="registered and activated where no student is: almanac (the tiny one that ships), NAME=FOLDER or "
        "NAME=HUB_ID@REVISION; empty: none",
    )


class AnswerServerSettings(HouseSettings):
    """What both sides of an answer server know: whoever starts it and the workers that ask it."""

    answer_server_api_key: SecretStr = Field(SecretStr(""), description="key of the server that answers for workers")
    answer_server_api_key_file: Path | None = Field(None, exclude=True, description="the file that holds this key")

    @field_validator("answer_server_api_key_file", mode="before")
    @classmethod
    def _no_key_file_is_not_set(cls, value: object) -> object:
        return value or None

    @model_validator(mode="after")
    def _one_key(self) -> Self:
        if (file := self.answer_server_api_key_file) is not None:
            if self.answer_server_api_key.get_secret_value():
                raise ValueError("PRECEPTOR_ANSWER_SERVER_API_KEY is set too; give one of the two")
            self.answer_server_api_key = SecretStr(read_secret("PRECEPTOR_ANSWER_SERVER_API_KEY_FILE", file))
            self.answer_server_api_key_file = None
        return self


class ServeSettings(AnswerServerSettings):
    """Settings of ``preceptor students serve``."""

    vllm_python: Path | None = Field(
        None, description="the interpreter of vLLM's environment; empty: that of the `vllm` on PATH"
    )
    vllm_start_seconds: float = Field(1800.0, gt=0, description="time limit for vLLM to load a student and be ready")

    @field_validator("vllm_python", mode="before")
    @classmethod
    def _no_python_is_not_set(cls, value: object) -> object:
        return value or None


class WorkerSettings(AnswerServerSettings):
    """Settings of a worker."""

    torch_threads: int = Field(1, ge=1, description="threads of torch; cores divided by the workers of the machine")
    loaded_bases: int = Field(2, ge=1, description="base models kept in memory, the least recently used leaves first")
    students: str = Field(
        "",
        description="names, with commas: takes only batches of these students, from the queues of their own that they "
        "have by the evaluator's PRECEPTOR_DEDICATED_STUDENTS; empty: of all that have none",
    )
    device: str = Field("auto", description='"cpu", "cuda", "cuda:0"...; "auto": a GPU if there is one')
    max_adapters: int = Field(32, ge=1, description="adapters trained in one step; fewer where memory does not suffice")
    gradient_checkpointing: bool | None = Field(
        None, description="keep only each block's input and compute the rest twice; unset: where memory needs it"
    )
    batch_seconds: float = Field(3600.0, gt=0, description="time limit of a trial batch; beyond it, it has failed")
    # Half of a batch: a trial that timed out with others and is tried alone has at least as long as it had among them.
    trial_seconds: float = Field(
        1800.0, gt=0, description="time limit of a trial: a batch may take as long as its trials together"
    )
    answer_server_url: str = Field(
        "",
        description="a vLLM server that answers large question sets with the trained adapters, like "
        "http://127.0.0.1:8000 (`preceptor students serve NAME --for-workers`); empty: the worker answers by itself",
    )
    answer_server_adapters: Path | None = Field(
        None,
        description="folder that the workers and the answer server see under this same path; empty: answers under home",
    )
    # Exporting and loading an adapter takes as long as answering some dozen questions with it.
    answer_server_min_questions: int = Field(
        512, ge=1, description="questions of a batch, over all its trials, from which the answer server is asked"
    )
    answer_server_only: bool = Field(
        False, description="a batch fails where the answer server cannot answer it, instead of being answered here"
    )
    answer_server_concurrency: int = Field(256, ge=1, le=4096, description="questions put to the answer server at once")
    answer_server_seconds: float = Field(120.0, gt=0, description="time limit of one question to the answer server")
    gpu_locks: Path | None = Field(
        None,
        description="folder that all workers of this machine share: each takes a GPU for itself; empty: none does",
    )
    gpu_share: int = Field(1, ge=1, le=64, description="workers on one GPU, with gpu_locks")
    # A worker that is told to end has 30 s (student.trial_worker.STOP_SECONDS).
    gpu_wait_seconds: float = Field(60.0, ge=0, description="for a GPU that another worker is just giving back")
    # The longest that one training step or chunk of answers may take: some seconds on a GPU, a minute or two where a
    # processor trains 32 adapters of a model that hardly fits it.
    stall_seconds: float = Field(
        300.0, gt=0, description="without a step or an answer for so long, the worker ends itself and is started again"
    )
    # 14 GB at 10 MB/s from the hub.
    load_seconds: float = Field(1800.0, gt=0, description="the same while a base model is fetched and loaded")

    @field_validator("students")
    @classmethod
    def _are_names(cls, names: str) -> str:
        student_names(names)
        return names

    @field_validator("gpu_locks", "answer_server_adapters", mode="before")
    @classmethod
    def _no_folder_is_not_set(cls, value: object) -> object:
        return value or None

    @field_validator("answer_server_url")
    @classmethod
    def _is_http(cls, url: str) -> str:
        if url and not url.startswith(("http://", "https://")):
            raise ValueError("is no HTTP address, like http://127.0.0.1:8000")
        return url

    @property
    def serves(self) -> tuple[str, ...]:
        """The students that this worker is there for; none: all that have no queue of their own."""
        return student_names(self.students)
