"""Where the teacher runs: settings from ``PRECEPTOR_...`` environment variables."""

from __future__ import annotations

from pydantic import Field

from preceptor.settings import ServiceSettings


class TeacherSettings(ServiceSettings):
    """Settings of the teacher service."""

    port: int = Field(7101, ge=0, le=65535, description="0: any free port")
    teacher_source: str = Field(
        "", description="folder or hub id of the base model; empty: the tiny teacher that ships"
    )
    teacher_revision: str = Field("", description="hub revision; ignored for a folder")
    teacher_device: str = Field("auto", description="auto, cpu, cuda or cuda:N; fp32 on the CPU, bf16 on a GPU")
    teacher_rows: int = Field(
        128, ge=1, description="self-edits written together, in whole tasks; the first batch is an eighth of it"
    )
    teacher_answer_room: int = Field(
        64, ge=1, description="tokens that must be left for a self-edit behind the prompt, else the passage is too long"
    )
    teacher_cached_policies: int = Field(
        2, ge=1, description="policies kept ready for writing; each costs the memory of the weights that LoRA targets"
    )
