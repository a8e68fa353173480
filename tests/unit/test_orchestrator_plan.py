from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from orchestrator.entries import EditKey, Entry, round_stage
from orchestrator.evaluator_client import Submission
from orchestrator.heats import Heats
from orchestrator.plan import RunPlan, heldout_bank, labelled_places, under
from preceptor.config import AugmentationConfig, FixedStrategy
from preceptor.v1 import evaluator_pb2 as evaluator
from preceptor.v1 import types_pb2 as types
from tests.orchestrated import few_shot, passage, run_config

TASKS = tuple(passage(f"town {i}") for i in range(7))
HELDOUT = tuple(passage(f"river {i}") for i in range(3))
PROBES = tuple(types.Question(text=f"old {i}?", answer="x") for i in range(50))


def plan(run_id: str = "run-a", resumes: int = 0, **changes: Any) -> RunPlan:
    return RunPlan(
        run_id=run_id,
        config=run_config(**changes),
        student=types.PinnedStudent(name="first", source="/s", commit="c"),
        tasks=TASKS,
        heldout_tasks=HELDOUT,
        probes=PROBES,
        replay_documents=("old",),
        resumes=resumes,
    )


def entry(number: int, task: int, index: int = 0, **fields: Any) -> Entry:
    tasks = [*plan().tasks_of_round(number), *plan().tasks_of_round(number + 1)]  # they come in turn
    values = {"self_edit": types.SelfEdit(documents=[f"document {task} {index}"]), "completion": "text", **fields}
    return Entry(EditKey(round_stage(number), "", task, index), tasks[task].id, "base", **values)


def submission(of: RunPlan, number: int, *groups: list[Entry]) -> Submission:
    (made,) = Heats(of, number).start(groups)
    return made


def done(value: float) -> evaluator.Evaluation:
    return evaluator.Evaluation(
        state=evaluator.EVALUATION_STATE_SUCCEEDED, reward=types.Reward(value=value, stderr=0.1)
    )


@given(st.integers(1, 9), st.integers(0, 1000))
def test_tasks_come_in_turn_and_none_twice_in_a_round(per_round: int, seed: int) -> None:
    plan_ = plan(seed=seed, rounds={"tasks": per_round})
    drawn = [[task.id for task in plan_.tasks_of_round(number)] for number in range(1, 15)]
    assert all(len(set(ids)) == len(ids) == min(per_round, len(TASKS)) for ids in drawn)
    flat = [name for ids in drawn for name in ids]
    counts = [flat.count(task.id) for task in TASKS]
    assert max(counts) - min(counts) <= 1


def test_another_seed_draws_other_tasks_and_asks_with_other_seeds() -> None:
    one, two = plan(seed=1), plan(seed=2)
    assert [t.id for t in one.tasks_of_round(1)] != [t.id for t in two.tasks_of_round(1)]
    assert one.round_generation(1, "p").seed != two.round_generation(1, "p").seed
    assert one.round_generation(1, "p").seed != one.round_generation(2, "p").seed


def test_what_is_asked_depends_on_the_run_only_by_owner_and_request_id() -> None:
    entries = [entry(1, 0, 0), entry(1, 0, 1)]
    one = submission(plan("run-a"), 1, entries).request
    two = submission(plan("run-b"), 1, entries).request
    assert one.request_id != two.request_id
    for request in (one, two):
        request.ClearField("request_id")
        request.ClearField("owner")
    assert one == two
    assert plan("run-a").round_generation(1, "p") == plan("run-b").round_generation(1, "p")


def test_candidates_of_a_round_share_trial_seeds_and_rounds_do_not() -> None:
    plan_ = plan(reward={"seeds": 3})
    first = submission(plan_, 1, [entry(1, 0)]).request.protocol.seeds
    other_task = submission(plan_, 1, [entry(1, 1)]).request.protocol.seeds
    next_round = submission(plan_, 2, [entry(2, 0)]).request.protocol.seeds
    assert list(first) == list(other_task)
    assert len(set(first)) == 3
    assert not set(first) & set(next_round)


def test_the_teacher_is_shown_neither_questions_nor_reference_edits() -> None:
    entries = [entry(1, 0, evaluation=done(1))]
    shown = [
        *plan().round_generation(1, "p").tasks,
        *plan().heldout_generation("p", "open").tasks,
        *(example.task for example in plan().update(1, "p", entries).examples),
    ]
    assert shown
    assert not any(task.passage.questions or task.reference_edits for task in shown)


