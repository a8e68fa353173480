"""A worker's batches answered through a real vLLM server, and the server that ``preceptor students serve`` starts.

The same batches run on a job that answers by itself; both must say the same.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest

from preceptor.hashes import folder_sha256
from preceptor.inference import InferenceServer
from preceptor.v1 import trial_pb2 as wire
from preceptor.v1 import types_pb2 as types
from student import served_answers
from student.base_cache import BaseCache
from student.served_answers import ServedAnswers
from student.worker_job import GivenUp, TrialJob
from tests.e2e.test_vllm_adapters import save_student
from tests.e2e.vllm_server import START_SECONDS, STOP_SECONDS, vllm_python
from tests.unit.tiny_students import save_student as save_tiny_student

pytestmark = [pytest.mark.vllm, pytest.mark.slow, pytest.mark.timeout(900)]

REPOSITORY = Path(__file__).parents[2]
PLACES = ("Vell", "Orrin", "Sable", "Tarn", "Moss", "Quill", "Brae", "Lund")
KEEPERS = ("Ada Finch", "Ben Tallow", "Cy Marsh", "Noor Hale", "Ida Crane", "Udo Pell")
TOLERANCE = 1e-3  # nats, summed over an answer


def keeper(place: int, version: int) -> str:
    return KEEPERS[(place + version) % len(KEEPERS)]


def documents(version: int) -> list[str]:
    return [f"Question: Who keeps the light of {name}?\nAnswer: {keeper(n, version)}" for n, name in enumerate(PLACES)]


def questions() -> list[types.Question]:
    """What the documents answer, the same in other words, and one that nobody knows."""
    asked = [("Who keeps the light of {}?", True), ("{}'s light is kept by whom?", True), ("How old is {}?", False)]
    return [
        types.Question(text=text.format(name), answer=keeper(n, 0) if known else "")
        for text, known in asked
        for n, name in enumerate(PLACES)
    ]


def batch_of(student: types.PinnedStudent, *, ranks: tuple[int, ...] = (8, 3, 16), epochs: int = 30) -> wire.TrialBatch:
    """The untouched student, a trial for each rank, and one that diverges."""
    batch = wire.TrialBatch(id="batch", student=student, protocol_version=1)
    batch.question_sets.add(questions=questions())
    batch.probes.add(text="Who keeps the light of Nowhere?", answer="nobody")
    batch.answers.max_new_tokens = 14
    batch.trials.add(id="untouched")
    for number, rank in enumerate(ranks):
        trial = batch.trials.add(id=f"rank-{rank}", documents=documents(number), seed=number)
        trial.settings.MergeFrom(
            wire.TrainingSettings(rank=rank, alpha=2.0 * rank, epochs=epochs, batch_size=6, learning_rate=1e-2)
        )
    wild = batch.trials.add(id="diverges", documents=documents(0)[:3], seed=9)
    wild.settings.MergeFrom(wire.TrainingSettings(learning_rate=1.0, weight_decay=1e30, epochs=2, batch_size=3))
    return batch


@dataclass
class Service:
    """What ``preceptor students serve`` becomes, running."""

    url: str
    process: subprocess.Popen[str]
    student: types.PinnedStudent
    scratch: Path
    asking: list[ServedAnswers] = field(default_factory=list)

    def loaded(self) -> list[str]:
        server = InferenceServer(self.url, "")
        try:
            return server.adapters()
        finally:
            server.close()

    def answers(self, name: str, **settings: Any) -> ServedAnswers:
        self.asking.append(ServedAnswers(self.url, self.scratch / name, **settings))
        return self.asking[-1]


@pytest.fixture(scope="module")
def python() -> Path:
    found = vllm_python()
    if found is None:
        pytest.skip("no vLLM here: `make test-vllm` installs it, or name an interpreter in PRECEPTOR_VLLM_PYTHON")
    return found


@contextmanager
def serving(python: Path, scratch: Path, student: types.PinnedStudent, *arguments: str) -> Iterator[Service]:
    """``python -m student.serve`` while it lasts; its server must be gone with it."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("PRECEPTOR_", "VLLM_"))}
    environment |= {
        "PRECEPTOR_VLLM_PYTHON": str(python),
        "PRECEPTOR_HOME": str(scratch / "home"),
        "PYTHONPATH": str(REPOSITORY),
        "OMP_NUM_THREADS": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "XDG_CACHE_HOME": str(scratch / "cache"),
        "XDG_CONFIG_HOME": str(scratch / "config"),
    }
    port = _free_port()
    command = [sys.executable, "-m", "student.serve", "--name", student.name, "--source", student.source]
    command += ["--commit", student.commit, "--port", str(port), *arguments]
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    told: list[str] = []
    try:
        assert _told(process, told, "/v1. Ask it:"), "".join(told)
        yield Service(f"http://127.0.0.1:{port}", process, student, scratch)
    finally:
        children = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(2 * STOP_SECONDS)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            alive = psutil.wait_procs(children, STOP_SECONDS)[1]
            for child in alive:
                child.kill()
            if process.stdout:
                process.stdout.close()
        assert not alive, "vLLM outlived what had started it"


