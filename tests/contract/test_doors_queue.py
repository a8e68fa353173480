"""What comes out of Redis: batches as a worker reads them, results and leases as the evaluator does.

Promised: a worker answers every payload with a result, whose failures name reasons of the catalogue, and takes the next
one; whatever stands where a result or a lease should stand, the dispatcher goes on, and the evaluation ends after a few
attempts with a reward that is a number or with a reason.
"""

from __future__ import annotations

import json
import math
import threading
from base64 import b64decode
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import redis
from hypothesis import strategies as st

from evaluator.broker import RedisBroker
from preceptor.artifacts import folder_sha256
from preceptor.errors import CATALOGUE, PreceptorError
from preceptor.leases import LeaseBoard, WorkerStatus
from preceptor.names import split_task_id
from preceptor.queue import batch_from_payload, make_app, to_payload
from preceptor.v1 import evaluator_pb2 as evaluator
from preceptor.v1 import trial_pb2 as trial
from preceptor.v1 import types_pb2 as types
from student.base_cache import BaseCache
from student.deployment import DeploymentBoard
from student.worker_job import TrialJob
from tests.contract.test_doors_services import broker_url  # noqa: F401 - a fixture
from tests.doors import damaged, damages, knock, messages, texts
from tests.evaluator_house import House
from tests.scripted_trials import answer_batch
from tests.unit.test_doors_files import as_text, damaged_json
from tests.unit.tiny_students import save_student

pytestmark = pytest.mark.filterwarnings("ignore::hypothesis.errors.HypothesisWarning")

# Of a failure that a worker reports: it is nobody's fault but the payload's, or it may pass.
UNEXPECTED = "TRIAL_FAILED"


def good_batch(pinned: types.PinnedStudent) -> trial.TrialBatch:
    """Two trials with something in every field."""
    asked = types.Question(text="Where is Ada?", answer="Rome", aliases=["Roma"], bank=types.QUESTION_BANK_GATE)
    settings = trial.TrainingSettings(
        rank=2, alpha=4, target_modules=["q_proj", "v_proj"], learning_rate=1e-3, epochs=1, batch_size=2,
        warmup_share=0.1, schedule="cosine", weight_decay=0.1, max_grad_norm=1, replay_share=0.5,
        loss_mask=types.LOSS_MASK_AFTER_MARKER, loss_marker="Answer:", max_train_tokens=500, max_document_tokens=100,
        gradient_accumulation=1, max_steps=2, pad_to=16,
    )  # fmt: skip
    return trial.TrialBatch(
        id="batch",
        student=pinned,
        trials=[
            trial.Trial(id="a", documents=["Ada is in Rome.", "Tom: Answer: smith"], settings=settings, seed=7),
            trial.Trial(id="baseline", settings=settings, seed=7),
        ],
        question_sets=[trial.QuestionSet(questions=[asked])],
        probes=[types.Question(text="Old?", answer="yes")],
        replay_documents=["Old knowledge."],
        answers=trial.AnswerSettings(
            prompt="Q: {question}\nA:", max_new_tokens=4, samples=1, temperature=0.9, certainty=True
        ),
        protocol_version=1,
    )


@pytest.fixture(scope="module")
def pinned(tmp_path_factory: pytest.TempPathFactory) -> types.PinnedStudent:
    folder = save_student(tmp_path_factory.mktemp("student"))
    return types.PinnedStudent(name="tiny", source=str(folder), commit=folder_sha256(folder))


def no_hub(name: str, commit: str) -> Path:
    """No test asks the hub."""
    raise PreceptorError("MODEL_UNREACHABLE", f"the hub could not be asked for {name} at {commit}"[:200])


def test_payloads_of_batches(pinned: types.PinnedStudent, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda name, **_: no_hub(name, ""))
    good = good_batch(pinned)
    job = TrialJob(BaseCache(1, "cpu"), "here:1", batch_seconds=5)

    def work(payload: Any) -> str:
        try:
            batch = batch_from_payload(payload)
        except PreceptorError as refused:
            return refused.reason
        result = job.run(batch, 1, lambda _step: None, threading.Event())
        result.SerializeToString()
        failures = [result.failure, *(one.failure for one in result.results)]
        reasons = {failure.reason for failure in failures if failure.reason}
        assert reasons <= CATALOGUE.keys()
        assert UNEXPECTED not in reasons, failures
        if not reasons:
            assert [one.trial_id for one in result.results] == [one.id for one in batch.trials]
            numbers = [answer.gold_logprob for one in result.results for answer in one.answers]
            assert all(map(math.isfinite, numbers))
        return min(reasons, default="OK")

    assert work(to_payload(good)) == "OK"
    inputs = st.one_of(messages(good).map(to_payload), damaged_json(to_payload(good)))
    knock("queue: batch", inputs, work, often=100)
    assert work(to_payload(good)) == "OK"


