"""Where and how this evaluator runs: environment variables ``PRECEPTOR_...``."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import urlsplit

from pydantic import Field, SecretStr, ValidationInfo, field_validator

from evaluator.flights import DispatchLimits
from evaluator.graders.chat import ChatLimits
from evaluator.graders.judge import JudgeSettings
from preceptor.settings import ServiceSettings, read_secret, student_names


class EvaluatorSettings(ServiceSettings):
    """Settings of the evaluator. Times in seconds; the reasons for the defaults are in ``evaluator.flights``."""

    trial_attempts: int = Field(5, ge=1, le=100, description="tries of the same trials before they FAIL")
    lease_grace_seconds: float = Field(
        3.0, ge=0, description="after a worker's lease expired, before it counts as lost"
    )
    orphan_seconds: float = Field(60.0, gt=0, description="with an empty queue, before a batch nobody took is resent")
    # Not PRECEPTOR_STALL_SECONDS, which is the worker's own: longer than the worker's load_seconds.
    lease_stall_seconds: float = Field(
        2400.0, gt=0, description="a worker that gets no further for so long has lost its batch, alive or not"
    )
    history_days: float = Field(30.0, ge=0, description="how long attempts that have ended are remembered")
    max_waiting: int = Field(1_000_000, ge=1, description="evaluations that are not final; beyond them QUEUE_FULL")
    result_poll_seconds: float = Field(0.05, gt=0, le=60, description="how often results are looked for")
    batches_in_flight: int = Field(256, ge=1, description="batches on a queue at once, at most")
    dedicated_students: str = Field(
        "", description="names, with commas: students that have a queue of their own (PRECEPTOR_STUDENTS of a worker)"
    )
    # Twice what fills a step (docs/log.md: 8 on a CPU, about 15 on a GPU), so that leavers are followed by others, and
    # small enough that several workers share a request.
    batch_trials: int = Field(32, ge=1, description="trials that one worker trains together, at most")
    judge_url: str = Field("", description="OpenAI-compatible endpoint up to /v1; empty: no judge")
    judge_model: str = Field("", validate_default=True, max_length=200, description="what the endpoint calls its model")
    judge_api_key_file: Path | None = Field(
        None, exclude=True, description="the file that holds the endpoint's key, instead of PRECEPTOR_JUDGE_API_KEY"
    )
    judge_api_key: SecretStr = Field(SecretStr(""), validate_default=True, description="key of the endpoint")
    judge_concurrency: int = Field(8, ge=1, le=1024, description="questions to the judge at once")
    judge_requests_per_second: float = Field(0.0, ge=0, allow_inf_nan=False, description="0: no limit")
    judge_timeout_seconds: float = Field(60.0, gt=0, le=3600, description="for one request, to its last byte")
    judge_repeat_share: float = Field(0.02, ge=0, le=1, description="verdicts asked for twice, to see how many differ")
    # A vendor's incident is minutes; a model that is loaded anew on one machine is a few.
    judge_patience_seconds: float = Field(600.0, ge=0, allow_inf_nan=False, description="for a judge that is away")

    @field_validator("judge_url")
    @classmethod
    def _is_http(cls, url: str) -> str:
        try:
            parts = urlsplit(url)
            good = not url or (parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0)
        except ValueError:  # a port that is no number, brackets that do not close
            good = False
        if not good or not url.isprintable() or " " in url or (url and (parts.query or parts.fragment)):
            raise ValueError("is not an address like http://127.0.0.1:8000/v1")
        if parts.username or parts.password:
            raise ValueError("must not carry a password; use PRECEPTOR_JUDGE_API_KEY")
        return url

    @field_validator("judge_model")
    @classmethod
    def _with_url(cls, model: str, known: ValidationInfo) -> str:
        if bool(model) != bool(known.data.get("judge_url", model)):
            raise ValueError("PRECEPTOR_JUDGE_URL and PRECEPTOR_JUDGE_MODEL need each other")
        return model

    @field_validator("judge_api_key_file", mode="before")
    @classmethod
    def _no_key_file_is_not_set(cls, value: object) -> object:
        return value or None

    @field_validator("judge_api_key")
    @classmethod
    def _fits_a_header(cls, key: SecretStr, known: ValidationInfo) -> SecretStr:
        bare = key.get_secret_value().strip()
        if (file := known.data.get("judge_api_key_file")) is not None:
            if bare:
                raise ValueError("PRECEPTOR_JUDGE_API_KEY_FILE is set too; give one of the two")
            bare = read_secret("PRECEPTOR_JUDGE_API_KEY_FILE", file)
        if not bare.isascii() or (bare and not bare.isprintable()):
            raise ValueError("has characters that no key has")
        return SecretStr(bare)

    @field_validator("dedicated_students")
    @classmethod
    def _are_names(cls, names: str) -> str:
        student_names(names)
        return names

    @property
    def dedicated(self) -> tuple[str, ...]:
        """The students that have a queue of their own."""
        return student_names(self.dedicated_students)

    @property
    def judge(self) -> JudgeSettings | None:
        """Who judges; None where nobody is set."""
        if not self.judge_url:
            return None
        limits = ChatLimits(
            concurrency=self.judge_concurrency,
            requests_per_second=self.judge_requests_per_second,
            timeout_seconds=self.judge_timeout_seconds,
        )
        key = self.judge_api_key.get_secret_value()
        return JudgeSettings(self.judge_url, self.judge_model, key, limits, self.judge_repeat_share)

    @property
    def dispatch_limits(self) -> DispatchLimits:
        """The dispatcher's numbers."""
        return DispatchLimits(
            max_attempts=self.trial_attempts,
            in_flight=self.batches_in_flight,
            poll_seconds=self.result_poll_seconds,
            lease_grace=self.lease_grace_seconds,
            orphan_seconds=self.orphan_seconds,
            stall_seconds=self.lease_stall_seconds,
            history_seconds=self.history_days * 86400,
        )
