"""A teacher that writes through a real vLLM server writes what it would write in its own process.

The shipped teacher cannot be served here (vLLM's attention on the CPU has no kernel for its head size), so this is a
random one with heads of 32, taught a few self-edits until it has habits.
"""

from __future__ import annotations

import math
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from preceptor.channel import call, connect
from preceptor.completions import Limits
from preceptor.errors import PreceptorError
from preceptor.inference import InferenceServer, Probe
from preceptor.server import Server
from preceptor.v1 import teacher_pb2 as pb
from preceptor.v1 import teacher_pb2_grpc, types_pb2
from teacher.backend import Row, SamplingSettings
from teacher.in_process import in_process
from teacher.model import TeacherBase, load_teacher
from teacher.policies import Policies
from teacher.policy_store import Policy
from teacher.prompts import FORMATS
from teacher.service import SERVICE, Teacher, make_backend
from teacher.settings import TeacherSettings
from teacher.update import Example, FineTuning, fine_tune
from teacher.writing import TaskText, WritingRequest, WrittenGroup
from tests.e2e.vllm_server import VllmProcess, vllm_python
from tests.unit.tiny_teachers import PASSAGE, tiny_model, tiny_tokenizer

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),  # by PEFT
]

KEY = "sesame"
LORA = ("--enable-lora", "--max-lora-rank", "16", "--max-loras", "2", "--lora-target-modules")
LORA += ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
SAMPLING = SamplingSettings(1.0, 1.0, 40)
TASKS = tuple(TaskText(f"task-{i}", f"Title {i}", f"{PASSAGE} Number {i}.") for i in range(3))
EDITS = ("Ada lives in Lisbon.", "directive: epochs=4\nAda is a baker.", "Ada keeps a heron.\nShe bakes.")
# Nats, summed over a completion of up to thirty tokens.
TOLERANCE = 1e-3


