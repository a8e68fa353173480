"""Few-shot tasks from a request to rewards: documents and prompts are made here, the worker stays as it is. And
passages in context."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from evaluator.identity import Plan, plan
from evaluator.request import read_request
from preceptor.convert import augmentations_from_proto, task_to_proto
from preceptor.errors import PreceptorError
from preceptor.few_shot.text import document, grid_text
from preceptor.few_shot.training import training_documents
from preceptor.few_shot.views import views
from preceptor.limits import MAX_PROMPT_CHARACTERS
from preceptor.tasks import FewShotTask, GridPair
from preceptor.v1 import evaluator_pb2 as pb
from preceptor.v1 import trial_pb2 as trial
from preceptor.v1 import types_pb2 as types
from tests.evaluation_requests import STUDENT, group
from tests.evaluator_house import FAILED, SUCCEEDED, House
from tests.fake_broker import FakeBroker


def pair(colour: int) -> GridPair:
    return GridPair(((colour, 0), (colour, colour)), ((0, colour), (colour, colour)))


TASK = FewShotTask("mirror", (pair(1), pair(2), pair(3)), (pair(4), pair(5)))
Change = Callable[[pb.CreateEvaluationsRequest], object]


def request_for(
    *directives: types.Directive, votes: int = 1, change: Change = lambda r: None
) -> pb.CreateEvaluationsRequest:
    """One self-edit for each directive; two probes."""
    made = group("x", seeds=(1, 2))
    made.task.CopyFrom(task_to_proto(TASK))
    del made.self_edits[:]
    made.self_edits.extend(types.SelfEdit(directive=one) for one in directives or (types.Directive(),))
    made.protocol.few_shot.votes = votes
    change(made)
    return made


def planned(*directives: types.Directive, votes: int = 1, change: Change = lambda r: None) -> Plan:
    made = request_for(*directives, votes=votes, change=change)
    return plan(read_request(made), STUDENT)


@pytest.fixture
def house(database_url: str) -> Iterator[House]:
    made = House(database_url, FakeBroker())
    yield made
    made.close()


def says(of: Callable[[types.Question, int, bool], str]) -> Callable[[trial.TrialBatch], trial.TrialBatchResult]:
    """A worker whose student says ``of(question, its number, whether it is trained)``; it knows all probes."""

    def rule(batch: trial.TrialBatch) -> trial.TrialBatchResult:
        result = trial.TrialBatchResult(batch_id=batch.id, worker="scripted:1")
        for item in batch.trials:
            one = result.results.add(trial_id=item.id, steps=3, trained_tokens=30)
            trained = bool(item.documents)
            for number, question in enumerate(batch.question_sets[item.question_set].questions):
                text = of(question, number, trained)
                one.answers.add(text=text, gold_logprob=-1.0 - number if trained else -9.0)
            one.probe_answers.extend(trial.Answer(text=probe.answer, gold_logprob=-0.1) for probe in batch.probes)
        return result

    return rule


def evaluate(house: House, request: pb.CreateEvaluationsRequest, of: Callable[..., str]) -> list[pb.Evaluation]:
    made = house.evaluations.create(request)
    for _ in range(2):
        house.step()
        house.broker.work(says(of))
    house.step()
    return [house.evaluations.get(item.id) for item in made]


def test_documents_are_made_of_the_demonstrations_and_the_directive() -> None:
    wanted = types.Directive(augmentations=types.Augmentations(basic=True, colours=False), epochs=3)
    wanted.loss_mask = types.LOSS_MASK_OUTPUTS_ONLY
    plain, asked = planned(types.Directive(), wanted).evaluations
    for evaluation, directive in ((plain, types.Directive()), (asked, wanted)):
        augmentations = augmentations_from_proto(directive.augmentations)
        expected = training_documents(TASK, augmentations, max_documents=64)
        for one in evaluation.trials:
            assert tuple(one.documents) == expected
            assert one.settings.loss_marker == "Output:"
    assert (plain.trials[0].settings.epochs, asked.trials[0].settings.epochs) == (2, 3)
    assert asked.trials[0].settings.loss_mask == types.LOSS_MASK_OUTPUTS_ONLY
    assert document(TASK.demonstrations[1:], TASK.demonstrations[0]) in plain.trials[0].documents
    for query in TASK.queries:
        assert all(grid_text(query.output) not in text for text in asked.trials[0].documents)  # no colours permuted


def test_the_protocol_says_how_many_documents_and_in_which_spelling() -> None:
    def few(request: pb.CreateEvaluationsRequest) -> None:
        request.protocol.few_shot.max_documents = 2
        request.protocol.few_shot.separator = " "

    (one,) = planned(change=few).evaluations
    assert len(one.trials[0].documents) == 2
    assert "Input: 1 0/1 1" in one.trials[0].documents[0] + one.trials[0].documents[1]


def test_a_worker_is_asked_whole_prompts_and_the_probes_in_their_frame() -> None:
    found = planned(votes=3)
    (evaluation,) = found.evaluations
    for trials in (evaluation.trials, (evaluation.baseline,)):
        batch = found.batch(trials)
        assert batch.answers.prompt == "{question}"
        asked = [(one.text, one.answer) for one in batch.question_sets[0].questions]
        assert asked == [(view.prompt, view.gold) for of_query in views(TASK, 3) for view in of_query]
        assert batch.probes[0].text == "Question: Old fact 0?\nAnswer:"
        assert batch.probes[0].answer == "old0"


def test_the_untouched_student_has_the_demonstrations_in_its_prompt() -> None:
    found = planned()
    batch = found.batch([found.evaluations[0].baseline])
    assert not batch.trials[0].documents
    prompt = batch.question_sets[0].questions[0].text
    assert all(grid_text(shown.output) in prompt for shown in TASK.demonstrations)


def test_right_is_whoever_has_every_cell_and_the_reward_is_per_query(house: House) -> None:
    right_at_one = {4: "04/44"}  # of the second query only the shape is right

    def of(question: types.Question, number: int, trained: bool) -> str:
        return right_at_one.get(4 + number, "00/55") if trained else "no grid"

    (found,) = evaluate(house, request_for(), of)
    assert found.state == SUCCEEDED
    assert (found.reward.questions, found.reward.seeds) == (2, 2)
    assert (found.reward.accuracy, found.reward.baseline_accuracy) == (0.5, 0.0)
    assert list(found.trials[0].correct) == [True, False]
    assert (found.reward.retention, found.reward.baseline_retention) == (1.0, 1.0)
    assert not found.HasField("overlap")
    assert found.task_id == request_for().task.id


def test_views_vote_and_two_attempts_count(house: House) -> None:
    seen = views(TASK, 4)
    other = ((9, 9), (9, 9))

    def of(question: types.Question, number: int, trained: bool) -> str:
        if not trained:
            return ""
        query, view = divmod(number, 4)
        turned = seen[query][view].way.transformation
        if query == 0:  # right in one view of four, another grid in two: the right one is the second attempt
            grids = [other, other, TASK.queries[0].output, ((1,),)]
            return grid_text(turned.apply(grids[view]))
        grids = [other, ((8, 8), (8, 8)), other, ((8, 8), (8, 8))]  # twice two that are wrong
        return grid_text(turned.apply(grids[view]))

    (found,) = evaluate(house, request_for(votes=4), of)
    assert list(found.trials[0].correct) == [True, False]
    assert found.reward.questions == 2
    # Means over the views: -1, -2, -3, -4 and -5 .. -8.
    assert list(found.trials[0].gold_logprobs) == [-2.5, -6.5]
    assert list(found.baseline.gold_logprobs) == [-9.0, -9.0]


def test_an_answer_in_the_words_of_another_view_is_wrong(house: House) -> None:
    """It is turned back: the untransformed gold grid is no answer to a mirrored query."""

    def of(question: types.Question, number: int, trained: bool) -> str:
        return grid_text(TASK.queries[number // 8].output) if number % 8 else "no grid"

    def asymmetric(request: pb.CreateEvaluationsRequest) -> None:
        for query in request.task.few_shot.queries:
            query.output.CopyFrom(types.Grid(rows=[types.GridRow(cells=[1, 2, 3])]))

    (found,) = evaluate(house, request_for(votes=8, change=asymmetric), of)
    assert found.reward.accuracy == 0.0


def test_probes_are_graded_by_the_protocols_grader(house: House) -> None:
    def lexical(request: pb.CreateEvaluationsRequest) -> None:
        request.protocol.grader = "lexical"

    (found,) = evaluate(house, request_for(change=lexical), lambda question, number, trained: question.answer)
    assert found.reward.accuracy == 1.0
    assert found.reward.retention == 1.0


def test_a_query_that_the_student_cannot_hold_fails_the_trial_and_no_other(house: House) -> None:
    def rule(batch: trial.TrialBatch) -> trial.TrialBatchResult:
        result = says(lambda question, number, trained: question.answer)(batch)
        for one, item in zip(result.results, batch.trials, strict=True):
            if len(item.documents) > 20:
                one.Clear()
                one.trial_id = item.id
                one.failure.reason, one.failure.message = "SEQUENCE_TOO_LONG", "a document needs 999 tokens"
        return result

    large = types.Directive(augmentations=types.Augmentations(basic=True, size=True))
    made = house.evaluations.create(request_for(types.Directive(), large))
    for _ in range(2):
        house.step()
        house.broker.work(rule)
    house.step()
    good, bad = (house.evaluations.get(item.id) for item in made)
    assert good.state == SUCCEEDED
    assert bad.state == FAILED
    assert bad.failure.reason == "SEQUENCE_TOO_LONG"
    assert not bad.HasField("reward")


def test_a_worker_that_leaves_out_a_view_fails_the_trial(house: House) -> None:
    def rule(batch: trial.TrialBatch) -> trial.TrialBatchResult:
        result = says(lambda question, number, trained: question.answer)(batch)
        for one in result.results:
            del one.answers[-1]
        return result

    made = house.evaluations.create(request_for(votes=2))
    for _ in range(2):
        house.step()
        house.broker.work(rule)
    house.step()
    (found,) = (house.evaluations.get(item.id) for item in made)
    assert found.failure.reason == "TRIAL_FAILED"
    assert "3 questions" in found.failure.message
    assert "of 4" in found.failure.message


def test_what_is_known_stays_known_over_a_restart(house: House) -> None:
    (found,) = evaluate(house, request_for(votes=2), lambda question, number, trained: question.answer)
    house.restart()
    (again,) = house.evaluations.create(request_for(votes=2))
    assert again.cached
    assert again.reward == found.reward


DIFFERENT: dict[str, Change] = {
    "votes": lambda r: setattr(r.protocol.few_shot, "votes", 2),
    "separator": lambda r: setattr(r.protocol.few_shot, "separator", " "),
    "fewer documents": lambda r: setattr(r.protocol.few_shot, "max_documents", 3),
    "augmentations": lambda r: setattr(r.self_edits[0].directive.augmentations, "basic", True),
    "a demonstration": lambda r: r.task.few_shot.demonstrations.add().CopyFrom(r.task.few_shot.queries[0]),
    "a query": lambda r: r.task.few_shot.queries.pop(),
    "an output": lambda r: r.task.few_shot.queries[0].output.rows[0].cells.__setitem__(0, 7),
    "answer tokens": lambda r: setattr(r.protocol.answers, "max_new_tokens", 33),
    "the probes' frame": lambda r: setattr(r.protocol.answers, "prompt", "Q: {question}"),
    "grader of the probes": lambda r: setattr(r.protocol, "grader", "lexical"),
}


@pytest.mark.parametrize("name", DIFFERENT)
def test_an_evaluation_of_a_few_shot_task_stands_for_all_it_depends_on(name: str) -> None:
    assert planned(change=DIFFERENT[name]).evaluations[0].id != planned().evaluations[0].id


SAME: dict[str, Change] = {
    "its name": lambda r: setattr(r.task.few_shot, "name", "renamed"),
    "labels": lambda r: r.task.labels.update({"a": "b"}),
    "the bank": lambda r: setattr(r.protocol, "bank", types.QUESTION_BANK_SEALED),
    "defaults spelt out": lambda r: r.protocol.few_shot.CopyFrom(pb.FewShotSettings(max_documents=64, votes=1)),
    "colours spelt out": lambda r: setattr(r.self_edits[0].directive.augmentations, "colours", True),
    "a marker that is not its own": lambda r: setattr(r.protocol.training, "loss_marker", "Answer:"),
}


@pytest.mark.parametrize("name", SAME)
def test_what_changes_nothing_changes_no_identity(name: str) -> None:
    assert planned(change=SAME[name]).evaluations[0].id == planned().evaluations[0].id


REFUSED: dict[str, tuple[Change, str, str]] = {
    "no demonstrations": (
        lambda r: r.task.few_shot.ClearField("demonstrations"),
        "task.few_shot.demonstrations",
        "needs a demonstration",
    ),
    "no queries": (lambda r: r.task.few_shot.ClearField("queries"), "task.few_shot.queries", "needs a query"),
    "a query without its output": (
        lambda r: r.task.few_shot.queries[1].ClearField("output"),
        "task.few_shot.queries[1].output",
        "is empty",
    ),
    "a ragged grid": (
        lambda r: r.task.few_shot.demonstrations[2].input.rows[0].cells.append(1),
        "task.few_shot.demonstrations[2].input",
        "rows of 2 to 3 cells",
    ),
    "a colour beyond nine": (
        lambda r: r.task.few_shot.queries[0].input.rows[0].cells.__setitem__(0, 10),
        "task.few_shot.queries[0].input",
        "the colour 10",
    ),
    "a grid beyond thirty": (
        lambda r: r.task.few_shot.queries[0].input.rows.extend([types.GridRow(cells=[1, 1])] * 29),
        "task.few_shot.queries[0].input",
        "is 31 x 2",
    ),
    "an answer that cannot be given": (
        lambda r: setattr(r.protocol.answers, "max_new_tokens", 4),
        "task.few_shot.queries[0].output",
        "2 x 2, 5 tokens.*may have 4",
    ),
    "documents of its own": (
        lambda r: r.self_edits[0].documents.append("x"),
        "self_edits[0].documents",
        "are made of the demonstrations",
    ),
    "no self-edit": (lambda r: r.ClearField("self_edits"), "self_edits", "given: 0"),
    "too many votes": (lambda r: setattr(r.protocol.few_shot, "votes", 65), "protocol.few_shot.votes", "at most 64"),
    "too many documents": (
        lambda r: setattr(r.protocol.few_shot, "max_documents", 1001),
        "protocol.few_shot.max_documents",
        "at most 1000",
    ),
    "a separator of words": (
        lambda r: setattr(r.protocol.few_shot, "separator", ", "),
        "protocol.few_shot.separator",
        "one blank",
    ),
    "the passage as a document": (
        lambda r: setattr(r.protocol, "include_passage", True),
        "protocol.include_passage",
        "for passages",
    ),
    "in context": (lambda r: setattr(r.protocol, "in_context", True), "protocol.in_context", "for passages"),
    "a passage beside it": (
        lambda r: r.more.add(task=group("x").task, self_edits=[types.SelfEdit(documents=["x"])]),
        "more[0].task",
        "not both",
    ),
    "a name beyond all measure": (
        lambda r: setattr(r.task.few_shot, "name", "x" * 1001),
        "task.few_shot.name",
        "at most 1000",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_bad_task_is_refused_with_its_place(name: str) -> None:
    change, field, message = REFUSED[name]
    with pytest.raises(PreceptorError, match=message) as raised:
        planned(change=change)
    assert raised.value.reason == "INVALID_REQUEST"
    assert raised.value.metadata["field"] == field


def test_documents_beyond_all_measure_are_refused() -> None:
    def huge(request: pb.CreateEvaluationsRequest) -> None:
        request.protocol.few_shot.max_documents = 1000
        request.protocol.answers.max_new_tokens = 1000
        for shown in request.task.few_shot.demonstrations:
            for grid in (shown.input, shown.output):
                del grid.rows[:]
                grid.rows.extend([types.GridRow(cells=[number % 10] * 30) for number in range(30)])
        for colour in range(7):
            more = request.task.few_shot.demonstrations.add()
            more.CopyFrom(request.task.few_shot.demonstrations[0])
            more.input.rows[0].cells[0] = 1 + colour

    with pytest.raises(PreceptorError, match="at most 4000000 are allowed") as raised:
        planned(types.Directive(augmentations=types.Augmentations(basic=True)), change=huge)
    assert raised.value.metadata["field"] == "protocol.few_shot.max_documents"


def test_augmentations_are_no_directive_of_a_passage() -> None:
    request = group("Ada lives in Lisbon.")
    request.self_edits[0].directive.augmentations.basic = True
    with pytest.raises(PreceptorError, match="few-shot tasks alone") as raised:
        read_request(request)
    assert raised.value.metadata["field"] == "self_edits[0].directive.augmentations"


def in_context(*documents: str, change: Change = lambda r: None) -> pb.CreateEvaluationsRequest:
    made = group(*documents, seeds=(1, 2))
    made.protocol.in_context = True
    if not documents:
        made.self_edits.add()
    change(made)
    return made


def test_in_context_the_text_stands_before_each_question_but_not_for_the_untouched_student() -> None:
    found = plan(read_request(in_context()), STUDENT)
    (evaluation,) = found.evaluations
    batch = found.batch(evaluation.trials)
    text = "Ada lives in Lisbon. She is a baker."
    assert batch.answers.prompt == "{question}"
    assert batch.question_sets[0].questions[0].text == f"{text}\nQuestion: Where does Ada live?\nAnswer:"
    assert batch.probes[0].text == "Question: Old fact 0?\nAnswer:"
    assert not batch.trials[0].documents
    usual = plan(read_request(group("x", seeds=(1, 2))), STUDENT)
    assert evaluation.baseline == usual.evaluations[0].baseline
    assert found.batch([evaluation.baseline]) == usual.batch([usual.evaluations[0].baseline])
    assert evaluation.exam_id == usual.evaluations[0].exam_id


def test_in_context_is_part_of_an_identity_only_where_it_is_set() -> None:
    usual = group("x", seeds=(1, 2))
    explicit = group("x", seeds=(1, 2))
    explicit.protocol.in_context = False
    ids = {plan(read_request(one), STUDENT).evaluations[0].id for one in (usual, explicit)}
    assert len(ids) == 1
    assert plan(read_request(in_context("x")), STUDENT).evaluations[0].id not in ids


def test_gain_in_context_is_what_the_text_at_hand_is_worth(house: House) -> None:
    def rule(batch: trial.TrialBatch) -> trial.TrialBatchResult:
        result = trial.TrialBatchResult(batch_id=batch.id, worker="scripted:1")
        for item in batch.trials:
            one = result.results.add(trial_id=item.id)
            for question in batch.question_sets[item.question_set].questions:
                known = "Ada lives in Lisbon" in question.text
                one.answers.add(text=question.answer if known else "?", gold_logprob=-1.0)
            one.probe_answers.extend(trial.Answer(text=probe.answer) for probe in batch.probes)
        return result

    made = house.evaluations.create(in_context())
    for _ in range(2):
        house.step()
        house.broker.work(rule)
    house.step()
    found = house.evaluations.get(made[0].id)
    assert found.state == SUCCEEDED
    assert (found.reward.accuracy, found.reward.baseline_accuracy, found.reward.value) == (1.0, 0.0, 1.0)


def test_a_text_that_no_context_holds_is_refused() -> None:
    def long(request: pb.CreateEvaluationsRequest) -> None:
        request.task.passage.text = "x" * MAX_PROMPT_CHARACTERS

    with pytest.raises(PreceptorError, match="makes a prompt of") as raised:
        plan(read_request(in_context(change=long)), STUDENT)
    assert raised.value.metadata["field"] == "task.passage.text"
