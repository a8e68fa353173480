"""Promises of the config file: validated whole, every error with its place, unknown keys refused."""

from __future__ import annotations

import tomllib
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from preceptor.config import POLICY_GRADIENTS, RunConfig, load_config, parse_config_json
from preceptor.errors import PreceptorError
from preceptor.recipes import SEAL_COMPAT

GOOD = """\
name = "mine"
seed = 3

[tasks]
world = "almanac"

[rounds]
count = 2
self_edits = 4

[[heldout.fixed_strategies]]
prompt_format = "open"
learning_rate = 1e-3
epochs = 4
"""


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "config.toml"
    path.write_text(text, encoding="utf-8")
    return path


def error_of(path: Path, *overrides: str) -> PreceptorError:
    with pytest.raises(PreceptorError) as caught:
        load_config(path, overrides)
    return caught.value


def test_a_good_file_is_read_with_defaults_for_what_it_leaves_out(tmp_path: Path) -> None:
    config = load_config(write(tmp_path, GOOD))
    assert (config.name, config.seed, config.rounds.count, config.rounds.self_edits) == ("mine", 3, 2, 4)
    assert config.training.rank == 8
    assert config.heldout.fixed_strategies[0].epochs == 4


def test_an_unknown_key_is_refused_with_its_line(tmp_path: Path) -> None:
    error = error_of(write(tmp_path, GOOD.replace("self_edits", "self_edit")))
    assert error.reason == "BAD_CONFIG"
    assert str(error) == f"{tmp_path}/config.toml:9: unknown key rounds.self_edit [rounds.self_edit]"


def test_an_unknown_table_is_refused(tmp_path: Path) -> None:
    assert "unknown key round" in str(error_of(write(tmp_path, GOOD + "\n[round]\ncount = 1\n")))


@pytest.mark.parametrize(
    ("line", "replacement", "place", "said"),
    [
        ("seed = 3", "seed = -1", 2, "seed: Input should be greater than or equal to 0 (given: -1)"),
        ("count = 2", "count = 2.5", 8, "rounds.count: "),
        ("self_edits = 4", "self_edits = 0", 9, "rounds.self_edits: Input should be greater than or equal to 1"),
        (
            'world = "almanac"',
            'world = "mars"',
            5,
            "tasks.world: Input should be 'almanac' or 'mosaic' (given: \"mars\")",
        ),
        ('name = "mine"', 'name = "My Run"', 1, "name: "),
    ],
)
def test_a_value_out_of_range_is_named_with_line_key_and_what_was_given(
    tmp_path: Path, line: str, replacement: str, place: int, said: str
) -> None:
    error = error_of(write(tmp_path, GOOD.replace(line, replacement)))
    assert str(error).startswith(f"{tmp_path}/config.toml:{place}: {said}")


def test_all_problems_are_told_at_once(tmp_path: Path) -> None:
    error = error_of(write(tmp_path, GOOD.replace("count = 2", "count = -2").replace("self_edits = 4", "edits = 4")))
    assert "rounds.count" in error.message
    assert "unknown key rounds.edits" in error.message


def test_no_source_and_two_sources_of_tasks_are_refused(tmp_path: Path) -> None:
    both = error_of(write(tmp_path, GOOD.replace('world = "almanac"', 'world = "almanac"\npath = "x.json"')))
    none = error_of(write(tmp_path, GOOD.replace('world = "almanac"', "train = 3")))
    for error in (both, none):
        assert "tasks: give exactly one of tasks.world and tasks.path" in error.message


def test_broken_toml_is_named_with_its_line(tmp_path: Path) -> None:
    error = error_of(write(tmp_path, GOOD.replace("seed = 3", "seed = ")))
    assert error.metadata["line"] == "2"
    assert "is not valid TOML" in error.message


def test_a_missing_file_and_one_that_is_not_text_are_named(tmp_path: Path) -> None:
    missing = error_of(tmp_path / "nowhere.toml")
    assert (missing.reason, missing.metadata["file"]) == ("FILE_NOT_FOUND", f"{tmp_path}/nowhere.toml")
    binary = tmp_path / "binary.toml"
    binary.write_bytes(b"name = '\xff'")
    assert "cannot be read" in error_of(binary).message
    assert "cannot be read" in error_of(tmp_path).message


