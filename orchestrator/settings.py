"""Where the orchestrator runs."""

from __future__ import annotations

from pydantic import Field

from preceptor.settings import ServiceSettings


class OrchestratorSettings(ServiceSettings):
    """Settings of the orchestrator service."""

    external_teacher_address: str = Field(
        "", description="a second teacher, of the arm external_teacher (heldout.external_teacher); empty: none"
    )
    max_running_runs: int = Field(2, ge=1, description="runs executed at once; further ones stay PENDING")
    patience_seconds: float = Field(
        180.0, gt=0, description="how long a service may be away before a run fails (and can be resumed)"
    )
