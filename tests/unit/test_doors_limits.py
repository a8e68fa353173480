"""Each limit of a request: what is at it is taken, what is one beyond is refused by its place. And what doors have let
through before, with the least input that did.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from google.protobuf.message import Message

from evaluator.graders.chat import _content as content_of
from evaluator.graders.grader import Given
from evaluator.graders.judge import read_verdict
from evaluator.graders.rack import WITHOUT_A_JUDGE
from evaluator.outcomes import outcomes_of
from evaluator.request import check_student, read_answers, read_request
from orchestrator.validation import validated
from preceptor import limits
from preceptor.completions import Limits, MalformedSelfEdit, parse
from preceptor.config import RunConfig, load_config
from preceptor.errors import PreceptorError
from preceptor.limits import check_name, page_size, page_token
from preceptor.names import task_id
from preceptor.self_edit_files import read_self_edits
from preceptor.server import to_status
from preceptor.task_files import read_probes, read_replay, read_task_file
from preceptor.tasks import Question
from preceptor.v1 import evaluator_pb2 as evaluator
from preceptor.v1 import orchestrator_pb2 as orchestrator
from preceptor.v1 import teacher_pb2 as teacher
from preceptor.v1 import trial_pb2 as trial
from preceptor.v1 import types_pb2 as types
from student.payload import answering_of, settings_of
from student.source import fetch, inspect
from teacher.servicer import update, writing_request
from tests.evaluation_requests import group
from tests.orchestrated import create_request

Change = Callable[[Any, int], object]


def field_of(act: Callable[[], object]) -> str:
    """Where the refusal puts the fault; empty where there is none."""
    try:
        act()
    except PreceptorError as error:
        return error.metadata.get("field", "?")
    return ""


def setter(path: str) -> Change:
    """Sets a field, given by its path."""

    def change(message: Any, value: Any) -> None:
        *outer, last = path.split(".")
        for name in outer:
            message = message[int(name)] if name.isdigit() else getattr(message, name)
        setattr(message, last, value)

    return change


def text(path: str) -> Change:
    return lambda message, length: setter(path)(message, "x" * length)


def more_questions(message: Any, count: int) -> None:
    questions = message.task.passage.questions
    questions.extend(
        types.Question(text=f"{i} and so on?", answer="a", bank=types.QUESTION_BANK_REWARD) for i in range(count - 2)
    )


def more_edits(message: Any, count: int) -> None:
    message.self_edits.extend(types.SelfEdit(documents=[f"x {i}"]) for i in range(count - 1))


CREATE: dict[str, tuple[Change, int, str]] = {
    "request_id": (text("request_id"), limits.MAX_NAME_CHARACTERS, "request_id"),
    "owner": (text("owner"), limits.MAX_NAME_CHARACTERS, "owner"),
    "task id": (text("task.id"), limits.MAX_NAME_CHARACTERS, "task.id"),
    "title": (text("task.passage.title"), limits.MAX_TITLE_CHARACTERS, "task.passage.title"),
    "text": (text("task.passage.text"), limits.MAX_TEXT_CHARACTERS, "task.passage.text"),
    "question": (
        text("task.passage.questions.0.text"), limits.MAX_QUESTION_CHARACTERS, "task.passage.questions[0]"
    ),
    "aliases": (
        lambda message, count: message.task.passage.questions[0].aliases.extend(["b"] * count),
        limits.MAX_ALIASES, "task.passage.questions[0].aliases",
    ),
    "questions": (more_questions, limits.MAX_QUESTIONS, "task.passage.questions"),
    "labels": (
        lambda message, count: message.task.labels.update({f"l{i}": "x" for i in range(count - 1)}),
        limits.MAX_LABELS, "task.labels",
    ),
    "self-edits": (more_edits, limits.MAX_SELF_EDITS, "self_edits"),
    "documents": (
        lambda message, count: message.self_edits[0].documents.extend(["x"] * (count - 1)),
        limits.MAX_DOCUMENTS, "self_edits[0].documents",
    ),
    "document": (
        lambda message, count: message.self_edits[0].documents.append("x" * (count - len("Ada lives in Lisbon."))),
        limits.MAX_TEXT_CHARACTERS, "self_edits[0].documents",
    ),
    "seeds": (
        lambda message, count: message.protocol.seeds.extend(range(2, count + 1)), limits.MAX_SEEDS, "protocol.seeds"
    ),
    "probes": (
        lambda message, count: message.protocol.probes.extend([message.protocol.probes[0]] * (count - 2)),
        limits.MAX_PROBES, "protocol.probes",
    ),
    "replay": (
        lambda message, count: message.protocol.replay_documents.extend(["x"] * count),
        limits.MAX_REPLAY_DOCUMENTS, "protocol.replay_documents",
    ),
    "rank": (setter("protocol.training.rank"), limits.MAX_RANK, "protocol.training.rank"),
    "epochs": (setter("protocol.training.epochs"), limits.MAX_EPOCHS, "protocol.training.epochs"),
    "batch size": (setter("protocol.training.batch_size"), limits.MAX_BATCH_SIZE, "protocol.training.batch_size"),
    "alpha": (setter("protocol.training.alpha"), int(limits.MAX_ALPHA), "protocol.training.alpha"),
    "modules": (
        lambda message, count: message.protocol.training.target_modules.extend(f"m{i}" for i in range(count)),
        limits.MAX_TARGET_MODULES, "protocol.training.target_modules",
    ),
    "marker": (
        text("protocol.training.loss_marker"), limits.MAX_NAME_CHARACTERS, "protocol.training.loss_marker"
    ),
    "new tokens": (
        setter("protocol.answers.max_new_tokens"), limits.MAX_NEW_TOKENS, "protocol.answers.max_new_tokens"
    ),
    "samples": (setter("protocol.answers.samples"), limits.MAX_SAMPLES, "protocol.answers.samples"),
    "temperature": (
        setter("protocol.answers.temperature"), int(limits.MAX_TEMPERATURE), "protocol.answers.temperature"
    ),
    "weight": (setter("protocol.weights.gain"), int(limits.MAX_WEIGHT), "protocol.weights.gain"),
}  # fmt: skip


@pytest.mark.parametrize("name", CREATE)
def test_create_evaluations_at_its_limits_and_one_beyond(name: str) -> None:
    change, most, field = CREATE[name]
    for value, wanted in ((most, ""), (most + 1, field)):
        request = group("Ada lives in Lisbon.")
        change(request, value)
        assert field_of(lambda request=request: read_request(request)) == wanted  # type: ignore[misc]


RUN: dict[str, tuple[Change, int, str]] = {
    "request_id": (text("request_id"), limits.MAX_NAME_CHARACTERS, "request_id"),
    "banks": (text("banks"), limits.MAX_TITLE_CHARACTERS, "banks"),
    "title": (text("tasks.0.passage.title"), limits.MAX_TITLE_CHARACTERS, "tasks[0]"),
    "text": (text("tasks.0.passage.text"), limits.MAX_TEXT_CHARACTERS, "tasks[0]"),
    "question": (
        text("tasks.0.passage.questions.0.text"), limits.MAX_QUESTION_CHARACTERS, "tasks[0].passage.questions[0]"
    ),
    "labels": (
        lambda message, count: message.tasks[0].labels.update({f"l{i}": "x" for i in range(count - 1)}),
        limits.MAX_LABELS, "tasks[0]",
    ),
    "reference edits": (
        lambda message, count: [message.tasks[0].reference_edits[f"e{i}"].SetInParent() for i in range(count - 2)],
        limits.MAX_REFERENCE_EDITS, "tasks[0]",
    ),
    "epochs of a reference edit": (
        setter("tasks.0.reference_edits.oracle.directive.epochs"), limits.MAX_EPOCHS, "tasks[0]"
    ),
    "probes": (
        lambda message, count: message.probes.extend([message.probes[0]] * (count - 40)), limits.MAX_PROBES, "probes"
    ),
    "replay": (
        lambda message, count: message.replay_documents.append("x" * (count - len("Old knowledge."))),
        limits.MAX_TEXT_CHARACTERS, "replay_documents",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", RUN)
def test_create_run_at_its_limits_and_one_beyond(name: str) -> None:
    change, most, field = RUN[name]
    for value, wanted in ((most, ""), (most + 1, field)):
        request = create_request()
        if "oracle" in name or name.startswith("epochs"):
            request.tasks[0].reference_edits["oracle"].directive.epochs = value
        else:
            change(request, value)
        request.tasks[0].id = task_id(request.tasks[0])
        assert field_of(lambda request=request: validated(request)) == wanted  # type: ignore[misc]


def written(**fields: Any) -> teacher.GenerateSelfEditsRequest:
    task = types.Task(id="t", passage=types.Passage(title="Ada", text="Ada lives in Lisbon."))
    return teacher.GenerateSelfEditsRequest(tasks=[task], **fields)


def learnt(settings: dict[str, Any], **fields: Any) -> teacher.UpdatePolicyRequest:
    task = types.Task(id="t", passage=types.Passage(title="Ada", text="Ada lives in Lisbon."))
    example = teacher.RewardedSelfEdit(**({"group_id": "g", "task": task, "completion": "x", "reward": 1.0} | fields))
    return teacher.UpdatePolicyRequest(request_id="r", examples=[example], settings=teacher.UpdateSettings(**settings))


@pytest.mark.parametrize(
    ("made", "most", "field"),
    [
        (lambda n: written(samples_per_task=n), limits.MAX_SELF_EDITS, "samples_per_task"),
        (lambda n: written(max_resamples=n), limits.MAX_RESAMPLES, "max_resamples"),
        (
            lambda n: written(sampling=teacher.SamplingSettings(max_new_tokens=n)),
            limits.MAX_COMPLETION_TOKENS,
            "sampling.max_new_tokens",
        ),
        (lambda n: written(limits=teacher.DirectiveLimits(max_rank=n)), limits.MAX_RANK, "limits.max_rank"),
        (lambda n: written(limits=teacher.DirectiveLimits(max_epochs=n)), limits.MAX_EPOCHS, "limits.max_epochs"),
        (lambda n: learnt({"rank": n}), limits.MAX_RANK, "settings.rank"),
        (lambda n: learnt({"epochs": n}), limits.MAX_EPOCHS, "settings.epochs"),
        (lambda n: learnt({"batch_size": n}), limits.MAX_BATCH_SIZE, "settings.batch_size"),
        (lambda n: learnt({}, group_id="g" * n), limits.MAX_NAME_CHARACTERS, "examples[0].group_id"),
        (lambda n: learnt({}, completion="x" * n), limits.MAX_TEXT_CHARACTERS, "examples[0].completion"),
        (lambda n: learnt({}, reward=float(n)), int(limits.MAX_REWARD), "examples[0].reward"),
    ],
)
def test_the_teacher_at_its_limits_and_one_beyond(made: Callable[[int], Message], most: int, field: str) -> None:
    def read(message: Any) -> object:
        return (writing_request if isinstance(message, teacher.GenerateSelfEditsRequest) else update)(message)

    assert field_of(lambda: read(made(most))) == ""
    assert field_of(lambda: read(made(most + 1))) == field


@pytest.mark.parametrize(
    ("made", "most", "field"),
    [
        (lambda n: trial.TrainingSettings(rank=n), limits.MAX_RANK, "rank"),
        (lambda n: trial.TrainingSettings(epochs=n), limits.MAX_EPOCHS, "epochs"),
        (lambda n: trial.TrainingSettings(batch_size=n), limits.MAX_BATCH_SIZE, "batch_size"),
        (lambda n: trial.TrainingSettings(gradient_accumulation=n), limits.MAX_BATCH_SIZE, "gradient_accumulation"),
        (lambda n: trial.TrainingSettings(target_modules=["m"] * n), limits.MAX_TARGET_MODULES, "target_modules"),
        (lambda n: trial.AnswerSettings(max_new_tokens=n), limits.MAX_NEW_TOKENS, "answers.max_new_tokens"),
        (lambda n: trial.AnswerSettings(samples=n), limits.MAX_SAMPLES, "answers.samples"),
    ],
)
def test_a_worker_at_its_limits_and_one_beyond(made: Callable[[int], Message], most: int, field: str) -> None:
    def read(message: Any) -> object:
        return (settings_of if isinstance(message, trial.TrainingSettings) else answering_of)(message)

    assert field_of(lambda: read(made(most))) == ""
    assert field_of(lambda: read(made(most + 1))) == field


def test_grading_at_its_limits_and_one_beyond() -> None:
    asked = types.Question(text="Where?", answer="Lisbon")

    def grading(count: int, characters: int = 1) -> evaluator.GradeAnswersRequest:
        return evaluator.GradeAnswersRequest(questions=[asked] * count, answers=["x" * characters] * count)

    assert len(read_answers(grading(limits.MAX_GRADED))) == limits.MAX_GRADED
    assert field_of(lambda: read_answers(grading(limits.MAX_GRADED + 1))) == "questions"
    assert field_of(lambda: read_answers(grading(49, limits.MAX_QUESTION_CHARACTERS))) == ""
    assert field_of(lambda: read_answers(grading(1, limits.MAX_QUESTION_CHARACTERS + 1))) == "answers[0]"
    assert field_of(lambda: read_answers(grading(50, limits.MAX_QUESTION_CHARACTERS))) == "answers"


def test_a_pinned_student_at_its_limits_and_one_beyond() -> None:
    def pinned(**fields: Any) -> types.PinnedStudent:
        return types.PinnedStudent(**({"name": "tiny", "source": "/tiny", "commit": "c"} | fields))

    adapter = types.Artifact(uri="file:///a", sha256="0")
    for name, made, most in (
        ("name", lambda n: {"name": "n" * n}, limits.MAX_NAME_CHARACTERS),
        ("source", lambda n: {"source": "n" * n}, limits.MAX_SOURCE_CHARACTERS),
        ("adapters", lambda n: {"adapters": [adapter] * n}, limits.MAX_ADAPTERS),
    ):
        assert field_of(lambda n=most, made=made: check_student(pinned(**made(n)))) == ""  # type: ignore[misc]
        beyond = field_of(lambda n=most + 1, made=made: check_student(pinned(**made(n))))  # type: ignore[misc]
        assert beyond == f"student.{name}"


def test_pages() -> None:
    assert (page_size(0), page_size(1000), page_size(1001)) == (100, 1000, 1000)
    assert (page_token(""), page_token("9" * 18)) == (0, 10**18 - 1)
    for token in ("9" * 19, "-1", "٣", "²", " 1", "1.0", "x"):
        assert field_of(lambda token=token: page_token(token)) == "page_token"  # type: ignore[misc]


@pytest.mark.parametrize("name", ["", "\n", "a\0b", "\u202egnitirw", "x" * 257])
def test_a_name_is_printable_and_not_endless(name: str) -> None:
    assert field_of(lambda: check_name("owner", name)) == "owner"


def config(**sections: Any) -> RunConfig:
    return RunConfig.model_validate({"tasks": {"world": "almanac"}, **sections})


@pytest.mark.parametrize(
    ("good", "bad"),
    [
        ({"update": {"rank": 1024}}, {"update": {"rank": 1025}}),
        ({"update": {"epochs": 1024}}, {"update": {"epochs": 1025}}),
        ({"update": {"alpha": 1e6}}, {"update": {"alpha": 1.1e6}}),
        ({"training": {"max_document_tokens": 2**32 - 1}}, {"training": {"max_document_tokens": 2**32}}),
        ({"training": {"max_train_tokens": 2**63 - 1}}, {"training": {"max_train_tokens": 2**63}}),
        ({"training": {"target_modules": ["m"] * 64}}, {"training": {"target_modules": ["m"] * 65}}),
        ({"training": {"loss_marker": "m" * 256}}, {"training": {"loss_marker": "m" * 257}}),
        ({"answers": {"prompt": "{question}".ljust(20_000)}}, {"answers": {"prompt": "{question}".ljust(20_001)}}),
        ({"rounds": {"tasks": 100_000}}, {"rounds": {"tasks": 100_001}}),
        (
            {"rounds": {"self_edits": 1024}, "reward": {"seeds": 8}},
            {"rounds": {"self_edits": 1024}, "reward": {"seeds": 9}},
        ),
        ({"reward": {"probes": 10_000}}, {"reward": {"probes": 10_001}}),
        ({"teacher": {"temperature": 1e-6}}, {"teacher": {"temperature": 1e-7}}),
        ({"tasks": {"path": "x" * 4096}}, {"tasks": {"path": "x" * 4097}}),
        ({"tasks": {"path": "x"}}, {"tasks": {"path": "x\0"}}),
    ],
)  # fmt: skip
def test_a_config_at_its_limits_and_one_beyond(good: dict[str, Any], bad: dict[str, Any]) -> None:
    config(**good)
    with pytest.raises(ValueError, match="validation error"):
        config(**bad)


def test_files_at_their_limits_and_one_beyond(tmp_path: Path) -> None:
    def refused(read: Callable[[Path], object], content: str, name: str = "file.jsonl") -> bool:
        path = tmp_path / name
        path.write_text(content)
        try:
            found = read(path)
            getattr(found, "raise_problems", lambda: None)()
        except PreceptorError:
            return True
        return False

    def passage(**fields: Any) -> str:
        return json.dumps({"context": "Ada.", "questions": [{"question": "Who?", "answer": "Ada"}]} | fields)

    def asked(**fields: Any) -> str:
        return passage(questions=[{"question": "Who?", "answer": "Ada"} | fields])

    for made, most in (
        (lambda n: passage(context="x" * n), limits.MAX_TEXT_CHARACTERS),
        (lambda n: passage(title="x" * n), limits.MAX_TITLE_CHARACTERS),
        (lambda n: passage(labels={f"l{i}": "x" for i in range(n)}), limits.MAX_LABELS),
        (lambda n: asked(question="x" * n), limits.MAX_QUESTION_CHARACTERS),
        (lambda n: asked(aliases=[f"a{i}" for i in range(n)]), limits.MAX_ALIASES),
        (
            lambda n: passage(questions=[{"question": f"Who is {i}?", "answer": "x"} for i in range(n)]),
            limits.MAX_QUESTIONS,
        ),
    ):
        assert not refused(read_task_file, made(most))
        assert refused(read_task_file, made(most + 1))
    probe = json.dumps({"question": "Who?", "answer": "Ada"}) + "\n"
    assert not refused(read_probes, probe * limits.MAX_PROBES)
    assert refused(read_probes, probe * (limits.MAX_PROBES + 1))
    assert not refused(read_replay, "x\n" * limits.MAX_REPLAY_DOCUMENTS)
    assert refused(read_replay, "x\n" * (limits.MAX_REPLAY_DOCUMENTS + 1))
    edit = json.dumps({"documents": ["x"]}) + "\n"
    assert not refused(lambda path: read_self_edits([str(path)]), edit * limits.MAX_SELF_EDITS)
    assert refused(lambda path: read_self_edits([str(path)]), edit * (limits.MAX_SELF_EDITS + 1))


# What doors have let through: the least input of each.


def test_an_unknown_bank_is_refused_by_its_place() -> None:
    request = group("a")
    request.task.passage.questions[1].bank = 17  # type: ignore[assignment]
    assert field_of(lambda: read_request(request)) == "task.passage.questions[1].bank"
    run = create_request()
    run.tasks[0].passage.questions[0].bank = 17  # type: ignore[assignment]
    run.tasks[0].id = task_id(run.tasks[0])
    assert field_of(lambda: validated(run)) == "tasks[0].passage.questions[0].bank"


def test_a_directive_that_makes_alpha_infinite_is_refused() -> None:
    request = group("a")
    request.protocol.training.alpha = 1e308
    request.self_edits[0].directive.rank = 1024
    assert field_of(lambda: read_request(request)) == "protocol.training.alpha"


def test_limits_of_directives_that_are_no_numbers_are_refused() -> None:
    request = written(limits=teacher.DirectiveLimits(max_learning_rate=float("nan")))
    assert field_of(lambda: writing_request(request)) == "limits.max_learning_rate"


def test_rewards_whose_squares_overflow_are_refused() -> None:
    assert field_of(lambda: update(learnt({}, reward=1e200))) == "examples[0].reward"
    assert field_of(lambda: update(learnt({}, reward_stderr=1e200))) == "examples[0].reward_stderr"


def test_an_error_fits_into_the_8_kb_that_any_client_reads() -> None:
    for character in ("a", "😀", "\n", "%", "\ud800"):
        error = PreceptorError("INVALID_REQUEST", character * 100_000, field=character * 100_000)
        status = to_status(error)
        percent = sum(1 if 32 <= byte < 127 and byte != 37 else 3 for byte in status.message.encode())
        assert percent + len(status.SerializeToString()) * 4 / 3 < 7500


@pytest.mark.parametrize("source", ["/", "/proc", "~nobody-at-all/x", "a\0b", "x/" + "a" * 300, "a" * 300])
def test_what_is_no_student_is_not_walked_through(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def hub(*_: object, **__: object) -> object:
        raise PreceptorError("MODEL_UNREACHABLE", "no test asks the hub")

    monkeypatch.setattr("student.source._inspect_hub", hub)
    monkeypatch.setattr("huggingface_hub.snapshot_download", hub)
    for act in (lambda: inspect(source), lambda: fetch(source, "c0ffee")):
        with pytest.raises(PreceptorError) as caught:
            act()
        assert caught.value.reason in ("BAD_STUDENT_SOURCE", "MODEL_UNREACHABLE")


def test_a_workers_reason_that_nobody_knows_is_a_failed_trial() -> None:
    result = trial.TrialBatchResult(
        results=[trial.TrialResult(trial_id="a", failure=types.Failure(reason="", message="m" * 9000))]
    )
    [outcome] = outcomes_of(["a"], result, 1)
    assert outcome.failure.reason == "TRIAL_FAILED"
    assert len(outcome.failure.message) == 500


def test_numbers_of_thousands_of_digits_and_deep_nests_are_named_by_their_key(tmp_path: Path) -> None:
    path = tmp_path / "config.toml"
    for value in ("9" * 5000, "0x" + "f" * 5000, "[" * 3000 + "]" * 3000):
        path.write_text(f"seed = {value}")
        with pytest.raises(PreceptorError) as caught:
            load_config(path)
        assert caught.value.reason == "BAD_CONFIG"
        with pytest.raises(PreceptorError) as caught:
            load_config(None, [f"seed={value}"])
        assert caught.value.reason == "BAD_CONFIG"


@pytest.mark.parametrize("grader", ["exact", "lexical", "grid"])
def test_no_answer_takes_a_grader_long(grader: str) -> None:
    dice = random.Random(1)
    words = " ".join("".join(dice.choice("abcdefgh") for _ in range(8)) for _ in range(2000))
    began = time.monotonic()
    for gold, answer in (
        (words, words[::-1]),
        ("a or " * 4000, "b or " * 4000),
        ("lisbon " + words, "not lisbom " * 1800),
        ("ABC DEF " * 2400, "alpha beta " * 1800),
        ("?" * 20_000, "a" + " " * 19_000 + "b"),
    ):
        WITHOUT_A_JUDGE.named(grader).grade([Given(Question(words, gold), answer)])
    assert time.monotonic() - began < 60  # 20 s where 16 processes share 2 cores; before, a quarter of an hour


@pytest.mark.parametrize("data", [b"", b"\xff", b"[" * 100_000, b'{"choices": 1}', b'{"choices": [{"message": []}]}'])
def test_a_judge_that_says_no_completion_has_said_nothing(data: bytes) -> None:
    assert read_verdict(content_of(data)) is None


def test_a_path_that_no_file_can_have_is_not_found() -> None:
    for path in ("a" * 5000, "a\0b"):
        for read in (read_task_file, read_probes, read_replay, lambda path: read_self_edits([str(path)])):
            with pytest.raises(PreceptorError) as caught:
                read(Path(path))  # type: ignore[operator]
            assert caught.value.reason == "FILE_NOT_FOUND"


def test_a_malformed_directive_is_shown_in_short() -> None:
    for directive in ("lr=" + "9" * 9000, "x" * 9000, "epochs=" + "9" * 9000):
        with pytest.raises(MalformedSelfEdit) as caught:
            parse(f"directive: {directive}\nx", Limits())
        assert len(str(caught.value)) < 400


def test_runs_of_many_seeds_keep_to_what_the_evaluator_takes() -> None:
    request = orchestrator.CreateRunRequest()
    request.CopyFrom(create_request())
    assert validated(request).most_seeds <= limits.MAX_SEEDS
