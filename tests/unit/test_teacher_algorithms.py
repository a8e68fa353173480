"""What every algorithm promises, tested alike for all of them; and what is theirs by the book, computed by hand."""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from teacher.algorithms import ALGORITHMS
from teacher.algorithms.interface import Candidate, LearningSettings
from teacher.algorithms.policy_gradient import divergence
from teacher.model import TeacherBase
from teacher.update import Example, FineTuning, fine_tune, mean_divergence, token_logprobs
from tests.unit.tiny_teachers import tiny_teacher

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # by PEFT

NAMES = sorted(ALGORITHMS)
GRADIENTS = ("grpo", "rloo")
CANDIDATES = st.lists(
    st.builds(
        Candidate,
        group=st.sampled_from("abc"),
        completion=st.text("xyz", max_size=3),
        reward=st.one_of(st.sampled_from([-0.5, 0.0, 0.1, 0.5]), st.floats(-2, 2)),
        stderr=st.sampled_from([0.0, 0.1]),
        only_compared=st.booleans(),
    ),
    max_size=24,
)
LEARNING = LearningSettings()


def group(*rewards: float, stderr: float = 0.0, name: str = "a") -> list[Candidate]:
    return [Candidate(name, f"text {i}", reward, stderr) for i, reward in enumerate(rewards)]


def weights(name: str, candidates: Sequence[Candidate], learning: LearningSettings = LEARNING) -> dict[int, float]:
    return {one.index: one.weight for one in ALGORITHMS[name].weigh(candidates, learning)}


# What is learnt from


@pytest.mark.parametrize("name", NAMES)
@given(candidates=CANDIDATES, seed=st.integers(0, 1000))
def test_the_order_of_arrival_does_not_matter(name: str, candidates: list[Candidate], seed: int) -> None:
    shuffled = list(candidates)
    random.Random(seed).shuffle(shuffled)
    before, after = (
        [(some[one.index], one.weight) for one in ALGORITHMS[name].weigh(some, LEARNING)]
        for some in (candidates, shuffled)
    )
    assert before == after


@pytest.mark.parametrize("name", NAMES)
@given(candidates=CANDIDATES)
def test_every_weight_is_a_finite_number_and_of_one_who_may_be_learnt_from(
    name: str, candidates: list[Candidate]
) -> None:
    weighted = ALGORITHMS[name].weigh(candidates, LEARNING)
    assert len({one.index for one in weighted}) == len(weighted)
    for one in weighted:
        assert math.isfinite(one.weight)
        assert not candidates[one.index].only_compared


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("reward", [float("nan"), float("inf")])
def test_a_failure_is_no_reward(name: str, reward: float) -> None:
    with pytest.raises(ValueError, match="reward"):
        ALGORITHMS[name].weigh([Candidate("a", "x", reward), Candidate("a", "y", 0.5)], LEARNING)


@pytest.mark.parametrize("name", NAMES)
@given(reward=st.floats(0.01, 5), size=st.integers(2, 60))
def test_a_group_of_equals_teaches_nothing(name: str, reward: float, size: int) -> None:
    assert weights(name, group(*[reward] * size)) == {}
    # given advantages are differences from a mean, which of equal floats may be a bit off
    off = [replace(one, advantage=1e-17, advantage_stderr=0.0) for one in group(*[reward] * size)]
    assert name == "rest_em" or weights(name, off) == {}


@pytest.mark.parametrize("name", NAMES)
def test_groups_do_not_reach_into_each_other(name: str) -> None:
    one, other = group(0.1, 0.5, 0.9), group(-3.0, 2.0, name="b")
    together = weights(name, [*one, *other])
    assert {i: weight for i, weight in together.items() if i < 3} == weights(name, one)
    assert {i - 3: weight for i, weight in together.items() if i >= 3} == weights(name, other)


@pytest.mark.parametrize("name", NAMES)
def test_those_for_comparison_count_in_the_mean(name: str) -> None:
    best = group(0.2, 0.3)
    low = Candidate("a", "low", -1.0, only_compared=True)
    assert weights(name, best).get(0, -1.0) < 0
    assert weights(name, [*best, low])[0] > 0


@pytest.mark.parametrize("name", GRADIENTS)
@pytest.mark.parametrize("given_advantages", [False, True])
def test_a_group_that_varies_no_more_than_its_noise_is_dropped(name: str, given_advantages: bool) -> None:
    def measured(stderr: float) -> list[Candidate]:
        found = group(0.4, 0.5, 0.6, stderr=stderr)
        if given_advantages:  # the noise of the difference is all that counts then
            paired = stderr * math.sqrt(2 / 3)
            found = [replace(one, stderr=9.0, advantage=one.reward - 0.5, advantage_stderr=paired) for one in found]
        return found

    assert weights(name, measured(0.11)) == {}
    assert weights(name, measured(0.09)).keys() == {0, 1, 2}


@pytest.mark.parametrize("name", GRADIENTS)
@given(candidates=CANDIDATES)
def test_an_advantage_has_the_sign_of_its_distance_from_the_mean(name: str, candidates: list[Candidate]) -> None:
    for index, weight in weights(name, candidates).items():
        mine = candidates[index]
        mean = statistics.fmean(one.reward for one in candidates if one.group == mine.group)
        assert weight * (mine.reward - mean) > -1e-12