def test_only_rewarded_self_edits_reach_the_update() -> None:
    failed = evaluator.Evaluation(state=evaluator.EVALUATION_STATE_FAILED)
    entries = [
        entry(1, 0, 0, evaluation=done(-0.5)),
        entry(1, 0, 1, malformed="no document", self_edit=None),
        entry(1, 0, 2, evaluation=failed),
        entry(1, 1, 0, evaluation=done(0.25)),
    ]
    request = plan().update(1, "parent", entries)
    assert [example.reward for example in request.examples] == [-0.5, 0.25]
    assert len({example.group_id for example in request.examples}) == 2
    assert not request.activate
    assert not plan(update={"algorithm": "none"}).update(1, "parent", entries).examples


def test_training_rounds_ask_the_reward_bank_and_some_probes_and_the_measurement_the_sealed_bank_and_all() -> None:
    plan_ = plan(reward={"probes": 8})
    training = submission(plan_, 1, [entry(1, 0)]).request.protocol
    again = submission(plan_, 2, [entry(2, 1)]).request.protocol
    assert training.bank == types.QUESTION_BANK_REWARD
    assert len(training.probes) == 8
    assert list(training.probes) == list(again.probes)
    heldout_entry = Entry(EditKey("heldout", "oracle", 1, 0), HELDOUT[1].id, "", "", self_edit=types.SelfEdit())
    measured = next(plan_.heldout_submissions("given", [[heldout_entry]])).request
    assert measured.protocol.bank == types.QUESTION_BANK_SEALED
    assert len(measured.protocol.probes) == len(PROBES)
    assert not measured.task.reference_edits


def test_a_task_without_sealed_questions_is_measured_with_its_reward_questions() -> None:
    assert heldout_bank(passage("own", sealed=False)) == types.QUESTION_BANK_REWARD
    assert heldout_bank(passage("own")) == types.QUESTION_BANK_SEALED


def test_malformed_self_edits_are_not_sent_to_the_evaluator() -> None:
    made = submission(plan(), 1, [entry(1, 0, 0, malformed="bad", self_edit=None), entry(1, 0, 1)])
    assert [key.index for key in made.keys] == [1]
    assert len(made.request.self_edits) == 1


def test_a_run_resumed_on_request_asks_under_new_ids_and_one_that_goes_on_under_the_same() -> None:
    def request_id(resumes: int) -> str:
        return submission(plan(resumes=resumes), 1, [entry(1, 0)]).request.request_id

    assert request_id(0) == request_id(0)
    assert request_id(0) != request_id(1)


def places(made: Iterable[Submission]) -> list[list[tuple[int, int]]]:
    return [[(key.task, key.index) for key in one.keys] for one in made]


def test_tasks_with_few_trials_share_a_request_in_their_order() -> None:
    four = [[entry(1, task, index) for index in range(2)] for task in range(4)]
    asked = [[0, 1], [2, 3]]
    for trials, seeds, expected in ((4, 1, asked), (3, 1, asked), (1, 1, [[0], [1], [2], [3]]), (8, 2, asked)):
        of = plan(rounds={"tasks": 4}, reward={"seeds": seeds, "trials_together": trials})
        assert [sorted({task for task, _ in one}) for one in places(Heats(of, 1).start(four))] == expected
    three = list(Heats(plan(rounds={"tasks": 4}, reward={"trials_together": 6}), 1).start(four))
    assert places(three) == [[(0, 0), (0, 1), (1, 0), (1, 1), (2, 0), (2, 1)], [(3, 0), (3, 1)]]
    tasks = plan(rounds={"tasks": 4}).tasks_of_round(1)
    request = three[0].request
    assert [group.task.id for group in (request, *request.more)] == [task.id for task in tasks[:3]]
    assert [group.self_edits[1].documents[0] for group in request.more] == ["document 1 1", "document 2 1"]
    assert not any(group.task.reference_edits for group in request.more)


def test_a_request_is_sent_as_soon_as_it_is_full() -> None:
    of = plan(rounds={"tasks": 4}, reward={"trials_together": 2})
    written: list[int] = []

    def writing() -> Iterator[list[Entry]]:
        for task in range(4):
            written.append(task)
            yield [entry(1, task)]

    next(Heats(of, 1).start(writing()))
    assert written == [0, 1]


