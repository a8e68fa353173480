"""The backend `openai`: a vendor's chat model writes and does not learn. Needs no torch.

The prompt is the prompt format's, unchanged. Where that is one of the tiny teacher's, a system message says what shape
the answer must have, which a model that was not trained on it cannot know. Its tokens are the vendor's to count.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from preceptor.inference import InferenceServer
from preceptor.names import sha256
from teacher.backend import Backend, Draw, Drawn, Row, SamplingSettings, row_digest
from teacher.policy_store import Policy
from teacher.settings import TeacherSettings

# Changes to it make another teacher: it is part of the base's hash.
SYSTEM = """You write study material that another, smaller language model is fine-tuned on.
Answer in plain text without headings, numbering, bullets or Markdown: one self-contained document per line.
The first line may be a directive that sets how the other model is trained, with any of these keys:
directive: lr=3e-3 epochs=8 replay=0.25 rank=16
Leave the directive out if you do not want to change anything. State only what the passage says."""


def fixed(settings: TeacherSettings) -> Backend:
    """Waits for the endpoint. Raises PreceptorError: what ``InferenceServer.check`` raises."""
    server = InferenceServer(
        settings.teacher_server_url,
        settings.teacher_server_model,
        settings.teacher_server_api_key.get_secret_value(),
        concurrency=settings.teacher_server_concurrency,
        timeout_seconds=settings.teacher_server_timeout_seconds,
        patience_seconds=settings.teacher_server_patience_seconds,
    )
    try:
        server.check()
    except BaseException:
        server.close()
        raise
    commit = sha256(f"chat/1\n{server.url}\n{server.model}\n{SYSTEM}")
    return Backend(server.model, commit, _ChatAuthor(server), None, server.close)


class _ChatAuthor:
    """See ``teacher.backend.Author``."""

    context = 0  # the vendor says when a prompt is too long

    def __init__(self, server: InferenceServer) -> None:
        self._server = server

    def prompt_tokens(self, prompt: str) -> int:
        return 0

    @contextmanager
    def writing(
        self, policy: Policy, adapter: Callable[[], Path | None], stopped: Callable[[], bool]
    ) -> Iterator[Draw]:
        yield self._draw

    def _draw(
        self, rows: Sequence[Row], seed: int, settings: SamplingSettings, stopped: Callable[[], bool]
    ) -> list[Drawn]:
        said = self._server.chat(
            [(("user", row.prompt),) if row.explained else (("system", SYSTEM), ("user", row.prompt)) for row in rows],
            max_tokens=settings.max_new_tokens,
            temperature=settings.temperature,
            top_p=settings.top_p,
            # 31 bits: some vendors take no more
            seeds=[
                int.from_bytes(row_digest(seed, row.task_id, row.sample, row.draw)[:4], "little") >> 1 for row in rows
            ],
            stopped=stopped,
        )
        return [Drawn(one.text.strip(), one.tokens, one.finished) for one in said]
