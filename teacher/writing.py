"""Writes self-edits: tasks in, groups of parsed completions out, batch after batch.

Promises: a prompt is made of a passage's title and text and of nothing else; the same request gives the same groups;
groups come in the order of the tasks, as soon as their batch is written; a malformed completion is drawn again a
bounded number of times and then reported with its reason.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass

from preceptor.completions import Limits, MalformedSelfEdit, parse
from preceptor.errors import PreceptorError
from preceptor.names import canonical_json, content_id
from teacher.backend import Author, Draw, Drawn, Row, SamplingSettings
from teacher.policies import DAMAGED, Policies
from teacher.policy_store import Policy, PolicyStore
from teacher.prompts import PromptFormat, prompt_format
from teacher.sight import TeacherSight

# Changes whenever the same request would be answered with other completions.
_VERSION = "writing/1"


@dataclass(frozen=True, slots=True)
class TaskText:
    """All that the teacher may see of a passage."""

    id: str
    title: str
    text: str


@dataclass(frozen=True, slots=True)
class WritingRequest:
    """What to write. An empty ``policy_id`` means the active policy."""

    policy_id: str
    tasks: tuple[TaskText, ...]
    samples: int
    prompt_format: str
    sampling: SamplingSettings
    seed: int
    limits: Limits
    max_resamples: int


@dataclass(frozen=True, slots=True)
class Written:
    """One completion; a self-edit (``parse`` gives it) where ``malformed_reason`` is empty."""

    completion: str
    malformed_reason: str
    draws: int
    tokens: int


@dataclass(frozen=True, slots=True)
class WrittenGroup:
    """The completions of one task. ``seconds`` is its share of its batch's time."""

    task_id: str
    policy_id: str
    written: tuple[Written, ...]
    seconds: float