def test_grpo_by_hand() -> None:
    found = weights("grpo", group(1.0, 2.0, 6.0))
    deviation = math.sqrt((4 + 1 + 9) / 3)
    assert found == pytest.approx({0: -2 / deviation, 1: -1 / deviation, 2: 3 / deviation})


def test_rloo_by_hand() -> None:
    assert weights("rloo", group(1.0, 2.0, 6.0)) == pytest.approx({0: 1 - 4, 1: 2 - 3.5, 2: 6 - 1.5})


@pytest.mark.parametrize("name", GRADIENTS)
def test_noise_shrinks_an_advantage_by_its_share_of_the_variance(name: str) -> None:
    # Variance of 1, 3, 5 is 4; with a noise of 1 each the signal is 3, so three quarters of every advantage are left.
    exact, noisy = weights(name, group(1.0, 3.0, 5.0)), weights(name, group(1.0, 3.0, 5.0, stderr=1.0))
    assert noisy == pytest.approx({index: 0.75 * weight for index, weight in exact.items()})


@pytest.mark.parametrize("name", GRADIENTS)
def test_the_surer_of_two_equal_rewards_weighs_more(name: str) -> None:
    candidates = [
        Candidate("a", "sure", 1.0, 0.1),
        Candidate("a", "unsure", 1.0, 0.5),
        Candidate("a", "low", -1.0, 0.1),
    ]
    found = weights(name, candidates)
    assert found[0] > found[1] > 0


# The loss


def tensors(*rows: Sequence[float]) -> list[torch.Tensor]:
    return [torch.tensor([row], dtype=torch.float64) for row in rows]


def test_rest_em_is_cross_entropy() -> None:
    now, zeros, weight = tensors([-0.5, -2.0], [0.0, 0.0], [1.0])
    assert ALGORITHMS["rest_em"].token_losses(now, zeros, zeros, weight, LEARNING).tolist() == [[0.5, 2.0]]


@pytest.mark.parametrize("name", GRADIENTS)
@pytest.mark.parametrize(
    ("ratio", "weight", "loss", "learns"),
    [
        (1.0, 2.0, -2.0, True),  # on-policy: the plain policy gradient
        (1.5, 2.0, -2.4, False),  # likelier already by more than the clip: nothing to gain by more
        (0.5, 2.0, -1.0, True),  # less likely than when it was written: not clipped, it is to come back
        (0.5, -2.0, 1.6, False),
        (1.5, -2.0, 3.0, True),
    ],
)
def test_the_ratio_to_the_writer_corrects_and_is_clipped(
    name: str, ratio: float, weight: float, loss: float, learns: bool
) -> None:
    then, start, weights_ = tensors([-1.0], [-1.0], [weight])
    now = (then + math.log(ratio)).requires_grad_()
    found = ALGORITHMS[name].token_losses(now, then, start, weights_, LEARNING)
    assert found.item() == pytest.approx(loss)
    found.sum().backward()
    assert now.grad is not None
    # d(-ratio * weight)/d(now) = -ratio * weight
    assert now.grad.item() == pytest.approx(-ratio * weight if learns else 0.0)


@pytest.mark.parametrize("name", GRADIENTS)
def test_the_divergence_from_the_start_is_added_by_its_weight(name: str) -> None:
    now, then, start, weights_ = tensors([-1.0, -2.0], [-1.0, -2.0], [-1.5, -2.0], [0.5])
    plain, held = (
        ALGORITHMS[name].token_losses(now, then, start, weights_, replace(LEARNING, kl=kl)) for kl in (0.0, 0.25)
    )
    r = math.exp(-0.5)  # start / now of the first token
    assert (held - plain).tolist()[0] == pytest.approx([0.25 * (r - 1 - math.log(r)), 0.0])


def test_k3_is_the_divergence_on_average() -> None:
    p, q = (torch.tensor(of, dtype=torch.float64) for of in ([0.7, 0.2, 0.1], [0.3, 0.3, 0.4]))
    exact = (p * (p / q).log()).sum()
    assert float((p * divergence(p.log(), q.log())).sum()) == pytest.approx(float(exact))


# A tiny real model

PROMPT = "# Ada\nAda lives in Lisbon.\n"
TEXTS = ("Ada lives in Lisbon.", "Lisbon is large.", "A baker.")


def examples(base: TeacherBase, name: str, rewards: Sequence[float]) -> list[Example]:
    """The texts with the weights that their rewards give, and with history by the untouched teacher."""
    candidates = [Candidate("a", text, reward) for text, reward in zip(TEXTS, rewards, strict=True)]
    prompt = tuple(base.prompt_ids(PROMPT))
    made = [
        Example(prompt, tuple(base.completion_ids(TEXTS[one.index])), one.weight)
        for one in ALGORITHMS[name].weigh(candidates, LEARNING)
    ]
    return with_history(base, made)