def save_teacher(folder: Path, *, seed: int = 0, hidden: int = 128) -> Path:
    """A teacher with heads of 32 that has seen self-edits."""
    shape = {"hidden_size": hidden, "intermediate_size": 192, "head_dim": 32}
    heads = {"num_attention_heads": hidden // 32, "num_key_value_heads": hidden // 64}
    base = TeacherBase(tiny_model(seed=seed, context=512, **shape, **heads), tiny_tokenizer(), "", "")
    model = base.new_adapter(16, 32.0, seed)
    fine_tune(model, examples(base), FineTuning(5e-3, 12, 4), seed)
    merged: Any = model.merge_and_unload()
    merged.save_pretrained(str(folder))
    base.tokenizer.save_pretrained(str(folder))
    return folder


def prompt(task: TaskText) -> str:
    return FORMATS["open"].render(task.title, task.text)


def examples(base: TeacherBase) -> list[Example]:
    return [
        Example(tuple(base.prompt_ids(prompt(task))), tuple(base.completion_ids(edit)))
        for task in TASKS
        for edit in EDITS
    ]


def update_request(request_id: str, **changes: Any) -> pb.UpdatePolicyRequest:
    """Teaches the second of the self-edits."""
    rewarded = [
        pb.RewardedSelfEdit(
            group_id=task.id,
            task=types_pb2.Task(id=task.id, passage=types_pb2.Passage(title=task.title, text=task.text)),
            completion=edit,
            prompt_format="open",
            reward=reward,
        )
        for task in TASKS
        for edit, reward in zip(EDITS, (0.1, 0.9, 0.2), strict=True)
    ]
    settings = pb.UpdateSettings(top_k=1, rank=8, alpha=16, learning_rate=5e-3, epochs=4, batch_size=2)
    return pb.UpdatePolicyRequest(request_id=request_id, examples=rewarded, settings=settings, seed=1, **changes)


def writing(policy_id: str, samples: int = 6, **changes: Any) -> WritingRequest:
    request = WritingRequest(policy_id, TASKS, samples, "open", SAMPLING, 3, Limits(), max_resamples=1)
    return replace(request, **changes)


class Served:
    """A vLLM server and a teacher that writes through it."""

    def __init__(self, process: VllmProcess, model: Path, home: Path) -> None:
        self.process = process
        self.settings = TeacherSettings(
            home=home,
            port=0,
            grace_seconds=2,
            teacher_backend="vllm",
            teacher_source=str(model),
            teacher_device="cpu",
            teacher_rows=12,
            teacher_server_url=process.server.url,
            teacher_server_api_key=KEY,
            teacher_server_patience_seconds=240,
        )
        self.base = load_teacher(str(model), device="cpu")
        self.client = self.connect()
        self.start()

    def connect(self, **changes: Any) -> InferenceServer:
        url = self.process.server.url
        return InferenceServer(url, "base", **{"api_key": KEY, "patience_seconds": 60, **changes})

    def start(self) -> None:
        self.backend = make_backend(self.settings)
        self.teacher = Teacher(self.backend, self.settings)
        self.server = Server([SERVICE], self.teacher.add_to, self.settings)
        self.stub = connect(f"127.0.0.1:{self.server.port}", teacher_pb2_grpc.TeacherServiceStub)

    def stop(self) -> None:
        self.teacher.stop()
        self.server.stop()
        self.teacher.store.close()
        self.backend.close()

    @property
    def policies(self) -> Policies:
        return self.teacher.policies

    def write(self, request: WritingRequest) -> list[WrittenGroup]:
        return list(self.teacher.writer.write(request, lambda: False))

    def update(self, request_id: str, **changes: Any) -> Policy:
        """Through gRPC, as the orchestrator does it."""
        policy_id = call(self.stub.UpdatePolicy, update_request(request_id, **changes)).policy.id
        *_, ended = self.policies.watch(policy_id, lambda: False)
        assert ended.state == "ready", ended.failure_message
        return ended

    def adapter(self, policy: Policy) -> Path:
        folder = self.policies.adapter_folder(policy)
        assert folder is not None
        return folder

    def name(self, policy: Policy) -> str:
        return f"policy-{policy.adapter_sha256[:40]}"


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    python = vllm_python()
    if python is None:
        pytest.skip("no vLLM here: `make test-vllm` installs it, or name an interpreter in PRECEPTOR_VLLM_PYTHON")
    folder = tmp_path_factory.mktemp("teacher")
    model = save_teacher(folder / "model")
    # vLLM 0.32 dies on the CPU of a request with a seed whose prompt it reads in parts.
    arguments = ("--max-model-len", "256", "--generation-config", "vllm", "--no-enable-chunked-prefill")
    arguments += ("--api-key", KEY, *LORA)
    process = VllmProcess(python, model, folder, *arguments, environment={"VLLM_SERVER_DEV_MODE": "1"})
    try:
        process.start()
        made = Served(process, model, folder / "home")  # it waits for the server itself
        yield made
        made.stop()
        made.client.close()
    finally:
        process.stop()


@pytest.fixture(scope="module")
def policy(served: Served) -> Policy:
    return served.update("first")


def logprobs(base: TeacherBase, folder: Path | None, rows: list[tuple[list[int], list[int]]]) -> list[float]:
    """By the transformers backend: of each continuation, summed."""
    model: Any = base.shell() if folder is None else base.load_adapter(folder, trainable=False)
    found = []
    with torch.inference_mode():
        for head, tail in rows:
            logits = model(torch.tensor([[*head, *tail]])).logits[0, len(head) - 1 : -1].log_softmax(-1)
            found.append(float(logits.gather(1, torch.tensor(tail)[:, None]).sum()))
    return found


def rows(served: Served, policy_id: str) -> list[tuple[list[int], list[int]]]:
    """Prompts, and what the teacher writes behind them."""
    groups = served.write(writing(policy_id))
    return [
        (served.base.prompt_ids(prompt(task)), served.base.completion_ids(written.completion))
        for task, group in zip(TASKS, groups, strict=True)
        for written in group.written
        if written.completion
    ]


def test_log_probabilities_are_those_of_the_transformers_backend_before_and_after_an_update(
    served: Served, policy: Policy
) -> None:
    base = served.policies.get(policy.parent_id)
    for one, folder, name in ((base, None, "base"), (policy, served.adapter(policy), served.name(policy))):
        asked = rows(served, one.id)
        assert len(asked) > 12
        expected = logprobs(served.base, folder, asked)
        found = served.client.score(asked, model=name)
        off = max(abs(a - b) for a, b in zip(found, expected, strict=True))
        print(f"{one.id[:12]}: {len(asked)} completions, off by at most {off:.2e} nats")
        assert off < TOLERANCE
        drawn = served.client.complete(
            [head for head, _ in asked], model=name, max_tokens=8, seeds=list(range(len(asked))), logprobs=True
        )
        whole = [([*head], list(one.token_ids)) for (head, _), one in zip(asked, drawn, strict=True) if one.token_ids]
        sums = [math.fsum(one.logprobs[: len(one.token_ids)]) for one in drawn if one.token_ids]
        assert sums == pytest.approx(logprobs(served.base, folder, whole), abs=TOLERANCE)


def test_the_update_is_at_work(served: Served, policy: Policy) -> None:
    asked = [(list(example.prompt), list(example.completion)) for example in examples(served.base)[1::3]]
    before = served.client.score(asked, model="base")
    after = served.client.score(asked, model=served.name(policy))
    assert sum(after) > sum(before) + 3


def first_tokens(served: Served, policy: Policy, number: int) -> tuple[Counter[str], Counter[str]]:
    """How often each beginning comes through the server, and by the decoder here, with seeds that differ."""
    here = in_process(served.base)
    drawn = []
    for backend, seed in ((served.backend, 1), (here, 2)):
        asked = [Row(TASKS[0].id, prompt(TASKS[0]), sample, 1) for sample in range(number)]
        settings = SamplingSettings(2.0, 0.95, 2)  # hot, that there are enough beginnings
        with backend.author.writing(policy, lambda: served.policies.adapter_folder(policy), lambda: False) as draw:
            drawn.append(Counter(one.text for one in draw(asked, seed, settings, lambda: False)))
    return drawn[0], drawn[1]


def test_the_distribution_of_samples_is_that_of_the_transformers_backend_before_and_after_an_update(
    served: Served, policy: Policy
) -> None:
    number = 1000
    for one in (served.policies.get(policy.parent_id), policy):
        theirs, ours = first_tokens(served, one, number)
        common = [text for text, times in (theirs + ours).items() if times >= 20]
        bins = [(theirs[text], ours[text]) for text in common]
        bins.append((number - sum(a for a, _ in bins), number - sum(b for _, b in bins)))
        bins = [pair for pair in bins if sum(pair)]
        # two samples of one size: each difference has the variance of the sum of its counts
        chi_square = sum((a - b) ** 2 / (a + b) for a, b in bins)
        freedom = len(bins) - 1
        print(f"{one.id[:12]}: chi-square {chi_square:.1f} with {freedom} degrees of freedom")
        assert freedom >= 6
        assert chi_square < freedom + 4 * math.sqrt(2 * freedom)


def test_the_same_request_gives_the_same_groups_and_the_old_policy_writes_as_before(
    served: Served, policy: Policy
) -> None:
    before = served.write(writing(policy.parent_id, seed=8))
    served.write(writing(policy.id, seed=8))
    again = served.write(writing(policy.parent_id, seed=8, max_resamples=0))  # not from the store
    firsts = [written for group in before for written in group.written if written.draws == 1]
    kept = [written for group in again for written in group.written if not written.malformed_reason]
    assert [one.completion for one in firsts if not one.malformed_reason] == [one.completion for one in kept]
    call(served.stub.ActivatePolicy, pb.ActivatePolicyRequest(policy_id=policy.parent_id, request_id="back"))
    assert served.write(writing("", seed=8))[0].policy_id == policy.parent_id


def test_never_more_policies_are_loaded_than_there_is_room_for(served: Served, policy: Policy) -> None:
    assert served.settings.teacher_server_adapters == 1
    other = served.update("second", parent_id=policy.id)
    first = [group.written for group in served.write(writing(policy.id, seed=9))]
    for seed, one in enumerate((other, policy, other), 10):  # others, lest the store answers
        served.write(writing(one.id, seed=seed))
        assert [name for name in served.client.adapters() if name.startswith("policy-")] == [served.name(one)]
    # loaded again after it was given up, it is what it was
    again = [group.written for group in served.write(writing(policy.id, seed=9, max_resamples=0))]
    for one, two in zip(first, again, strict=True):
        for a, b in zip(one, two, strict=True):
            assert a.draws > 1 or a.completion == b.completion


def test_a_server_killed_and_restarted_in_the_middle_of_writing_is_waited_for(served: Served, policy: Policy) -> None:
    request = writing(policy.id, samples=12, seed=20)
    groups: list[WrittenGroup] = []
    failed: list[BaseException] = []

    def write() -> None:
        try:
            for group in served.teacher.writer.write(request, lambda: False):
                groups.append(group)
        except BaseException as error:
            failed.append(error)

    served.write(writing(policy.id, samples=1, seed=21))  # the adapter is loaded, and will be gone
    writer = threading.Thread(target=write)
    writer.start()
    time.sleep(0.05)
    served.process.kill()
    killed_after = len(groups)
    served.process.start()
    writer.join(300)
    assert not writer.is_alive()
    assert not failed, failed
    assert killed_after < len(TASKS)
    assert [group.task_id for group in groups] == [task.id for task in TASKS]
    served.process.wait_until_up()
    assert served.name(policy) in served.client.adapters()
    undisturbed = served.write(replace(request, max_resamples=0))
    for group, other in zip(groups, undisturbed, strict=True):
        for a, b in zip(group.written, other.written, strict=True):
            assert a.draws > 1 or a.completion == b.completion


def test_an_adapter_for_another_base_is_refused_and_does_not_stay(
    served: Served, policy: Policy, tmp_path: Path
) -> None:
    asked = examples(served.base)[1]
    [mine] = logprobs(served.base, served.adapter(policy), [(list(asked.prompt), list(asked.completion))])
    [plain] = logprobs(served.base, None, [(list(asked.prompt), list(asked.completion))])
    probe = Probe(asked.prompt, asked.completion, mine, plain)
    for name, seed, hidden in (("weights", 5, 128), ("size", 0, 64)):
        stranger = load_teacher(str(save_teacher(tmp_path / name, seed=seed, hidden=hidden)), device="cpu")
        model = stranger.new_adapter(8, 16.0, 1)
        fine_tune(model, examples(stranger), FineTuning(5e-3, 4, 2), 1)
        model.save_pretrained(str(tmp_path / f"{name}-adapter"), save_embedding_layers=False)
        with pytest.raises(PreceptorError) as error:
            served.client.load_adapter(f"stranger-{name}", tmp_path / f"{name}-adapter", probe)
        assert error.value.reason == "ADAPTER_MISMATCH"
        assert "another base model" in str(error.value)
        assert f"stranger-{name}" not in served.client.adapters()


def test_a_folder_that_the_server_does_not_see_is_named(served: Served, tmp_path: Path) -> None:
    with pytest.raises(PreceptorError) as error:
        served.client.load_adapter("nowhere", tmp_path / "nowhere")
    assert error.value.reason == "ADAPTER_NOT_SEEN"
    assert "nowhere" in str(error.value)


def test_wrong_keys_names_and_prompts_are_one_message_each(served: Served) -> None:
    for changes, reason, words in (
        ({"api_key": "wrong"}, "SERVER_REFUSED", "the key is not taken"),
        ({"api_key": ""}, "SERVER_REFUSED", "it wants a key"),
        ({"model": "other"}, "MODEL_NOT_SERVED", "'other'; it serves base"),
    ):
        client = InferenceServer(served.process.server.url, **{"model": "base", "api_key": KEY, **changes})
        with pytest.raises(PreceptorError) as error:
            client.check()
        assert error.value.reason == reason
        assert words in str(error.value)
        client.close()
    with pytest.raises(PreceptorError) as error:
        served.client.complete([[5] * 300], max_tokens=4)
    assert error.value.reason == "PROMPT_TOO_LONG"
    long = TaskText("long", "Long", PASSAGE * 20)
    with pytest.raises(PreceptorError) as error:
        served.write(writing("", tasks=(long,)))
    assert error.value.reason == "PASSAGE_TOO_LONG"  # 256, as the server has it, not 512


def test_another_model_under_the_name_is_refused_when_the_teacher_starts(served: Served, tmp_path: Path) -> None:
    other = save_teacher(tmp_path / "other")
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["Brook", "heron"])
    tokenizer.save_pretrained(str(other))
    with pytest.raises(PreceptorError) as error:
        make_backend(served.settings.model_copy(update={"teacher_source": str(other)}))
    assert error.value.reason == "MODEL_NOT_SERVED"
    assert "tokenizer" in str(error.value)


