"""What makes two evaluations the same, and what does not."""

from collections.abc import Callable

import pytest

from evaluator.identity import Plan, group_trials, plan
from evaluator.request import read_request
from preceptor.errors import PreceptorError
from preceptor.v1 import evaluator_pb2 as pb
from preceptor.v1 import types_pb2 as types
from tests.evaluation_requests import STUDENT, group, two_tasks

Change = Callable[[pb.CreateEvaluationsRequest], object]


def planned(change: Change = lambda request: None) -> Plan:
    request = group("Ada lives in Lisbon.", seeds=(1, 2))
    request.protocol.replay_documents.append("old0")
    change(request)
    return plan(read_request(request), request.student)


def identity(change: Change = lambda request: None) -> str:
    return planned(change).evaluations[0].id


def look(request: pb.CreateEvaluationsRequest) -> None:
    """Makes it a request for log-probabilities alone."""
    request.protocol.answers.logprobs_only = True
    request.protocol.weights.CopyFrom(pb.RewardWeights(gold_logprob_gain=1.0))


def then(*changes: Change) -> Change:
    """One change after the other."""

    def all_of_them(request: pb.CreateEvaluationsRequest) -> None:
        for change in changes:
            change(request)

    return all_of_them


def weighted(change: Change = lambda request: None, **weights: float) -> Change:
    """A change after which the reward has these weights alone."""

    def both(request: pb.CreateEvaluationsRequest) -> None:
        request.protocol.weights.CopyFrom(pb.RewardWeights(**weights))
        change(request)

    return both


def unlabelled(request: pb.CreateEvaluationsRequest) -> None:
    """Certainty alone is rewarded, and no question has an answer."""
    weighted(certainty_gain=1.0)(request)
    request.protocol.answers.certainty = True
    for question in request.task.passage.questions:
        question.answer = ""


def ask_again(request: pb.CreateEvaluationsRequest, text: str, answer: str) -> None:
    """A fourth question, of the bank that is asked."""
    request.task.passage.questions.add(text=text, answer=answer)


DIFFERENT: dict[str, Change] = {
    "student commit": lambda r: setattr(r.student, "commit", "beef"),
    "adapters": lambda r: r.student.adapters.add(uri="file:///a", sha256="aa"),
    "document": lambda r: r.self_edits[0].documents.append("More."),
    "directive": lambda r: setattr(r.self_edits[0].directive, "learning_rate", 0.01),
    "epochs": lambda r: setattr(r.protocol.training, "epochs", 3),
    "warm-up": lambda r: r.protocol.training.ClearField("warmup_share"),
    "question": lambda r: setattr(r.task.passage.questions[0], "text", "Ada's town?"),
    "gold answer": lambda r: setattr(r.task.passage.questions[0], "answer", "Porto"),
    "alias": lambda r: r.task.passage.questions[0].aliases.append("Lisboa"),
    "bank": lambda r: setattr(r.protocol, "bank", types.QUESTION_BANK_GATE),
    "probe": lambda r: r.protocol.probes.add(text="Old fact 9?", answer="old9"),
    "no probes": lambda r: r.protocol.ClearField("probes"),
    "replay": lambda r: r.protocol.replay_documents.append("old1"),
    "prompt": lambda r: setattr(r.protocol.answers, "prompt", "Q: {question} A:"),
    "answer length": lambda r: setattr(r.protocol.answers, "max_new_tokens", 5),
    "weights": lambda r: setattr(r.protocol.weights, "retention_loss", 0.25),
    "seeds": lambda r: r.protocol.seeds.append(3),
    "schedule": lambda r: setattr(r.protocol.training, "schedule", "cosine"),
    "loss mask": lambda r: setattr(r.protocol.training, "loss_mask", types.LOSS_MASK_OUTPUTS_ONLY),
    "weight decay": lambda r: setattr(r.protocol.training, "weight_decay", 0.1),
    "clipping": lambda r: setattr(r.protocol.training, "max_grad_norm", 0.5),
    "accumulation": lambda r: setattr(r.protocol.training, "gradient_accumulation", 2),
    "step limit": lambda r: setattr(r.protocol.training, "max_steps", 5),
    "padding": lambda r: setattr(r.protocol.training, "pad_to", 2048),
    "look": lambda r: look(r),
    "samples": lambda r: setattr(r.protocol.answers, "samples", 4),
    "certainty": lambda r: setattr(r.protocol.answers, "certainty", True),
    "weight of a term": lambda r: setattr(r.protocol.weights, "gold_probability_gain", 0.5),
    "weight of the overlap": lambda r: setattr(r.protocol.weights, "overlap", 1.0),
    "written question": lambda r: setattr(r.task.passage.questions[0], "written", True),
    "passage trained on": lambda r: setattr(r.protocol, "include_passage", True),
}

