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
    # Half of a batch: a trial that timed out with others and is tried alone has at least as long as it had among them.
    trial_seconds: float = Field(
        1800.0, gt=0, description="time limit of a trial: a batch may take as long as its trials together"
    )
    # The longest that one training step or chunk of answers may take: some seconds on a GPU, a minute or two where a
    # processor trains 32 adapters of a model that hardly fits it.
    stall_seconds: float = Field(
        300.0, gt=0, description="without a step or an answer for so long, the worker ends itself and is started again"
    )
    # 14 GB at 10 MB/s from the hub.
    load_seconds: float = Field(1800.0, gt=0, description="the same while a base model is fetched and loaded")
