"""Writes self-edits: tasks in, groups of parsed completions out, batch after batch.

Promises: a prompt is made of a passage's title and text and of nothing else; the same request gives the same groups;
groups come in the order of the tasks, as soon as their batch is written; a malformed completion is drawn again a
bounded number of times and then reported with its reason; one that is too costly to train on is reported at once.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from preceptor import splitting
from preceptor.completions import Limits, MalformedSelfEdit, TooCostlySelfEdit, parse
from preceptor.errors import PreceptorError
from preceptor.few_shot.directives import parse_json_directive
from preceptor.names import canonical_json, content_id
from preceptor.prompt_formats import PromptFormat
from preceptor.tasks import Directive, SelfEdit
from teacher.backend import Author, Draw, Drawn, Row, SamplingSettings
from teacher.policies import DAMAGED, Policies
from teacher.policy_store import Policy, PolicyStore
from teacher.prompts import Formats
from teacher.sight import TeacherSight

# Changes whenever the same request would be answered with other completions.
_VERSION = "writing/1"
# Limits that came later; part of a group's name only where they are used, so that groups keep their names.
_LATER_LIMITS = ("targets", "allow_full", "trained_characters", "default_epochs", "default_replay_share")


@dataclass(frozen=True, slots=True)
class TaskText:
    """All that the teacher may see of a task: of a few-shot task its name and its grids as text."""

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
    """One completion; a self-edit (``read`` gives it) where ``malformed_reason`` is empty. That also says why one is
    ``too_costly``."""

    completion: str
    malformed_reason: str
    draws: int
    tokens: int
    too_costly: bool = False
    finished: bool = True


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
        formats: Formats | None = None,
    ) -> None:
        self._author = author
        self._policies = policies
        self._store = store
        self._rows = rows
        self._answer_room = answer_room
        self._sight = sight or TeacherSight()
        self._formats = formats or Formats()
        self._unsaved: dict[str, bytes] = {}  # groups that the disk had no room for

    def write(self, request: WritingRequest, stopped: Callable[[], bool]) -> Iterator[WrittenGroup]:
        """Yields one group per task. Everything about the request is checked before the first.

        Raises PreceptorError: POLICY_NOT_FOUND, POLICY_NOT_READY, UNKNOWN_PROMPT_FORMAT, PASSAGE_TOO_LONG, DISK_FULL
        (ask again when there is room), and CANCELLED when ``stopped`` says so.
        """
        policy = self._policies.restored(request.policy_id, stopped)
        form = self._formats.find(request.prompt_format)
        if not form.asks:
            yield from _passages(policy.id, request)
            return
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
                        groups = self._groups(policy, request, form, tasks, prompts[batch], stopped)
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
        form: PromptFormat,
        tasks: Sequence[TaskText],
        prompts: Sequence[str],
        stopped: Callable[[], bool],
    ) -> list[tuple[Written, ...]]:
        """The completions of a batch; a policy whose files turn out to be damaged is restored first."""
        try:
            return self._groups_of(policy, request, form, tasks, prompts, stopped)
        except PreceptorError as error:
            if error.reason not in DAMAGED:
                raise
        self._policies.restore(policy.id)
        policy = self._policies.restored(policy.id, stopped)
        return self._groups_of(policy, request, form, tasks, prompts, stopped)

    def _groups_of(
        self,
        policy: Policy,
        request: WritingRequest,
        form: PromptFormat,
        tasks: Sequence[TaskText],
        prompts: Sequence[str],
        stopped: Callable[[], bool],
    ) -> list[tuple[Written, ...]]:
        with self._author.writing(policy, lambda: self._policies.adapter_folder(policy), stopped) as draw:
            return self._batch(draw, request, form, tasks, prompts, stopped)

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
        form: PromptFormat,
        tasks: Sequence[TaskText],
        prompts: Sequence[str],
        stopped: Callable[[], bool],
    ) -> list[tuple[Written, ...]]:
        """Draws every completion of a batch, and the malformed ones again, together."""
        wanted = [(task, index) for task in range(len(tasks)) for index in range(request.samples)]
        written: dict[tuple[int, int], Written] = {}
        for time_of in range(1, request.max_resamples + 2):
            explained = bool(form.template) or form.kind == "few_shot"
            rows = [Row(tasks[task].id, prompts[task], index, time_of, explained) for task, index in wanted]
            drawn = draw(rows, request.seed, request.sampling, stopped)
            for row, one in zip(wanted, drawn, strict=True):
                written[row] = _written(one, request.limits, form, tasks[row[0]].title, time_of)
            wanted = [row for row in wanted if written[row].malformed_reason and not written[row].too_costly]
            if not wanted:
                break
        return [tuple(written[task, index] for index in range(request.samples)) for task in range(len(tasks))]


def read(completion: str, form: PromptFormat, title: str, limits: Limits, *, finished: bool = True) -> SelfEdit:
    """The self-edit that a completion of ``form`` is. Raises MalformedSelfEdit, TooCostlySelfEdit."""
    if not form.asks:
        return SelfEdit((completion,), Directive())
    if form.kind == "few_shot":
        return SelfEdit((), parse_json_directive(form.whole(completion), limits))
    edit = parse(
        form.whole(completion),
        limits,
        finished=finished,
        splitting=form.splitting,
        title=title if form.titled else "",
    )
    limits.check_cost(edit)
    return edit


def _written(drawn: Drawn, limits: Limits, form: PromptFormat, title: str, draw: int) -> Written:
    reason, too_costly = "", False
    try:
        read(drawn.text, form, title, limits, finished=drawn.finished)
    except MalformedSelfEdit as error:
        reason = str(error)
    except TooCostlySelfEdit as error:
        reason, too_costly = str(error), True
    return Written(drawn.text, reason, draw, drawn.tokens, too_costly, drawn.finished)


def _passages(policy_id: str, request: WritingRequest) -> Iterator[WrittenGroup]:
    """Nobody is asked: each passage is its own self-edit."""
    for task in request.tasks:
        written = Written(task.text.strip(), "", 1, 0)
        yield WrittenGroup(task.id, policy_id, (written,) * request.samples, 0.0)


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
    named: list[object] = [form.name, form.version]
    if form.template:
        named += [form.digest, splitting.VERSION]
    parts: list[object] = [_VERSION, policy_id, [task.id, task.title, task.text], named, request.samples]
    parts += [asdict(request.sampling), request.seed, _said(request.limits), request.max_resamples]
    return content_id("group", parts)


def _said(limits: Limits) -> dict[str, Any]:
    """The limits, the later ones only where they differ from their default."""
    defaults = {field.name: field.default for field in fields(limits)}
    said = asdict(limits)
    return {name: value for name, value in said.items() if name not in _LATER_LIMITS or value != defaults[name]}


def _to_bytes(group: tuple[Written, ...]) -> bytes:
    return canonical_json([asdict(written) for written in group]).encode()


def _from_bytes(data: bytes) -> tuple[Written, ...]:
    return tuple(Written(**values) for values in json.loads(data))