SAME: dict[str, Change] = {
    "student name": lambda r: setattr(r.student, "name", "other"),
    "student place": lambda r: setattr(r.student, "source", "/elsewhere"),
    "title": lambda r: setattr(r.task.passage, "title", "Other"),
    "task id": lambda r: setattr(r.task, "id", "task-other"),
    "labels": lambda r: r.task.labels.update({"a": "1", "b": "2"}),
    "reference edits": lambda r: r.task.reference_edits["oracle"].documents.append("x"),
    "owner": lambda r: setattr(r, "owner", "run-2"),
    "passage not trained on": lambda r: setattr(r.task.passage, "text", "Anything."),
    "questions of another bank": lambda r: setattr(r.task.passage.questions[2], "text", "Home?"),
    "order of seeds": lambda r: r.protocol.seeds.__setitem__(slice(None), [2, 1]),
    "a default said": lambda r: setattr(r.protocol.training, "learning_rate", 3e-3),
    "no accumulation said": lambda r: setattr(r.protocol.training, "gradient_accumulation", 1),
    "a grader's default said": lambda r: setattr(r.protocol, "grader", "exact"),
    "the default's modules in another order": lambda r: r.protocol.training.target_modules.extend(
        ["v_proj", "q_proj", "k_proj", "o_proj", "up_proj", "gate_proj", "down_proj"]
    ),
    "a directive that says what holds anyway": lambda r: setattr(r.self_edits[0].directive, "epochs", 2),
}


@pytest.mark.parametrize("name", DIFFERENT)
def test_what_the_reward_depends_on_changes_the_id(name: str) -> None:
    assert identity(DIFFERENT[name]) != identity()


@pytest.mark.parametrize("name", SAME)
def test_what_the_reward_does_not_depend_on_leaves_the_id(name: str) -> None:
    assert identity(SAME[name]) == identity()


def test_the_ids_are_the_same_in_every_process() -> None:
    """A golden value: when it changes, every stored evaluation of every user is done again. Mean it."""
    found = planned()
    assert found.evaluations[0].id == GOLDEN_EVALUATION
    assert found.evaluations[0].baseline.id == GOLDEN_BASELINE


def test_the_baseline_is_shared_by_all_self_edits_settings_and_seeds() -> None:
    def baseline(change: Change = lambda request: None) -> str:
        first, *others = planned(change).evaluations
        assert all(item.baseline == first.baseline for item in others)
        return first.baseline.id

    shared = ("document", "directive", "epochs", "seeds", "weights", "replay", "passage trained on", "alias")
    assert {baseline(DIFFERENT[name]) for name in shared} == {baseline()}
    for name in ("student commit", "question", "gold answer", "probe", "prompt"):
        assert baseline(DIFFERENT[name]) != baseline()
    assert not planned().evaluations[0].baseline.documents


def test_a_trial_is_reused_where_only_grading_or_further_seeds_differ() -> None:
    for name in ("weights", "alias", "seeds"):
        assert planned(DIFFERENT[name]).evaluations[0].trials[:2] == planned().evaluations[0].trials


def test_a_worker_sees_no_alias_and_no_bank() -> None:
    found = planned(DIFFERENT["alias"])
    batch = found.batch(found.evaluations[0].trials)
    assert [question.text for question in batch.question_sets[0].questions] == [
        "Where does Ada live?",
        "What is Ada's trade?",
    ]
    assert not any(question.aliases or question.bank for question in batch.question_sets[0].questions)


def test_a_trial_carries_resolved_settings_under_its_directive() -> None:
    def directive(request: pb.CreateEvaluationsRequest) -> None:
        request.self_edits[0].directive.CopyFrom(types.Directive(rank=8, learning_rate=0.02, replay_share=0.25))

    found = planned(directive)
    settings = found.evaluations[0].trials[0].settings
    assert (settings.rank, settings.alpha, settings.epochs, settings.batch_size) == (8, 32.0, 2, 8)
    assert (settings.learning_rate, settings.replay_share, settings.schedule) == (0.02, 0.25, "linear")
    assert settings.warmup_share == 0
    assert settings.max_grad_norm == 1
    assert settings.loss_mask == types.LOSS_MASK_ALL
    assert list(found.batch(found.evaluations[0].trials).replay_documents) == ["old0"]
    assert not planned().batch(planned().evaluations[0].trials).replay_documents  # nothing draws from it