class Writer:
    """Writes with any policy; the ``author`` draws, ``rows`` is the size of a batch."""

    def __init__(
        self,
        author: Author,
        policies: Policies,
        store: PolicyStore,
        *,
        rows: int,
        answer_room: int,
        sight: TeacherSight | None = None,
    ) -> None:
        self._author = author
        self._policies = policies
        self._store = store
        self._rows = rows
        self._answer_room = answer_room
        self._sight = sight or TeacherSight()
        self._unsaved: dict[str, bytes] = {}  # groups that the disk had no room for

    def write(self, request: WritingRequest, stopped: Callable[[], bool]) -> Iterator[WrittenGroup]:
        """Yields one group per task. Everything about the request is checked before the first.

        Raises PreceptorError: POLICY_NOT_FOUND, POLICY_NOT_READY, UNKNOWN_PROMPT_FORMAT, PASSAGE_TOO_LONG, DISK_FULL
        (ask again when there is room), and CANCELLED when ``stopped`` says so.
        """
        policy = self._policies.restored(request.policy_id, stopped)
        form = prompt_format(request.prompt_format)
        prompts = [self._prompt(form, task, request.sampling.max_new_tokens) for task in request.tasks]
        for batch in batches(len(prompts), request.samples, self._rows):
            began = time.monotonic()
            tasks = request.tasks[batch]
            keys = [_key(request, policy.id, form, task) for task in tasks]
            known = self._store.written(keys)
            if missing := set(keys) - known.keys():
                made = {key: self._unsaved[key] for key in missing if key in self._unsaved}
                if len(made) < len(missing):
                    with self._sight.writing(policy.id, len(tasks)) as wrote:
                        groups = self._groups(policy, request, tasks, prompts[batch], stopped)
                        wrote(groups)
                    made = {key: _to_bytes(group) for key, group in zip(keys, groups, strict=True)}
                self._keep(made)
                known = made | known
            seconds = (time.monotonic() - began) / len(tasks)
            for key, task in zip(keys, tasks, strict=True):
                yield WrittenGroup(task.id, policy.id, _from_bytes(known[key]), seconds)

    def _keep(self, made: Mapping[str, bytes]) -> None:
        """Stores groups before anybody sees them. Where there is no room they stay in memory, so that who asks again
        when there is gets them without their being written twice. Raises DatabaseError."""
        self._unsaved.update(made)
        self._store.keep_written(made)
        for key in made:
            self._unsaved.pop(key, None)

    def _groups(
        self,
        policy: Policy,
        request: WritingRequest,
        tasks: Sequence[TaskText],
        prompts: Sequence[str],
        stopped: Callable[[], bool],
    ) -> list[tuple[Written, ...]]:
        """The completions of a batch; a policy whose files turn out to be damaged is restored first."""
        try:
            return self._groups_of(policy, request, tasks, prompts, stopped)
        except PreceptorError as error:
            if error.reason not in DAMAGED:
                raise
        self._policies.restore(policy.id)
        policy = self._policies.restored(policy.id, stopped)
        return self._groups_of(policy, request, tasks, prompts, stopped)

    def _groups_of(
        self,
        policy: Policy,
        request: WritingRequest,
        tasks: Sequence[TaskText],
        prompts: Sequence[str],
        stopped: Callable[[], bool],
    ) -> list[tuple[Written, ...]]:
        with self._author.writing(policy, lambda: self._policies.adapter_folder(policy), stopped) as draw:
            return self._batch(draw, request, tasks, prompts, stopped)

    def _prompt(self, form: PromptFormat, task: TaskText, max_new_tokens: int) -> str:
        prompt = form.render(task.title, task.text)
        tokens = self._author.prompt_tokens(prompt)
        room = min(max_new_tokens, self._answer_room)
        if tokens and tokens + room > self._author.context:
            raise PreceptorError(
                "PASSAGE_TOO_LONG",
                f"task {task.id} ({task.title!r}): its prompt has {tokens} tokens; with {room} for an answer that is "
                f"more than the teacher's context of {self._author.context}",
                field="tasks",
                task=task.id,
                tokens=tokens,
                limit=self._author.context,
            )
        return prompt

    def _batch(
        self,
        draw: Draw,
        request: WritingRequest,
        tasks: Sequence[TaskText],
        prompts: Sequence[str],
        stopped: Callable[[], bool],
    ) -> list[tuple[Written, ...]]:
        """Draws every completion of a batch, and the malformed ones again, together."""
        wanted = [(task, index) for task in range(len(tasks)) for index in range(request.samples)]
        written: dict[tuple[int, int], Written] = {}
        for time_of in range(1, request.max_resamples + 2):
            rows = [Row(tasks[task].id, prompts[task], index, time_of) for task, index in wanted]
            drawn = draw(rows, request.seed, request.sampling, stopped)
            for row, one in zip(wanted, drawn, strict=True):
                written[row] = _read(one, request.limits, time_of)
            wanted = [row for row in wanted if written[row].malformed_reason]
            if not wanted:
                break
        return [tuple(written[task, index] for index in range(request.samples)) for task in range(len(tasks))]


def _read(drawn: Drawn, limits: Limits, draw: int) -> Written:
    reason = ""
    try:
        parse(drawn.text, limits, finished=drawn.finished)
    except MalformedSelfEdit as error:
        reason = str(error)
    return Written(drawn.text, reason, draw, drawn.tokens)


def batches(tasks: int, samples: int, rows: int) -> Iterator[slice]:
    """Which tasks are written together: about ``rows`` completions, but only an eighth of that at first.

    A batch takes as long as its longest completion, whatever its size, so large ones are cheap; the small first one
    gives the evaluator work while the second is written.
    """
    start = 0
    while start < tasks:
        size = max(1, (rows if start else rows // 8) // samples)
        yield slice(start, min(start + size, tasks))
        start += size


def _key(request: WritingRequest, policy_id: str, form: PromptFormat, task: TaskText) -> str:
    """Names what a group is a function of (but for its neighbours in the batch, which only change rounding)."""
    parts = [_VERSION, policy_id, [task.id, task.title, task.text], [form.name, form.version], request.samples]
    parts += [asdict(request.sampling), request.seed, asdict(request.limits), request.max_resamples]
    return content_id("group", parts)


def _to_bytes(group: tuple[Written, ...]) -> bytes:
    return canonical_json([asdict(written) for written in group]).encode()


def _from_bytes(data: bytes) -> tuple[Written, ...]:
    return tuple(Written(**values) for values in json.loads(data))