@pytest.fixture
def house(tmp_path: Path, broker_url: str) -> Iterator[tuple[House, redis.Redis]]:  # noqa: F811
    client = redis.Redis.from_url(broker_url)
    client.flushall()
    broker = RedisBroker(broker_url)
    made = House(tmp_path / "evaluator.db", broker)  # type: ignore[arg-type]
    yield made, client
    made.close()
    broker.close()
    client.close()


FINAL = (evaluator.EVALUATION_STATE_SUCCEEDED, evaluator.EVALUATION_STATE_FAILED)


def test_results_and_leases(house: tuple[House, redis.Redis], broker_url: str) -> None:  # noqa: F811
    bench, client = house
    app = make_app(broker_url)
    key_of = app.backend.get_key_for_task
    numbers = iter(range(10**9))
    # What the worker would have said, damaged later: only now is it known which trials there are.
    stored = st.one_of(
        st.tuples(st.just("message"), st.lists(damages, min_size=1, max_size=3)),
        st.tuples(st.just("bytes"), as_text({"status": "SUCCESS", "result": {"results": []}, "task_id": "x"})),
    )

    def answer(data: tuple[tuple[str, Any], str]) -> str:
        (kind, how), garbage = data
        made = bench.create(f"Ada {next(numbers)}.", probes=1)
        for turn in range(12):
            bench.step(1)
            waiting = client.lrange("trials", 0, -1)
            client.delete("trials")
            for raw in waiting:
                message = json.loads(raw)
                task_id = message["headers"]["id"]
                batch_id, attempt = split_task_id(task_id)
                client.set(f"preceptor:fence:{batch_id}", attempt if turn else garbage)
                if not turn:
                    client.set(f"preceptor:lease:{task_id}", garbage)
                client.sadd("preceptor:workers", "w")
                client.set("preceptor:worker:w", garbage)
                bench.step(1)
                batch = batch_from_payload(json.loads(b64decode(message["body"]))[0][0])
                result: Any = answer_batch(batch)
                if kind == "message":
                    value = json.dumps({"status": "SUCCESS", "result": to_payload(damaged(result, how))}).encode()
                else:
                    value = how
                client.set(key_of(task_id), value)
            bench.step(1)
            [state] = bench.states(made)
            if state in FINAL:
                break
            bench.step(70)  # no lease can be read, so the batch is lost
        else:
            raise AssertionError("no final state after 12 attempts")
        [evaluation] = [bench.evaluations.get(one.id) for one in made]
        if evaluation.HasField("failure"):
            assert evaluation.failure.reason in CATALOGUE
            return evaluation.failure.reason
        values = (evaluation.reward.value, evaluation.reward.stderr, *evaluation.reward.terms.values())
        assert all(map(math.isfinite, values)), evaluation
        return "OK"

    knock("queue: results and leases", st.tuples(stored, texts), answer, often=60)
    app.close()


def test_what_workers_and_the_student_service_leave_in_redis(broker_url: str) -> None:  # noqa: F811
    leases, board = LeaseBoard(broker_url), DeploymentBoard(broker_url)
    status = asdict(WorkerStatus("w", ("c0ffee",), "batch.1", 3, 4, 500))
    wanted = {"name": "tiny", "source": "/models/tiny", "commit": "c0ffee"}
    client = redis.Redis.from_url(broker_url)
    client.sadd("preceptor:workers", "w")

    def answer(data: tuple[bytes, bytes, bytes, str]) -> str:
        client.sadd("preceptor:workers", "w")
        client.set("preceptor:worker:w", data[0])
        client.set("preceptor:student:wanted", data[1])
        client.set("preceptor:student:failure:c0ffee", data[2])
        client.set("preceptor:lease:batch.1", data[3])
        client.set("preceptor:fence:batch", data[3])
        held = leases.holders(["batch.1"])
        evaluator.Attempt(steps_done=sum(lease.steps_done for lease in held.values()))
        for number in leases.begun(["batch"]).values():
            evaluator.Attempt(number=min(number, 2**32 - 1))
        seen = leases.workers()
        for worker in seen:
            evaluator.WorkerReport(
                name=worker.name, steps_done=worker.steps_done, peak_memory_bytes=worker.peak_memory_bytes
            )
        pinned, state = board.wanted(), board.status("c0ffee").state
        return "OK" if seen or pinned or state != "FAILED" else "passed over"

    inputs = st.tuples(as_text(status), as_text(wanted), as_text(["TRIAL_DIVERGED", "message"]), texts)
    knock("queue: what else is in Redis", inputs, answer, often=60)
    client.close()
