"""Policy gradients through TeacherService: who wrote an example, what an older writer changes, what is refused."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from preceptor.artifacts import verified_folder
from preceptor.channel import call
from preceptor.errors import PreceptorError
from preceptor.v1 import teacher_pb2 as pb
from teacher.algorithms import ALGORITHMS
from teacher.prompts import prompt_format
from tests.contract.test_teacher_service import Running, update_request, watched
from tests.contract.test_teacher_storage import damage
from tests.unit.tiny_teachers import tiny_teacher

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # by PEFT

GRADIENTS = ("grpo", "rloo")
REWARDS = (0.5, 0.1, -0.3)


@pytest.fixture
def running(tmp_path: Path) -> Iterator[Running]:
    made = Running(tmp_path)
    yield made
    made.stop()


def request(name: str, algorithm: str, writer: str = "", **changes: Any) -> pb.UpdatePolicyRequest:
    """Three groups of three, written by one policy."""
    made: pb.UpdatePolicyRequest = update_request(name, rewards=REWARDS, **changes)
    made.settings.algorithm = algorithm
    for example in made.examples:
        example.policy_id, example.student_commit = writer, "0123abcd"
    return made


def trained(running: Running, asked: pb.UpdatePolicyRequest) -> pb.Policy:
    ended = watched(running, call(running.stub.UpdatePolicy, asked).policy.id)[-1]
    assert ended.state == pb.POLICY_STATE_READY, ended.failure
    return ended


def logprobs(running: Running, policy: pb.Policy, example: pb.RewardedSelfEdit) -> torch.Tensor:
    """Of a completion's tokens by a policy, computed on its own."""
    base = tiny_teacher()
    model = base.load_adapter(verified_folder(policy.adapter), trainable=False) if policy.adapter.uri else base.model
    passage = example.task.passage
    prompt = base.prompt_ids(prompt_format(example.prompt_format).render(passage.title, passage.text))
    completion = base.completion_ids(example.completion)
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([[*prompt, *completion]])).logits[0, len(prompt) - 1 : -1]
    return logits.log_softmax(-1).gather(1, torch.tensor(completion)[:, None])[:, 0]


@pytest.mark.parametrize("algorithm", GRADIENTS)
def test_an_example_of_an_older_policy_is_corrected_by_its_writers_probabilities(
    running: Running, algorithm: str
) -> None:
    base = call(running.stub.GetPolicy, pb.GetPolicyRequest()).policy
    parent = trained(running, request("parent", "rest_em"))
    asked = request("child", algorithm, writer=base.id, parent_id=parent.id)
    child = trained(running, asked)
    total, count = 0.0, 0
    weights = {"grpo": None, "rloo": [0.5 + 0.1, 0.1 - 0.1, -0.3 - 0.3]}[algorithm]
    if weights is None:
        mean = sum(REWARDS) / 3
        deviation = (sum((reward - mean) ** 2 for reward in REWARDS) / 3) ** 0.5
        weights = [(reward - mean) / deviation for reward in REWARDS]
    clipped = 0
    for place, example in enumerate(asked.examples):
        weight = weights[place % 3]
        ratio = (logprobs(running, parent, example) - logprobs(running, base, example)).exp()
        loss = -torch.minimum(ratio * weight, ratio.clamp(0.8, 1.2) * weight)
        clipped += int((ratio.clamp(0.8, 1.2) != ratio).sum())
        total, count = total + float(loss.sum()), count + len(loss)
    assert clipped > 0  # the parent is another policy
    assert child.first_loss == pytest.approx(total / count, abs=1e-4)
    assert child.kl > 0


@pytest.mark.parametrize("algorithm", sorted(ALGORITHMS))
def test_the_parents_name_on_an_example_says_nothing_new_and_an_older_writer_does(
    running: Running, algorithm: str
) -> None:
    parent = trained(running, request("parent", "rest_em"))
    silent = call(running.stub.UpdatePolicy, request("a", algorithm, parent_id=parent.id)).policy
    named = call(running.stub.UpdatePolicy, request("b", algorithm, parent.id, parent_id=parent.id)).policy
    older = call(running.stub.UpdatePolicy, request("c", algorithm, parent.parent_id, parent_id=parent.id)).policy
    assert silent.id == named.id != older.id
    same = watched(running, silent.id)[-1].adapter.sha256 == watched(running, older.id)[-1].adapter.sha256
    assert same == (algorithm == "rest_em")  # fine-tuning does not ask who wrote


