"""Where the student's service and its workers run (environment, ``PRECEPTOR_...``)."""

from __future__ import annotations

from pydantic import Field

from preceptor.settings import HouseSettings, ServiceSettings


class StudentSettings(ServiceSettings):
    """Settings of the student service."""

    watch_seconds: float = Field(0.5, gt=0, description="how often a watched deployment is looked at")


class WorkerSettings(HouseSettings):
    """Settings of a worker."""

    torch_threads: int = Field(1, ge=1, description="threads of torch; cores divided by the workers of the machine")
    loaded_bases: int = Field(2, ge=1, description="base models kept in memory, the least recently used leaves first")
    device: str = Field("auto", description='"cpu", "cuda", "cuda:0"...; "auto": a GPU if there is one')
    max_adapters: int = Field(32, ge=1, description="adapters trained in one step; fewer where memory does not suffice")
    gradient_checkpointing: bool | None = Field(
        None, description="keep only each block's input and compute the rest twice; unset: where memory needs it"
    )
    batch_seconds: float = Field(3600.0, gt=0, description="time limit of a trial batch; beyond it, it has failed")