def test_infinity_is_refused_because_it_could_not_be_stored(tmp_path: Path) -> None:
    assert "reward.gain" in error_of(write(tmp_path, GOOD + "\n[reward]\ngain = inf\n")).message


def test_overrides_replace_and_add_keys_with_toml_values_or_bare_words(tmp_path: Path) -> None:
    config = load_config(
        write(tmp_path, GOOD), ["seed=7", "rounds.count=5", "name=other", "student.name=big", "training.epochs=2"]
    )
    assert (config.seed, config.rounds.count, config.name) == (7, 5, "other")
    assert (config.student.name, config.training.epochs) == ("big", 2)


def test_a_bad_override_is_named_as_such_and_not_by_a_line_of_the_file(tmp_path: Path) -> None:
    path = write(tmp_path, GOOD)
    error = error_of(path, "rounds.count=-1")
    assert "line" not in error.metadata
    assert str(error) == "--set rounds.count=-1: Input should be greater than or equal to 0 (given: -1) [rounds.count]"
    assert str(error_of(path, "rounds.counts=1")) == "--set rounds.counts=1: unknown key rounds.counts [rounds.counts]"
    assert "is not KEY=VALUE" in error_of(path, "seed").message
    assert "is not KEY=VALUE" in error_of(path, "=3").message
    assert "is not UTF-8" in error_of(path, "tasks.path=\udcff").message
    assert "seed is not a table" in error_of(path, "seed.x=3").message


def test_an_override_without_a_value_takes_the_key_back(tmp_path: Path) -> None:
    config = load_config(write(tmp_path, GOOD), ["tasks.world=", "tasks.path=mine.json"])
    assert (config.tasks.world, config.tasks.path) == (None, "mine.json")


@given(st.text(min_size=1, max_size=40))
def test_any_override_gives_a_config_or_a_clear_error(text: str) -> None:
    from tempfile import TemporaryDirectory

    with TemporaryDirectory() as folder:
        path = write(Path(folder), GOOD)
        for override in (text, f"seed={text}", f"rounds.{text}=1", f"name={text}"):
            with suppress(PreceptorError):  # anything else fails the test
                load_config(path, [override])


def test_a_recipe_sets_every_key_and_a_key_beside_it_must_agree(tmp_path: Path) -> None:
    path = write(tmp_path, 'name = "mine"\n[tasks]\nworld = "almanac"\n[training]\nrecipe = "seal-compat"\n')
    training = load_config(path).training
    assert {name: getattr(training, name) for name in SEAL_COMPAT} == SEAL_COMPAT
    assert load_config(path, ["training.epochs=10", "training.include_passage=true"]).training.include_passage
    error = error_of(path, "training.epochs=5", "training.pad_to=0")
    assert error.metadata["field"] == "training"
    assert "seal-compat has epochs = 10 (not 5), pad_to = 2048 (not 0)" in error.message
    for wrong in ("seal", "[1]"):
        assert (
            f"training.recipe={wrong}: Input should be 'seal-compat'"
            in error_of(path, f"training.recipe={wrong}").message
        )


def test_a_recipe_leaves_no_room_for_a_fixed_strategy(tmp_path: Path) -> None:
    assert "heldout.fixed_strategies" in error_of(write(tmp_path, GOOD), "training.recipe=seal-compat").message


def test_a_recipe_survives_the_way_through_json(tmp_path: Path) -> None:
    config = load_config(write(tmp_path, GOOD), ["heldout.fixed_strategies=[]", "training.recipe=seal-compat"])
    assert parse_config_json(config.to_json()) == config


@pytest.mark.parametrize(
    "override",
    [
        "training.schedule=polynomial",
        "training.gradient_accumulation=0",
        "training.max_steps=-1",
        "training.pad_to=-1",
        "training.loss_mask=outputs",
        "training.loss_marker=''",
        "training.max_grad_norm=0",
    ],
)
def test_a_training_setting_out_of_range_is_named(tmp_path: Path, override: str) -> None:
    assert override.split("=")[0] in error_of(write(tmp_path, GOOD), override).message


def test_json_round_trip_keeps_the_config_and_its_digest(tmp_path: Path) -> None:
    config = load_config(write(tmp_path, GOOD))
    again = parse_config_json(config.to_json())
    assert again == config
    assert again.digest() == config.digest()
    assert RunConfig.model_validate(tomllib.loads(GOOD)) == config


