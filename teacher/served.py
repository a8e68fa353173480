"""The backend `vllm`: a vLLM server draws, this process trains.

Promises: a policy is loaded into the server under the hash of its files, once, and seen to be at work before anything
is drawn with it; never more are loaded than the server has room for, and none is dropped while it is used; one policy
writes at a time, for vLLM on the CPU answers wrongly where the base shares a batch with adapters, and a server may
have room for one only. Where teacher and server share a GPU, nothing is written during an update, and the server
sleeps: it is woken when the update ends, however it ends, and by the next teacher where this one died.
"""

from __future__ import annotations

import gc
import logging
import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from preceptor.errors import PreceptorError
from preceptor.inference import InferenceServer, ServedModel
from teacher.backend import Backend, Draw, Drawn, Row, SamplingSettings, row_digest
from teacher.language import Language, load_language
from teacher.model import TeacherBase, load_teacher
from teacher.policy_store import Policy
from teacher.settings import TeacherSettings
from teacher.training import LoraTrainer, read_probe

log = logging.getLogger(__name__)

# How the names of our adapters begin; others' are left alone.
_PREFIX = "policy-"
# What a server's tokenizer is compared on.
_SAMPLE = "# Ada Brook\nShe keeps 2 herons – naïve?\n"


def served(settings: TeacherSettings) -> Backend:
    """Waits for the server and looks that it serves the teacher's base.

    Raises PreceptorError: BAD_TEACHER_SOURCE, MODEL_UNREACHABLE (the tokenizer), MODEL_NOT_SERVED (also where the
    server's tokenizer is another one), SERVER_TOO_OLD, SERVER_REFUSED, SERVER_UNREACHABLE, SERVER_UNREADABLE, and
    SERVER_CANNOT_SLEEP where it is to sleep during updates.
    """
    language = load_language(settings.base_source, settings.teacher_revision)
    server = InferenceServer(
        settings.teacher_server_url,
        settings.teacher_server_model,
        settings.teacher_server_api_key.get_secret_value(),
        concurrency=settings.teacher_server_concurrency,
        timeout_seconds=settings.teacher_server_timeout_seconds,
        patience_seconds=settings.teacher_server_patience_seconds,
    )
    try:
        model = _check(server, language)
        sleeper = _Sleeper(server) if settings.teacher_shares_gpu else None
    except BaseException:
        server.close()
        raise
    turns = Turns()
    adapters = _Adapters(server, settings.teacher_server_adapters, settings.seen_by_server)

    @contextmanager
    def base() -> Iterator[TeacherBase]:
        """The base for one update, and nothing of it afterwards."""
        revision = "" if Path(language.source).is_dir() else language.commit
        with _alone(turns, sleeper):
            try:
                yield load_teacher(language.source, revision=revision, device=settings.teacher_device)
            finally:
                gc.collect()
                if torch.cuda.is_available():
                    torch.cuda.empty_cache()
                if sleeper is not None:
                    adapters.doubt()

    author = _ServedAuthor(server, language, model.max_model_len, adapters, turns, sleeper)
    return Backend(language.source, language.commit, author, LoraTrainer(language, base), server.close)


def _check(server: InferenceServer, language: Language) -> ServedModel:
    facts = server.check()
    if facts.kind != "vllm":
        raise PreceptorError("SERVER_TOO_OLD", f"{server.url} is no vLLM server; the backend `vllm` needs one")
    bases = [model for model in facts.models if not model.parent]
    model = facts.model(server.model) if server.model else bases[0] if len(bases) == 1 else None
    if model is None:  # check has looked for one that is named
        names = ", ".join(base.id for base in bases)
        raise PreceptorError("MODEL_NOT_SERVED", f"{server.url} serves {names}: say which is the teacher's")
    server.model = model.id
    theirs, ours = server.tokens(_SAMPLE), language.prompt_ids(_SAMPLE)
    if theirs != ours:
        raise PreceptorError(
            "MODEL_NOT_SERVED",
            f"{server.url} serves {model.root} as {model.id!r}, whose tokenizer is not that of {language.source}",
        )
    log.info("vLLM %s at %s serves %s as %s", facts.version, server.url, model.root, model.id)
    return model