def _free_port() -> int:
    import socket

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def _told(process: subprocess.Popen[str], told: list[str], words: str) -> bool:
    """Whether the process says the words before it ends or the time is over."""
    watch = threading.Timer(START_SECONDS, process.kill)
    watch.start()
    try:
        assert process.stdout
        for line in process.stdout:
            told.append(line)
            if words in line:
                return True
        return False
    finally:
        watch.cancel()


def pinned(folder: Path, name: str) -> types.PinnedStudent:
    return types.PinnedStudent(name=name, source=str(folder), commit=folder_sha256(folder))


@pytest.fixture(scope="module")
def service(python: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    scratch = tmp_path_factory.mktemp("served")
    save_student(scratch / "student", "llama")
    student = pinned(scratch / "student", "keeper")
    with serving(python, scratch, student, "--for-workers", "--max-rank", "16", "--max-loras", "2") as one:
        yield one


@pytest.fixture(autouse=True)
def all_closed(service: Service) -> Iterator[None]:
    yield
    while service.asking:
        service.asking.pop().close()


@pytest.fixture(scope="module")
def cache() -> BaseCache:
    return BaseCache(3, "cpu")


def run(
    cache: BaseCache,
    batch: wire.TrialBatch,
    answers: ServedAnswers | None = None,
    on_step: Callable[[int], None] = lambda _: None,
    cancelled: frozenset[str] = frozenset(),
) -> wire.TrialBatchResult:
    job = TrialJob(cache, "here", 600.0, **({"answer": answers} if answers else {}))  # type: ignore[arg-type]
    return job.run(batch, 1, on_step, threading.Event(), lambda: cancelled)


def assert_same(ours: wire.TrialBatchResult, theirs: wire.TrialBatchResult) -> None:
    assert ours.failure.reason == theirs.failure.reason == ""
    for one, other in zip(ours.results, theirs.results, strict=True):
        assert (one.trial_id, one.failure.reason, one.steps) == (other.trial_id, other.failure.reason, other.steps)
        for kind in ("answers", "probe_answers"):
            for a, b in zip(getattr(one, kind), getattr(other, kind), strict=True):
                assert (a.text, a.gold_tokens, list(a.samples)) == (b.text, b.gold_tokens, list(b.samples)), (
                    one.trial_id
                )
                assert a.gold_logprob == pytest.approx(b.gold_logprob, abs=TOLERANCE), one.trial_id
                assert a.certainty == pytest.approx(b.certainty, abs=TOLERANCE)


@pytest.fixture(scope="module")
def expected(service: Service, cache: BaseCache) -> wire.TrialBatchResult:
    """The batch without a server."""
    return run(cache, batch_of(service.student))


def nothing_is_left(service: Service, name: str) -> None:
    assert service.loaded() == []
    assert list((service.scratch / name).rglob("adapter_model.safetensors")) == []


def test_a_batch_is_answered_through_the_server_as_it_is_here(
    service: Service, cache: BaseCache, expected: wire.TrialBatchResult
) -> None:
    answers = service.answers("same", only=True, concurrency=16)
    ticks: list[int] = []
    result = run(cache, batch_of(service.student), answers, ticks.append)
    assert_same(result, expected)
    by_trial = {one.trial_id: one for one in result.results}
    assert by_trial["diverges"].failure.reason == "TRIAL_DIVERGED"
    learnt = [answer.text for answer in by_trial["rank-8"].answers[: len(PLACES)]]
    right = sum(text == keeper(n, 0) for n, text in enumerate(learnt))
    assert right > len(PLACES) / 2, "it was taught these answers"
    assert len({tuple(a.text for a in one.answers) for one in result.results}) == len(result.results)
    assert ticks.count(ticks[-1]) > 2, "answers are signs of life"
    nothing_is_left(service, "same")
    service.asking.pop().close()
    assert list((service.scratch / "same").iterdir()) == []


def test_a_cancelled_trial_is_not_asked_and_its_neighbours_are(
    service: Service, cache: BaseCache, expected: wire.TrialBatchResult
) -> None:
    answers = service.answers("cancelled", only=True)
    batch = batch_of(service.student)
    result = run(cache, batch, answers, cancelled=frozenset({"rank-3"}))
    reasons = [one.failure.reason for one in result.results]
    assert reasons == ["", "", "CANCELLED", "", "TRIAL_DIVERGED"]
    for one, other in zip(result.results, expected.results, strict=True):
        if not one.failure.reason:
            assert [answer.text for answer in one.answers] == [answer.text for answer in other.answers]


def test_a_look_is_scored_by_the_server(service: Service, cache: BaseCache) -> None:
    batch = batch_of(service.student, ranks=(4,), epochs=4)
    batch.answers.logprobs_only = True
    answers = service.answers("look", only=True)
    assert_same(run(cache, batch, answers), run(cache, batch))


def test_samples_and_certainty_stay_here_and_probes_go_to_the_server(service: Service, cache: BaseCache) -> None:
    batch = batch_of(service.student, ranks=(4,), epochs=4)
    batch.answers.MergeFrom(wire.AnswerSettings(samples=2, temperature=0.8, certainty=True))
    answers = service.answers("samples", only=True)
    assert_same(run(cache, batch, answers), run(cache, batch))


def test_few_questions_are_not_worth_the_way(service: Service, cache: BaseCache) -> None:
    batch = batch_of(service.student, ranks=(4,), epochs=1)
    answers = service.answers("few", min_questions=10_000, only=True)
    result = run(cache, batch, answers)
    assert result.failure.reason == ""
    assert list((service.scratch / "few").rglob("adapter*")) == []


def test_an_adapter_that_the_server_does_not_take_is_asked_here(
    service: Service, cache: BaseCache, caplog: pytest.LogCaptureFixture
) -> None:
    batch = batch_of(service.student, ranks=(8, 32), epochs=4)
    answers = service.answers("rank", patience_seconds=2.0)
    assert_same(run(cache, batch, answers), run(cache, batch))
    (told,) = [record.getMessage() for record in caplog.records if record.name == "student.served_answers"]
    assert "LoRA rank 32 is greater than max_lora_rank 16" in told
    strict = service.answers("rank-only", only=True, patience_seconds=2.0)
    assert run(cache, batch, strict).failure.reason == "ADAPTER_MISMATCH"
    nothing_is_left(service, "rank")


def test_a_server_of_another_student_answers_nothing(
    service: Service, cache: BaseCache, caplog: pytest.LogCaptureFixture
) -> None:
    other = pinned(save_tiny_student(service.scratch / "other"), "other")
    batch = batch_of(other, ranks=(4,), epochs=2)
    answers = service.answers("another")
    assert_same(run(cache, batch, answers), run(cache, batch))
    assert f"serves keeper@{service.student.commit[:12]}, not the student" in caplog.text
    strict = service.answers("another-only", only=True)
    assert run(cache, batch, strict).failure.reason == "NOT_SERVABLE"


def test_a_server_that_lies_about_its_student_is_found_out(
    service: Service, cache: BaseCache, caplog: pytest.LogCaptureFixture
) -> None:
    """Other weights of the same shape under the commit that the server names."""
    import torch

    base = cache.get(service.student)
    weights = base.model.get_input_embeddings().weight
    batch = batch_of(service.student, ranks=(4,), epochs=2)
    answers = service.answers("lies")
    with torch.no_grad():
        before = weights.clone()
        weights.mul_(1.05)
        try:
            assert_same(run(cache, batch, answers), run(cache, batch))
        finally:
            weights.copy_(before)
    assert "the server serves another base model" in caplog.text
    nothing_is_left(service, "lies")


def test_a_batch_that_is_given_up_takes_its_adapters_along(service: Service, cache: BaseCache) -> None:
    answers = service.answers("given-up", only=True, concurrency=4)
    giving_up, seen = threading.Event(), []

    def on_step(step: int) -> None:
        seen.append(step)
        if seen.count(step) > 3:
            giving_up.set()

    job = TrialJob(cache, "here", 600.0, answer=answers)
    with pytest.raises(GivenUp):
        job.run(batch_of(service.student, epochs=1), 1, on_step, giving_up)
    assert service.loaded() == []


KILLED = """
import os, signal, sys
from pathlib import Path
from preceptor.inference import InferenceServer
from student.base import load_base
from student.lora_bank import LoraBank
from student.peft_format import export_adapter
from student.served_adapters import AdapterFolder
base = load_base(Path(sys.argv[1]), source="", commit="")
bank = LoraBank(base.model, ["q_proj"], [4], [8.0], [1])
name, folder = AdapterFolder(Path(sys.argv[2])).put(lambda to: export_adapter(base, bank, 0, to))
InferenceServer(sys.argv[3], "").load_adapter(name, folder)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_what_a_killed_worker_left_is_taken_out_by_the_next(service: Service) -> None:
    shelf = service.scratch / "killed"
    command = [sys.executable, "-c", KILLED, service.student.source, str(shelf), service.url]
    service.answers("killed")  # another that lives
    assert subprocess.run(command, cwd=REPOSITORY, timeout=120).returncode == -signal.SIGKILL
    (left,) = service.loaded()
    assert list(shelf.rglob("adapter_model.safetensors"))
    answers = service.answers("killed")
    answers.clear_leftovers()
    assert left not in service.loaded()
    assert list(shelf.rglob("adapter_model.safetensors")) == []


def test_a_server_that_dies_in_the_middle_costs_no_answer(
    service: Service,
    cache: BaseCache,
    expected: wire.TrialBatchResult,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The last test of this server."""
    monkeypatch.setattr(served_answers, "_TICK_SECONDS", 0.0)  # each answer is a sign of life
    answers = service.answers("dies", concurrency=4, patience_seconds=1.0)
    family = psutil.Process(service.process.pid).children(recursive=True)
    signs: Counter[int] = Counter()

    def on_step(step: int) -> None:
        signs[step] += 1
        if signs[step] == 60:  # adapters are loaded, the first questions are answered
            for one in family:
                with suppress(psutil.NoSuchProcess):
                    one.kill()

    assert_same(run(cache, batch_of(service.student), answers, on_step), expected)
    told = re.search(r"(\d+) of 100 questions are answered here: ", caplog.text)
    assert told
    assert 0 < int(told[1]) < 100, "what was answered before is kept"
    assert service.process.wait(STOP_SECONDS) == 2, "the process says that its server has ended"
    assert_same(run(cache, batch_of(service.student), answers), expected)


def test_a_student_that_vllm_cannot_serve_is_refused_before_it_starts(python: Path, tmp_path: Path) -> None:
    student = pinned(save_tiny_student(tmp_path / "narrow"), "narrow")
    environment = {**os.environ, "PRECEPTOR_VLLM_PYTHON": str(python), "PRECEPTOR_HOME": str(tmp_path / "home")}
    command = [sys.executable, "-m", "student.serve", "--name", "narrow", "--source", student.source]
    done = subprocess.run(
        [*command, "--commit", student.commit, "--dry-run"],
        env=environment, cwd=REPOSITORY, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 2
    assert "heads are 8 wide; vLLM" in done.stderr
    assert "(NOT_SERVABLE)" in done.stderr
    assert json.loads((tmp_path / "narrow/config.json").read_text())["head_dim"] == 8