def test_without_its_writer_an_example_cannot_be_corrected_and_that_is_said(running: Running) -> None:
    asked = request("r", "grpo", writer="policy-of-another-house")
    with pytest.raises(PreceptorError, match="policy-of-another-house") as error:
        call(running.stub.UpdatePolicy, asked)
    assert error.value.reason == "POLICY_NOT_FOUND"
    asked.settings.algorithm = "rest_em"
    trained(running, asked)


def test_a_writers_damaged_adapter_is_made_again(running: Running, tmp_path: Path) -> None:
    writer = trained(running, request("writer", "rest_em"))
    asked = request("first", "rloo", writer=writer.id, parent_id=writer.parent_id)
    whole = trained(running, asked)
    damage(tmp_path, writer.id, "truncated")
    damage(tmp_path, whole.id, "gone")
    running.teacher.policies.restore(whole.id)
    again = watched(running, whole.id)[-1]
    assert again.state == pb.POLICY_STATE_READY
    assert again.adapter.sha256 == whole.adapter.sha256


@pytest.mark.parametrize("algorithm", sorted(ALGORITHMS))
def test_what_was_offered_and_learnt_is_reported_and_kept(tmp_path: Path, algorithm: str) -> None:
    running = Running(tmp_path)
    made = trained(running, request("r", algorithm))
    running.stop()
    running = Running(tmp_path)
    try:
        found = call(running.stub.GetPolicy, pb.GetPolicyRequest(policy_id=made.id)).policy
        assert found.diversity == made.diversity > 0
        assert found.HasField("kl") == (algorithm != "rest_em")
        assert found.kl == made.kl
        assert (found.groups, found.groups_dropped, found.offered) == (3, 0, 9)
        base = call(running.stub.GetPolicy, pb.GetPolicyRequest(policy_id=made.parent_id)).policy
        assert not base.HasField("diversity")
    finally:
        running.stop()


@pytest.mark.parametrize("algorithm", GRADIENTS)
def test_groups_that_differ_by_no_more_than_noise_are_dropped_and_counted(running: Running, algorithm: str) -> None:
    asked = request("r", algorithm)
    for example in asked.examples[:3]:
        example.reward_stderr = 2.0
    policy = call(running.stub.UpdatePolicy, asked).policy
    assert (policy.groups, policy.groups_dropped, policy.offered) == (3, 1, 9)


@pytest.mark.parametrize(
    ("settings", "field"),
    [
        ({"algorithm": "ppo"}, "settings.algorithm"),
        ({"algorithm": "grpo", "clip": 1.5}, "settings.clip"),
        ({"algorithm": "grpo", "clip": float("nan")}, "settings.clip"),
        ({"algorithm": "rloo", "kl": -0.1}, "settings.kl"),
        ({"algorithm": "rloo", "kl": 101}, "settings.kl"),
        ({"algorithm": "rest_em", "kl": 0.1}, "settings.kl"),
        ({"kl": 0.1}, "settings.kl"),
        ({"diversity": -1}, "settings.diversity"),
    ],
)
def test_wrong_settings_are_refused_by_name(running: Running, settings: dict[str, Any], field: str) -> None:
    with pytest.raises(PreceptorError) as error:
        call(running.stub.UpdatePolicy, update_request("r", settings=pb.UpdateSettings(**settings)))
    assert (error.value.reason, error.value.metadata["field"]) == ("INVALID_REQUEST", field)


def test_a_writer_is_named_as_ids_are(running: Running) -> None:
    asked = update_request("r")
    asked.examples[1].policy_id = "x" * 257
    with pytest.raises(PreceptorError) as error:
        call(running.stub.UpdatePolicy, asked)
    assert error.value.metadata["field"] == "examples[1].policy_id"