class Turns:
    """One policy at a time, or an update: in the order in which they ask, batches of one policy together."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._waiting: deque[object] = deque()
        self._now = ""
        self._number = 0

    @contextmanager
    def turn(self, of: str, stopped: Callable[[], bool] = lambda: False, *, alone: bool = False) -> Iterator[None]:
        """Lasts as long as the context. Raises PreceptorError(CANCELLED) when ``stopped`` says so first."""
        ticket = object()
        with self._changed:
            self._waiting.append(ticket)
            try:
                while self._waiting[0] is not ticket or (self._number and (alone or self._now != of)):
                    self._changed.wait(0.1)
                    if stopped():
                        raise PreceptorError("CANCELLED", "the client went away while it waited for the teacher")
                self._now = of
                self._number += 1
            finally:
                self._waiting.remove(ticket)
                self._changed.notify_all()
        try:
            yield
        finally:
            with self._changed:
                self._number -= 1
                self._changed.notify_all()


class _Sleeper:
    """Puts the server to sleep and is sure that it is awake again."""

    def __init__(self, server: InferenceServer) -> None:
        self._server = server
        self.awake = False
        if server.sleeping():
            log.warning("%s sleeps; the teacher that put it to sleep has died", server.url)
        self.wake()

    def sleep(self) -> None:
        self.awake = False
        self._server.sleep()

    def wake(self) -> None:
        """Wakes it where it may sleep. Raises what the server says."""
        if not self.awake:
            self._server.wake()
            self.awake = True


@contextmanager
def _alone(turns: Turns, sleeper: _Sleeper | None) -> Iterator[None]:
    """The device for an update: nobody writes meanwhile where it is the server's too."""
    if sleeper is None:
        yield
        return
    with turns.turn("an update", alone=True):
        try:
            sleeper.sleep()
            yield
        finally:
            try:
                sleeper.wake()
            except PreceptorError as error:  # whoever writes next wakes it, or says why not
                log.error("%s", error)


class _Adapters:
    """The policies that the server holds, the least recently used given up first. One thread at a time."""

    def __init__(self, server: InferenceServer, room: int, seen: Callable[[Path], str]) -> None:
        self._server = server
        self._room = room
        self._seen = seen
        self._lock = threading.Lock()
        self._loaded: OrderedDict[str, bool] | None = None  # name -> whether it was seen to be at work

    def ready(self, sha256: str, folder: Path) -> str:
        """The name under which the server has this adapter. Raises what ``InferenceServer.load_adapter`` does."""
        name = f"{_PREFIX}{sha256[:40]}"
        with self._lock:
            if self._loaded is None:  # some may be left of the teacher before
                self._loaded = OrderedDict((n, False) for n in self._server.adapters() if n.startswith(_PREFIX))
            if not self._loaded.get(name, False):
                self._loaded.pop(name, None)
                while len(self._loaded) >= self._room:
                    self._server.unload_adapter(next(iter(self._loaded)))
                    self._loaded.popitem(last=False)
                self._load(name, folder)
                self._loaded[name] = True
            self._loaded.move_to_end(name)
            return name

    def _load(self, name: str, folder: Path) -> None:
        asked = (name, self._seen(folder), read_probe(folder))
        try:
            self._server.load_adapter(*asked)
        except PreceptorError as error:
            if error.reason != "ADAPTER_MISMATCH":
                raise
            log.warning("%s", error)  # one that was there already may have been lost in the server's sleep
            self._server.load_adapter(*asked)

    def doubt(self) -> None:
        """The server may have lost weights: all are looked at again before they are used."""
        with self._lock:
            self._loaded = None


class _ServedAuthor:
    """See ``teacher.backend.Author``."""

    def __init__(
        self,
        server: InferenceServer,
        language: Language,
        max_model_len: int,
        adapters: _Adapters,
        turns: Turns,
        sleeper: _Sleeper | None,
    ) -> None:
        self._server = server
        self._language = language
        self._context = min(language.context, max_model_len or language.context)
        self._adapters = adapters
        self._turns = turns
        self._sleeper = sleeper

    def prompt_tokens(self, prompt: str) -> int:
        return len(self._language.prompt_ids(prompt))

    @property
    def context(self) -> int:
        return self._context

    @contextmanager
    def writing(
        self, policy: Policy, adapter: Callable[[], Path | None], stopped: Callable[[], bool]
    ) -> Iterator[Draw]:
        with self._turns.turn(policy.adapter_sha256, stopped):
            # for each batch, so that it is there when a server that was restarted wants it; now, for a copy of what
            # lies in a bucket may have left while another had its turn
            folder = adapter()
            if self._sleeper is not None:
                self._sleeper.wake()
            model = self._server.model if folder is None else self._adapters.ready(policy.adapter_sha256, folder)
            yield lambda *asked: self._draw(model, *asked)

    def _draw(
        self,
        model: str,
        rows: Sequence[Row],
        seed: int,
        settings: SamplingSettings,
        stopped: Callable[[], bool],
    ) -> list[Drawn]:
        ids = {prompt: self._language.prompt_ids(prompt) for prompt in {row.prompt for row in rows}}
        prompts = [ids[row.prompt] for row in rows]
        completed = self._server.complete(
            prompts,
            model=model,
            max_tokens=[min(settings.max_new_tokens, self._context - len(prompt)) for prompt in prompts],
            temperature=settings.temperature,
            top_p=settings.top_p,
            seeds=[server_seed(seed, row) for row in rows],
            stop_token_ids=sorted(self._language.end_ids),
            stopped=stopped,
        )
        return [Drawn(self._language.text(one.token_ids), len(one.token_ids), one.finished) for one in completed]


def server_seed(seed: int, row: Row) -> int:
    """The seed of one row, 0..2^63-1."""
    return int.from_bytes(row_digest(seed, row.task_id, row.sample, row.draw)[:8], "little") >> 1