def with_history(base: TeacherBase, made: list[Example]) -> list[Example]:
    known = token_logprobs(base.model, made, 2)
    return [replace(one, then=logprobs, start=logprobs) for one, logprobs in zip(made, known, strict=True)]


def likelihoods(base: TeacherBase, model: torch.nn.Module) -> list[float]:
    """Log-probability of each text."""
    prompt = tuple(base.prompt_ids(PROMPT))
    texts = [Example(prompt, tuple(base.completion_ids(text))) for text in TEXTS]
    return [sum(of) for of in token_logprobs(model, texts, 3)]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("best", range(len(TEXTS)))
def test_a_model_learns_to_prefer_what_was_rewarded(name: str, best: int) -> None:
    base = tiny_teacher()
    model = base.new_adapter(4, 8, seed=0)
    before = likelihoods(base, model)
    rewards = [1.0 if place == best else 0.0 for place in range(len(TEXTS))]
    tuning = FineTuning(learning_rate=1e-2, epochs=8, batch_size=2)
    fine_tune(model, examples(base, name, rewards), tuning, 0, algorithm=ALGORITHMS[name])
    gained = [after - was for after, was in zip(likelihoods(base, model), before, strict=True)]
    assert gained[best] > 0.5
    assert all(gained[best] > gain + 0.5 for place, gain in enumerate(gained) if place != best)


@pytest.mark.parametrize("name", NAMES)
def test_training_twice_gives_the_same_weights(name: str) -> None:
    base = tiny_teacher()
    made = []
    for _ in range(2):
        model = base.new_adapter(4, 8, seed=0)
        fine_tune(model, examples(base, name, [1, 0.5, 0]), FineTuning(1e-2, 3, 2), 0, algorithm=ALGORITHMS[name])
        made.append(likelihoods(base, model))
    assert made[0] == made[1]


@pytest.mark.parametrize("name", GRADIENTS)
def test_the_divergence_keeps_near_the_start(name: str) -> None:
    base = tiny_teacher()
    apart = []
    for kl in (0.0, 1.0, 10.0):
        model = base.new_adapter(4, 8, seed=0)
        some = examples(base, name, [1.0, 0.5, 0.0])
        assert mean_divergence(model, base.model, some) == pytest.approx(0.0, abs=1e-6)
        fine_tune(
            model,
            some,
            FineTuning(1e-2, 12, 2),
            0,
            algorithm=ALGORITHMS[name],
            learning=replace(LEARNING, clip=1.0, kl=kl),
        )
        apart.append(mean_divergence(model, base.model, some))
    assert apart[0] > apart[1] > apart[2] > 0


@pytest.mark.parametrize("name", GRADIENTS)
def test_a_tighter_clip_moves_less(name: str) -> None:
    base = tiny_teacher()
    moved = []
    for clip in (0.05, 1.0):
        model = base.new_adapter(4, 8, seed=0)
        fine_tune(
            model,
            examples(base, name, [1.0, 0.0, 0.0]),
            FineTuning(1e-2, 12, 3),
            0,
            algorithm=ALGORITHMS[name],
            learning=replace(LEARNING, clip=clip),
        )
        moved.append(
            max(map(abs, (b - a for a, b in zip(likelihoods(base, base.model), likelihoods(base, model), strict=True))))
        )
    assert moved[0] < moved[1]


@pytest.mark.parametrize("name", GRADIENTS)
def test_off_policy_the_first_step_is_the_gradient_times_the_ratio(name: str) -> None:
    """Against a hand computation on the real model: the loss of self-edits of an older policy."""
    base = tiny_teacher()
    on_policy = examples(base, name, [1.0, 0.5, 0.0])
    older = [replace(one, then=tuple(value - 0.1 for value in one.then)) for one in on_policy]
    ratio = math.exp(0.1)  # within the clip: each token is likelier now than when it was written
    losses = []
    for some in (on_policy, older):
        trained = fine_tune(base.new_adapter(4, 8, seed=0), some, FineTuning(1e-9, 1, 4), 0, algorithm=ALGORITHMS[name])
        losses.append(trained.first_loss)
    tokens = [len(one.completion) for one in on_policy]
    by_hand = -sum(one.weight * count for one, count in zip(on_policy, tokens, strict=True)) / sum(tokens)
    assert losses[0] == pytest.approx(by_hand, abs=1e-5)
    assert losses[1] == pytest.approx(by_hand * ratio, abs=1e-5)


@settings(max_examples=20, deadline=None)
@given(st.lists(st.text("abc ", min_size=1, max_size=30), min_size=1, max_size=6), st.integers(1, 4))
def test_probabilities_do_not_depend_on_who_shares_the_batch(texts: list[str], size: int) -> None:
    base = tiny_teacher()
    prompt = tuple(base.prompt_ids(PROMPT))
    made = [Example(prompt, tuple(base.completion_ids(text))) for text in texts]
    together, alone = token_logprobs(base.model, made, size), token_logprobs(base.model, made, 1)
    for one, other, example in zip(together, alone, made, strict=True):
        assert len(one) == len(example.completion)
        assert one == pytest.approx(other, abs=1e-4)