def test_any_change_changes_the_digest(tmp_path: Path) -> None:
    path = write(tmp_path, GOOD)
    assert len({load_config(path, [f"seed={seed}"]).digest() for seed in range(5)}) == 5


def test_bad_json_from_the_wire_is_a_config_error() -> None:
    with pytest.raises(PreceptorError, match="unknown key nope"):
        parse_config_json('{"tasks": {"world": "almanac"}, "nope": 1}')
    with pytest.raises(PreceptorError) as caught:
        parse_config_json("{")
    assert caught.value.reason == "BAD_CONFIG"


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("gain = true", "reward.gain: Input should be a valid number (given: true)"),
        ('gain = "much"', 'reward.gain: Input should be a valid number (given: "much")'),
        ('gain = "1.0"', "reward.gain: Input should be a valid number"),
        ("gain = nan", "reward.gain: Input should be a finite number"),
        ("overlap = inf", "reward.overlap: Input should be a finite number"),
        ("tokens = -1", "reward.tokens: Input should be greater than or equal to 0"),
        ("gold_logprob_gain = 1e300", "reward.gold_logprob_gain: Input should be less than or equal to 1000000"),
        ("race = { budget = 0.5 }", "reward.race.budget: Input should be greater than or equal to 1"),
    ],
)
def test_a_weight_that_is_no_sensible_number_is_named_with_its_line(tmp_path: Path, line: str, said: str) -> None:
    error = error_of(write(tmp_path, f"{GOOD}\n[reward]\n{line}\n"))
    assert error.message.startswith(said)
    if "race" not in line:  # within a table on one line, the key has no line of its own
        assert error.metadata["line"] == str(len(GOOD.splitlines()) + 3)


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        ("gain = 0", "no term with a weight can be earned"),
        ("agreement_gain = 1.0", "agreement_gain compares sampled answers; set samples"),
        ("seeds = 4\nrace = { max_seeds = 3 }", "race.max_seeds = 3 is less than seeds = 4"),
        ("gain = 0\ncertainty_gain = 1.0\nrace = { look_steps = 4 }", "race.look_steps looks at gold answers"),
    ],
)
def test_rewards_that_make_no_sense_are_refused_at_their_table(tmp_path: Path, lines: str, said: str) -> None:
    error = error_of(write(tmp_path, f"{GOOD}\n[reward]\n{lines}\n"))
    assert said in error.message
    assert error.metadata["line"] == str(len(GOOD.splitlines()) + 2)


def test_a_reward_without_labels_and_a_race_can_be_had(tmp_path: Path) -> None:
    lines = "gain = 0\nagreement_gain = 1\nsamples = 8\nrace = { max_seeds = 3 }"
    reward = load_config(write(tmp_path, f"{GOOD}\n[reward]\n{lines}\n")).reward
    assert not reward.needs_answers
    assert reward.race is not None


@pytest.mark.parametrize("name", POLICY_GRADIENTS)
def test_a_policy_gradient_needs_every_reward_of_a_group(name: str, tmp_path: Path) -> None:
    path, chosen = write(tmp_path, GOOD), f"update.algorithm={name}"
    assert load_config(path, [chosen, "update.kl=0.1"]).update.kl == 0.1
    assert "reward.race=" in error_of(path, chosen, "reward.fresh_seeds=1").message
    assert "reward.race=" in error_of(path, chosen, "reward.race={look_steps=4}").message
    assert "rounds.self_edits" in error_of(path, chosen, "rounds.self_edits=1").message


def test_a_divergence_means_something_to_policy_gradients_alone(tmp_path: Path) -> None:
    path = write(tmp_path, GOOD)
    assert "kl = 0.1 means nothing to rest_em" in error_of(path, "update.kl=0.1").message
    assert "update.algorithm" in error_of(path, "update.algorithm=ppo").message


def test_a_format_is_an_arm_once(tmp_path: Path) -> None:
    error = error_of(write(tmp_path, f'{GOOD}\n[heldout]\nformats = ["copy", "self_qa", "copy"]\n'))
    assert "heldout.formats" in error.message
    assert "'copy' more than once" in error.message