def test_a_directive_leaves_alone_what_is_not_its_own() -> None:
    def change(request: pb.CreateEvaluationsRequest) -> None:
        training = request.protocol.training
        training.loss_mask, training.max_steps, training.pad_to = types.LOSS_MASK_OUTPUTS_ONLY, 5, 64
        training.gradient_accumulation, training.schedule = 2, "cosine"
        request.self_edits[0].directive.epochs = 9

    settings = planned(change).evaluations[0].trials[0].settings
    assert (settings.loss_mask, settings.epochs) == (types.LOSS_MASK_OUTPUTS_ONLY, 9)
    assert (settings.max_steps, settings.pad_to, settings.gradient_accumulation) == (5, 64, 2)
    assert settings.schedule == "cosine"


def test_a_directive_of_zero_is_meant() -> None:
    def change(request: pb.CreateEvaluationsRequest) -> None:
        request.protocol.training.replay_share = 0.5
        request.self_edits[0].directive.replay_share = 0.0

    assert planned(change).evaluations[0].trials[0].settings.replay_share == 0


def test_the_passage_comes_before_the_documents() -> None:
    found = planned(DIFFERENT["passage trained on"]).evaluations[0].trials[0]
    assert list(found.documents) == ["Ada lives in Lisbon. She is a baker.", "Ada lives in Lisbon."]


def cut(found: Plan, most: int, *known: str) -> list[str]:
    """The first letters of the documents of each batch; "-" is a baseline."""
    needed = {name: name not in known for name in found.asking_of}
    batches = group_trials(found.evaluations, needed, most)
    return ["".join(item.documents[0][0] if item.documents else "-" for item in one) for one in batches]


def test_batches_are_even_and_keep_evaluations_whole() -> None:
    request = group("a", "b", "c", "a", seeds=(1, 2))
    found = plan(read_request(request), STUDENT)
    assert cut(found, 4) == ["-", "aabb", "cc"]
    assert cut(found, 5) == ["-", "aabb", "cc"]
    assert cut(found, 1) == ["-", "aa", "bb", "cc"]
    first = found.evaluations[0]
    assert cut(found, 9, first.baseline.id, found.evaluations[1].trials[0].id) == ["aabcc"]
    many = plan(read_request(group(*"abcdefghi")), STUDENT)
    assert cut(many, 8) == ["-", "abcde", "fghi"]
    assert cut(many, 4) == ["-", "abc", "def", "ghi"]
    assert cut(many, 9, *many.asking_of) == []


def test_the_same_work_makes_the_same_batch() -> None:
    found = plan(read_request(group("a", "b")), STUDENT)
    first, second = ([item.trials[0]] for item in found.evaluations)
    assert found.batch(first).id == found.batch(first).id != found.batch(second).id


def test_the_tasks_of_a_request_are_trained_together_each_with_its_questions() -> None:
    found = plan(read_request(two_tasks()), STUDENT)
    assert [item.task_id for item in found.evaluations] == ["task-ada", "task-ada", "task-tom", "task-ada"]
    assert cut(found, 9) == ["--", "AATB"]
    assert cut(found, 2) == ["--", "AA", "TB"]
    baselines, trained = (
        found.batch(one) for one in group_trials(found.evaluations, dict.fromkeys(found.asking_of, True), 9)
    )
    assert [item.question_set for item in baselines.trials] == [0, 1]
    assert [item.question_set for item in trained.trials] == [0, 0, 1, 0]
    assert [[question.text for question in one.questions] for one in trained.question_sets] == [
        ["Where does Ada live?", "What is Ada's trade?"],
        ["What is Tom?"],
    ]
    assert list(trained.probes) == list(baselines.probes)


def test_an_evaluation_is_the_same_whichever_tasks_it_was_asked_for_with() -> None:
    together = plan(read_request(two_tasks()), STUDENT)
    alone = plan(read_request(group("Ada lives in Lisbon.", "Ada is a baker.", "Bread.")), STUDENT)
    assert {item.id for item in alone.evaluations} < {item.id for item in together.evaluations}


def grids(request: pb.CreateEvaluationsRequest, golds: tuple[str, str], probes: str = "0/0") -> None:
    request.protocol.grader = "grid"
    for question, gold in zip(request.task.passage.questions, golds, strict=False):
        question.answer = gold
    for probe in request.protocol.probes:
        probe.answer = probes