def test_a_request_is_the_same_whatever_of_it_is_known() -> None:
    """After a crash nothing that trains together may depend on what was finished before."""
    of = plan(rounds={"tasks": 4}, reward={"trials_together": 4})
    bad = {"malformed": "bad", "self_edit": None}
    fresh = [[entry(1, 0), entry(1, 0, 1, **bad)], [entry(1, 1), entry(1, 1, 1)]]
    some = [[entry(1, 0, evaluation=done(1)), fresh[0][1]], [fresh[1][0], entry(1, 1, 1, evaluation=done(1))]]
    later = [[entry(1, 2, 0, **bad), entry(1, 2, 1, **bad)], [entry(1, 3, 0), entry(1, 3, 1)]]
    first, second = Heats(of, 1).start([*fresh, *later])
    assert list(Heats(of, 1).start([*some, *later])) == [first, second]
    assert places([first, second]) == [[(0, 0), (1, 0), (1, 1)], [(3, 0), (3, 1)]]
    assert first.request.request_id != second.request.request_id


def test_what_is_all_malformed_is_asked_for_by_nobody() -> None:
    bad = [[entry(1, 0, malformed="bad", self_edit=None)]]
    assert list(Heats(plan(), 1).start(bad)) == []


def test_a_heat_is_never_more_than_the_evaluator_takes() -> None:
    of = plan(rounds={"tasks": 4}, reward={"trials_together": 1024})
    made = list(Heats(of, 1).start([[entry(1, task, index) for index in range(500)] for task in range(3)]))
    assert [len(one.keys) for one in made] == [1000, 500]


def test_held_out_requests_are_sent_until_all_of_them_is_settled() -> None:
    def group(task: int, **fields: Any) -> list[Entry]:
        key = EditKey("heldout", "oracle", task, 0)
        return [Entry(key, HELDOUT[task].id, "", "", self_edit=types.SelfEdit(documents=["x"]), **fields)]

    of = plan(reward={"trials_together": 2})
    fresh = list(of.heldout_submissions("references", [group(0), group(1), group(2)]))
    assert places(fresh) == [[(0, 0), (1, 0)], [(2, 0)]]
    known = [group(0, evaluation=done(1)), group(1), group(2, evaluation=done(1))]
    assert list(of.heldout_submissions("references", known)) == fresh[:1]


def test_held_out_tasks_share_a_request_only_where_the_same_bank_is_asked() -> None:
    tasks = (HELDOUT[0], HELDOUT[1], passage("own", sealed=False), HELDOUT[2])
    of = RunPlan(**{**plan().__dict__, "heldout_tasks": tasks})
    groups = [
        [Entry(EditKey("heldout", "oracle", i, 0), task.id, "", "", self_edit=types.SelfEdit(documents=["x"]))]
        for i, task in enumerate(tasks)
    ]
    made = list(of.heldout_submissions("references", groups))
    assert places(made) == [[(0, 0), (1, 0)], [(2, 0)], [(3, 0)]]
    assert [one.request.protocol.bank for one in made] == [
        types.QUESTION_BANK_SEALED,
        types.QUESTION_BANK_REWARD,
        types.QUESTION_BANK_SEALED,
    ]


def test_reference_arms_need_an_edit_in_every_task() -> None:
    assert plan().reference_arms == ["oracle", "shuffled_facts"]
    some = RunPlan(**{**plan().__dict__, "heldout_tasks": (*HELDOUT, passage("own", references=False))})
    assert some.reference_arms == []


def test_every_training_setting_of_the_config_is_asked_for() -> None:
    training = {
        "schedule": "cosine",
        "gradient_accumulation": 2,
        "max_steps": 40,
        "pad_to": 64,
        "weight_decay": 0.1,
        "max_grad_norm": 0.5,
        "warmup_share": 0.25,
        "loss_mask": "outputs_only",
        "loss_marker": "A:",
    }
    sent = submission(plan(training=training), 1, [entry(1, 0)]).request.protocol.training
    assert sent.loss_mask == types.LOSS_MASK_OUTPUTS_ONLY
    assert {name: getattr(sent, name) for name in training} == training | {"loss_mask": sent.loss_mask}


def test_under_a_recipe_no_directive_reaches_the_evaluator() -> None:
    written = types.SelfEdit(documents=["a"], directive=types.Directive(rank=4, epochs=2))
    of_run = plan(training={"recipe": "seal-compat"}, heldout={"fixed_strategies": ()})
    made = submission(of_run, 1, [entry(1, 0, self_edit=written)])
    assert list(made.request.self_edits) == [types.SelfEdit(documents=["a"])]
    assert made.request.protocol.training.pad_to == 2048
    assert submission(plan(), 1, [entry(1, 0, self_edit=written)]).request.self_edits[0] == written