def test_a_shared_gpus_server_sleeps_during_an_update_and_is_awake_afterwards(served: Served, policy: Policy) -> None:
    served.client.sleep()  # as a teacher left it that died in the middle of an update
    assert served.client.sleeping()
    served.stop()
    served.settings = served.settings.model_copy(update={"teacher_shares_gpu": True})
    served.start()
    assert not served.client.sleeping()
    asleep = []
    watch = threading.Event()

    def look() -> None:
        while not watch.wait(0.02):
            asleep.append(served.client.sleeping())

    looker = threading.Thread(target=look)
    looker.start()
    longer = update_request("third", parent_id=policy.id)
    longer.settings.epochs = 100  # some seconds also on a fast machine, so that a look falls into them
    *_, third = served.policies.watch(call(served.stub.UpdatePolicy, longer).policy.id, lambda: False)
    assert third.state == "ready", third.failure_message
    diverges = update_request("diverges", parent_id=third.id)
    diverges.settings.learning_rate = 1.0
    diverges.settings.epochs = 30
    refused = call(served.stub.UpdatePolicy, diverges)
    watch.set()
    looker.join()
    *_, ended = served.policies.watch(refused.policy.id, lambda: False)
    assert (ended.state, ended.failure_reason) == ("failed", "UPDATE_DIVERGED")
    assert any(asleep)
    assert not served.client.sleeping()
    assert served.write(writing(third.id, seed=30))[0].written


def test_a_server_without_adapters_at_run_time_says_what_to_change(
    served: Served, policy: Policy, tmp_path: Path
) -> None:
    python = vllm_python()
    assert python is not None
    fixed = VllmProcess(
        python,
        Path(served.settings.teacher_source),
        tmp_path,
        *("--max-model-len", "256", "--api-key", KEY),
        environment={"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "0"},
    )
    try:
        fixed.start()
        fixed.wait_until_up()
        client = InferenceServer(fixed.server.url, "base", KEY)
        with pytest.raises(PreceptorError) as error:
            client.load_adapter("any", served.adapter(policy))
        assert error.value.reason == "SERVER_CANNOT_ADAPT"
        assert "VLLM_ALLOW_RUNTIME_LORA_UPDATING=1" in error.value.next_step
        with pytest.raises(PreceptorError) as error:
            client.sleep()
        assert error.value.reason == "SERVER_CANNOT_SLEEP"
        client.close()
    finally:
        fixed.stop()