REFUSED: dict[str, tuple[Change, str, str]] = {
    "no questions in the bank": (
        lambda r: setattr(r.protocol, "bank", types.QUESTION_BANK_SEALED),
        "task.passage.questions",
        "task-ada.*sealed",
    ),
    "no task": (lambda r: r.ClearField("task"), "task", "no passage"),
    "no seeds": (lambda r: r.protocol.ClearField("seeds"), "protocol.seeds", "1..64"),
    "a seed twice": (lambda r: r.protocol.seeds.append(1), "protocol.seeds", "same trial"),
    "no self-edits": (lambda r: r.ClearField("self_edits"), "self_edits", "1..1024"),
    "too many self-edits": (
        lambda r: r.more.add(task=r.task).self_edits.extend([r.self_edits[0]] * 1024),
        "self_edits",
        "given: 1025",
    ),
    "a further task without self-edits": (lambda r: r.more.add(task=r.task), "more[0].self_edits", "1..1024"),
    "a further task without passage": (
        lambda r: r.more.add(self_edits=r.self_edits),
        "more[0].task",
        "no passage",
    ),
    "an empty document of a further task": (
        lambda r: r.more.add(task=r.task).self_edits.add(documents=["x", ""]),
        "more[0].self_edits[0].documents[1]",
        "empty",
    ),
    "no request id": (lambda r: r.ClearField("request_id"), "request_id", "characters"),
    "no owner": (lambda r: r.ClearField("owner"), "owner", "characters"),
    "an empty document": (lambda r: r.self_edits[0].documents.append(" "), r"self_edits[0].documents[1]", "empty"),
    "an endless document": (lambda r: r.self_edits[0].documents.append("x" * 10**6), "self_edits[0].documents", "more"),
    "a question without answer": (
        lambda r: setattr(r.task.passage.questions[1], "answer", ""),
        "task.passage.questions[1]",
        "no answer",
    ),
    "a gold answer that is no grid": (
        lambda r: grids(r, ("01/10", "01/1")),
        "task.passage.questions[1]",
        "grader grid cannot read",
    ),
    "a probe that is no grid": (
        lambda r: grids(r, ("01/10", "1"), "old"),
        "protocol.probes[0]",
        "grader grid cannot read",
    ),
    "a rate out of range": (
        lambda r: setattr(r.self_edits[0].directive, "learning_rate", 9.0),
        "self_edits[0].directive.learning_rate",
        "9.0",
    ),
    "a rate of NaN": (
        lambda r: setattr(r.protocol.training, "learning_rate", float("nan")),
        "protocol.training.learning_rate",
        "must be",
    ),
    "rank zero": (lambda r: setattr(r.self_edits[0].directive, "rank", 0), "self_edits[0].directive.rank", "1..1024"),
    "all replay": (
        lambda r: setattr(r.self_edits[0].directive, "replay_share", 1.0),
        "self_edits[0].directive.replay_share",
        "must be",
    ),
    "an unknown schedule": (
        lambda r: setattr(r.protocol.training, "schedule", "polynomial"),
        "protocol.training.schedule",
        "polynomial",
    ),
    "endless accumulation": (
        lambda r: setattr(r.protocol.training, "gradient_accumulation", 4097),
        "protocol.training.gradient_accumulation",
        "4097",
    ),
    "an unknown mask": (
        lambda r: setattr(r.protocol.training, "loss_mask", 9),
        "protocol.training.loss_mask",
        "not a known mask",
    ),
    "a directive that could leave nothing to train": (
        lambda r: setattr(r.self_edits[0].directive, "loss_mask", types.LOSS_MASK_OUTPUTS_ONLY),
        "self_edits[0].directive.loss_mask",
        "all or after_marker",
    ),
    "a prompt without place": (
        lambda r: setattr(r.protocol.answers, "prompt", "Q:"),
        "protocol.answers.prompt",
        "{question}",
    ),
    "a question twice": (
        lambda r: ask_again(r, "where does Ada  live", "lisbon"),
        "task.passage.questions[3]",
        "is asked twice",
    ),
    "a question with two answers": (
        lambda r: ask_again(r, "Where does Ada live?", "Porto"),
        "task.passage.questions[3]",
        "has the answer 'Porto' here and 'Lisbon' before",
    ),
    "an answer that is too long": (
        lambda r: setattr(r.task.passage.questions[1], "answer", "word " * 17),
        "task.passage.questions[1]",
        "the gold answer has 17 words, and an answer may have 16 tokens",
    ),
    "a probe that is too long": (
        lambda r: setattr(r.protocol.probes[1], "answer", "word " * 17),
        "protocol.probes[1]",
        "17 words",
    ),
    "a look with a gain": (
        lambda r: setattr(r.protocol.answers, "logprobs_only", True),
        "protocol.weights.gain",
        "not measured",
    ),
    "a look without weights": (
        weighted(lambda r: setattr(r.protocol.answers, "logprobs_only", True)),
        "protocol.weights.gain",
        "not measured",
    ),
    "a look that samples": (
        then(look, lambda r: setattr(r.protocol.answers, "samples", 2)),
        "protocol.answers.samples",
        "logprobs_only",
    ),
    "a look without gold answers": (
        then(look, lambda r: setattr(r.task.passage.questions[0], "answer", "")),
        "task.passage.questions[0]",
        "no answer",
    ),
    "endless samples": (
        lambda r: setattr(r.protocol.answers, "samples", 65),
        "protocol.answers.samples",
        "at most 64",
    ),
    "a temperature below zero": (
        lambda r: setattr(r.protocol.answers, "temperature", -1.0),
        "protocol.answers.temperature",
        "above 0",
    ),
    "a temperature that is no number": (
        lambda r: setattr(r.protocol.answers, "temperature", float("nan")),
        "protocol.answers.temperature",
        "above 0",
    ),
    "agreement without samples": (weighted(agreement_gain=1.0), "protocol.answers.samples", "1 or more"),
    "certainty that is not measured": (weighted(certainty_gain=1.0), "protocol.answers.certainty", "must be set"),
    "gain without gold answers": (
        then(unlabelled, lambda r: setattr(r.protocol.weights, "gain", 1.0)),
        "task.passage.questions[0]",
        "no answer",
    ),
    "a blank gold answer": (
        then(unlabelled, lambda r: setattr(r.task.passage.questions[0], "answer", " ")),
        "task.passage.questions[0]",
        "no answer",
    ),
    "a weight beyond all measure": (
        lambda r: setattr(r.protocol.weights, "overlap", 1e300),
        "protocol.weights.overlap",
        "finite",
    ),
    "a weight that is no number": (
        lambda r: setattr(r.protocol.weights, "tokens", float("nan")),
        "protocol.weights.tokens",
        "finite",
    ),
    "a weight of infinity": (
        lambda r: setattr(r.protocol.weights, "gain", float("inf")),
        "protocol.weights.gain",
        "finite",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_bad_request_is_refused_with_its_place(name: str) -> None:
    change, field, message = REFUSED[name]
    with pytest.raises(PreceptorError, match=message) as raised:
        planned(change)
    assert raised.value.reason == "INVALID_REQUEST"
    assert raised.value.metadata["field"] == field


def test_what_is_not_asked_may_be_wrong_with_the_questions_of_other_banks() -> None:
    def change(request: pb.CreateEvaluationsRequest) -> None:
        request.task.passage.questions[2].text = request.task.passage.questions[0].text
        request.task.passage.questions[2].answer = "word " * 40

    assert identity(change) == identity()


def test_a_look_may_have_long_gold_answers_and_every_weight_that_it_measures() -> None:
    def change(request: pb.CreateEvaluationsRequest) -> None:
        look(request)
        request.task.passage.questions[0].answer = "word " * 40
        request.protocol.weights.CopyFrom(
            pb.RewardWeights(gold_logprob_gain=1, gold_probability_gain=1, overlap=1, tokens=1)
        )

    assert not planned(change).evaluations[0].exam.graded


def test_without_labels_questions_need_no_gold_answers() -> None:
    assert not planned(unlabelled).evaluations[0].exam.labelled


def test_grids_are_compared_where_all_gold_answers_are_grids() -> None:
    assert planned(lambda r: grids(r, ("01/10", "[[1]]"))).evaluations[0].exam.grader == "grid"


def test_an_unknown_grader_is_refused() -> None:
    with pytest.raises(PreceptorError) as raised:
        planned(lambda r: setattr(r.protocol, "grader", "oracle"))
    assert raised.value.reason == "GRADER_UNKNOWN"


def test_a_judge_that_is_not_set_is_refused_before_anything_is_stored() -> None:
    with pytest.raises(PreceptorError) as raised:
        planned(lambda r: setattr(r.protocol, "grader", "cascade"))
    assert (raised.value.reason, raised.value.metadata) == ("JUDGE_NOT_SET", {"field": "grader"})


def test_weights_of_zero_mean_the_gain_alone_and_others_are_taken_as_they_are() -> None:
    assert planned(lambda r: r.protocol.ClearField("weights")).evaluations[0].exam.weights.gain == 1

    def dense(request: pb.CreateEvaluationsRequest) -> None:
        request.protocol.weights.CopyFrom(pb.RewardWeights(gold_logprob_gain=1))

    assert planned(dense).evaluations[0].exam.weights.gain == 0


GOLDEN_EVALUATION = "eval-57cf491bc3756882c48fa9481f622eb9"
GOLDEN_BASELINE = "baseline-063f49f5936909d043cde6398e651dcf"