def test_the_fixed_strategy_replaces_the_whole_directive() -> None:
    written = types.SelfEdit(documents=["a"], directive=types.Directive(rank=4, epochs=2))
    edit = under(FixedStrategy(prompt_format="open", learning_rate=0.01, epochs=9), written)
    assert list(edit.documents) == ["a"]
    assert not edit.directive.HasField("rank")
    assert edit.directive.epochs == 9


def few_shot_plan(**changes: Any) -> RunPlan:
    tasks = tuple(few_shot(f"rule {i}") for i in range(4))
    return replace(plan(**changes), tasks=tasks, heldout_tasks=tuple(few_shot(f"other {i}") for i in range(2)))


def test_the_arms_are_those_of_every_run_and_those_it_asks_for_in_one_order() -> None:
    few = ["no_edit", "passage_only", "untrained_teacher", "fixed_strategy", "trained_teacher"]
    assert plan().arms == [*few, "oracle", "shuffled_facts"]
    asked = plan(heldout={"formats": ["rewrite", "lecture"], "in_context": True, "external_teacher": True})
    assert asked.arms == [
        "no_edit",
        "passage_only",
        "format:rewrite",
        "format:lecture",
        "untrained_teacher",
        "fixed_strategy",
        "external_teacher",
        "trained_teacher",
        "in_context",
        "oracle",
        "shuffled_facts",
    ]
    assert "passage_only" not in few_shot_plan().arms
    assert asked.planned_self_edits - plan().planned_self_edits == 4 * len(HELDOUT)


def test_limits_reach_the_teacher_only_where_they_differ_from_what_holds_anyway() -> None:
    assert not plan().round_generation(1, "p").HasField("limits")
    strict = plan(teacher={"limits": {"max_epochs": 16, "targets": ["qv"], "allow_full": True}})
    limits = strict.round_generation(1, "p").limits
    assert limits == strict.heldout_generation("p", "open").limits
    assert (limits.max_epochs, list(limits.targets), limits.allow_full) == (16, ["qv"], True)
    assert [field.name for field, _ in limits.ListFields()] == ["max_epochs", "targets", "allow_full"]


def test_a_fixed_strategy_says_what_it_says_and_nothing_else() -> None:
    plain = under(FixedStrategy(prompt_format="copy", learning_rate=1e-3, epochs=4), types.SelfEdit(documents=["a"]))
    assert plain.directive == types.Directive(learning_rate=1e-3, epochs=4, replay_share=0.0)  # as ever: known results
    whole = FixedStrategy(
        learning_rate=1e-3,
        epochs=4,
        rank=2,
        targets="qv",
        loss_mask="outputs_only",
        augmentations=AugmentationConfig(basic=True, colours=False),
    )
    directive = under(whole, types.SelfEdit()).directive
    assert (directive.rank, directive.targets) == (2, "qv")
    assert directive.loss_mask == types.LOSS_MASK_OUTPUTS_ONLY
    assert directive.augmentations == types.Augmentations(basic=True, colours=False)
    assert not directive.fine_tuning


def test_few_shot_tasks_have_no_banks_and_show_the_teacher_no_output_of_a_query() -> None:
    of = few_shot_plan()
    assert {heldout_bank(task) for task in of.heldout_tasks} == {types.QUESTION_BANK_REWARD}
    assert labelled_places(of.tasks) == [0, 1, 2, 3]
    unknown = few_shot("rule 9")
    for pair in unknown.few_shot.queries:
        pair.ClearField("output")
    assert labelled_places([unknown, few_shot("rule 8")]) == [1]
    shown = of.round_generation(1, "p").tasks
    assert all(task.few_shot.demonstrations[0].output.rows for task in shown)
    assert not any(pair.HasField("output") for task in shown for pair in task.few_shot.queries)


def test_only_the_arm_that_says_so_has_the_text_in_the_prompt() -> None:
    of = plan()
    group = [Entry(EditKey("heldout", "in_context", 0, 0), HELDOUT[0].id, "", "", self_edit=types.SelfEdit())]
    (inside,) = of.heldout_submissions("in_context", [group], in_context=True)
    (outside,) = of.heldout_submissions("passage", [group])
    assert inside.request.protocol.in_context
    assert not outside.request.protocol.in_context
    inside.request.protocol.in_context = False
    assert inside.request.protocol == outside.request.protocol
