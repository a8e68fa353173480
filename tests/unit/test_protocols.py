"""What a config asks of the evaluator."""

from __future__ import annotations

from preceptor.config import RunConfig
from preceptor.protocols import as_trained, chosen_probes, evaluation_protocol, look_protocol, own_text
from preceptor.v1 import evaluator_pb2 as evaluator
from preceptor.v1 import types_pb2 as types

PROBES = tuple(types.Question(text=f"Probe {i}?", answer="yes") for i in range(9))


def config(**sections: object) -> RunConfig:
    return RunConfig.model_validate({"tasks": {"world": "almanac"}, **sections})


def protocol(given: RunConfig, seeds: tuple[int, ...] = (5, 6)) -> evaluator.EvaluationProtocol:
    return evaluation_protocol(
        given, bank=types.QUESTION_BANK_GATE, probes=PROBES, replay_documents=["Old."], seeds=seeds
    )


def test_every_weight_of_the_config_reaches_the_protocol() -> None:
    names = evaluator.RewardWeights.DESCRIPTOR.fields_by_name
    reward = {name: 0.5 + place for place, name in enumerate(names)} | {"samples": 4, "grader": "lexical"}
    made = protocol(config(reward=reward))
    assert {name: getattr(made.weights, name) for name in names} == {name: reward[name] for name in names}
    assert (made.grader, made.answers.samples, made.answers.certainty) == ("lexical", 4, True)
    assert not protocol(config()).answers.certainty


def test_training_answers_and_what_is_asked_are_the_configs() -> None:
    made = protocol(
        config(
            training={"learning_rate": 1e-4, "warmup_share": 0.0, "loss_mask": "after_marker", "include_passage": True},
            answers={"prompt": "{question}", "max_new_tokens": 3},
        )
    )
    assert made.training.learning_rate == 1e-4
    assert made.training.HasField("warmup_share")
    assert made.training.loss_mask == types.LOSS_MASK_AFTER_MARKER
    assert made.include_passage
    assert (made.answers.prompt, made.answers.max_new_tokens) == ("{question}", 3)
    assert (list(made.seeds), made.bank, list(made.replay_documents)) == ([5, 6], types.QUESTION_BANK_GATE, ["Old."])
    assert tuple(made.probes) == PROBES


def test_a_look_measures_log_probabilities_after_a_few_steps_and_nothing_else() -> None:
    full = protocol(config(reward={"grader": "judge", "certainty_gain": 1.0, "samples": 2}))
    look = look_protocol(full, 3)
    assert look.training.max_steps == 3
    assert look.answers.logprobs_only
    assert (look.answers.samples, look.answers.certainty, len(look.probes)) == (0, False, 0)
    assert (look.grader, list(look.seeds)) == ("exact", [5])
    assert look.weights == evaluator.RewardWeights(gold_logprob_gain=1.0)
    assert list(full.seeds) == [5, 6]  # the full one is as it was
    look.training.max_steps = full.training.max_steps
    assert look.training == full.training


def test_a_look_is_never_longer_than_the_trial() -> None:
    assert look_protocol(protocol(config(training={"max_steps": 2})), 3).training.max_steps == 2


def test_the_choice_of_probes_is_the_seeds() -> None:
    few = config(reward={"probes": 4})
    assert len(chosen_probes(few, PROBES)) == 4
    assert chosen_probes(few, PROBES) == chosen_probes(few, PROBES)
    assert chosen_probes(config(seed=1, reward={"probes": 4}), PROBES) != chosen_probes(few, PROBES)
    assert chosen_probes(config(), PROBES) == PROBES


def test_the_passage_itself_is_repeated_up_to_the_budget_where_there_is_one() -> None:
    task = types.Task(passage=types.Passage(title="t", text="One.\n\n Two. \n"))
    free, bound = config(), config(training={"max_train_tokens": 1000})
    assert list(own_text(task, free.training).documents) == ["One.", "Two."]
    assert not own_text(task, free.training).directive.HasField("epochs")
    assert own_text(task, bound.training).directive.epochs == 1024


def test_a_recipe_is_followed_whatever_the_directive_says() -> None:
    edit = types.SelfEdit(documents=["A."], directive=types.Directive(epochs=2))
    assert as_trained(edit, config().training) == edit
    assert as_trained(edit, config(training={"recipe": "seal-compat"}).training) == types.SelfEdit(documents=["A."])
