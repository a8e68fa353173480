"""Full fine-tuning: all weights of a copy, by the same plan that adapters follow."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from evaluator.resolve import resolve_training
from preceptor.errors import PreceptorError
from preceptor.tasks import Question
from preceptor.v1 import trial_pb2, types_pb2
from student import trial_runner
from student.answering import answer
from student.base import LoadedBase
from student.full import check_trainable, plan_full_memory, train_full
from student.memory import Caps
from student.plan import Lesson, TrainingPlan, lesson, make_plan
from student.trainer import StepLimits
from student.trial import TrainingSettings, Trial, TrialOutcome
from student.trial_runner import run_trials
from tests.unit.tiny_students import OTHERS, PACKED, PeakMemory, tiny_base

DOCUMENTS = ("Ada is in Rome.", "Tom is a smith.", "Question: Where is Ada?\nAnswer: Rome", "x")
OLD = ("The sky is blue.", "Water is wet.")
QUESTIONS = [Question("Where is Ada?", "Rome"), Question("What is Tom?", "a smith")]
FULL = TrainingSettings(full=True, learning_rate=3e-3, epochs=4, batch_size=2)


def plan_of(base: LoadedBase, settings: TrainingSettings, seed: int = 5) -> TrainingPlan:
    own, old = (
        [
            lesson(text, one.ids, one.starts, settings, base.eos_id, base.context)
            for text, one in zip(texts, base.encode(texts), strict=True)
        ]
        for texts in (DOCUMENTS, OLD)
    )
    return make_plan(own, old, settings, seed)


def weights_of(model: PreTrainedModel) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def by_hand(base: LoadedBase, plan: TrainingPlan) -> tuple[PreTrainedModel, list[float]]:
    """One document at a time through transformers, and torch's AdamW."""
    model = copy.deepcopy(base.model).requires_grad_(True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1.0, weight_decay=plan.weight_decay)
    losses = []
    for step, rate in zip(plan.steps, plan.learning_rates, strict=True):
        optimizer.param_groups[0]["lr"] = rate
        optimizer.zero_grad()
        total = sum(item.labels for item in step)
        loss = torch.stack([_loss(model, item, base.eos_id) for item in step]).sum() / total
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(model.parameters(), plan.max_grad_norm or math.inf)
        optimizer.step()
        losses.append(float(loss.detach()))
    return model, losses


def _loss(model: PreTrainedModel, item: Lesson, eos: int) -> Tensor:
    whole = torch.tensor([*item.ids, *(eos,) * item.pads])
    mask = torch.tensor([*(1,) * len(item.ids), *(0,) * item.pads])
    logits = model(whole[None], attention_mask=mask[None], use_cache=False).logits[0]
    return functional.cross_entropy(logits[item.loss_from - 1 : -1], whole[item.loss_from :], reduction="sum")


@pytest.mark.parametrize(
    ("shape", "changes"),
    [
        *((shape, {}) for shape in (*PACKED, *OTHERS)),
        ("llama", {"replay_share": 0.4, "weight_decay": 0.1, "schedule": "cosine", "warmup_share": 0.3}),
        ("llama", {"loss_mask": "after_marker", "max_grad_norm": 0.05, "max_train_tokens": 120}),
        ("qwen2", {"pad_to": 24, "gradient_accumulation": 2, "max_steps": 5, "schedule": "constant"}),
    ],
)
@pytest.mark.parametrize("pass_tokens", [1 << 62, 30])
def test_it_learns_what_torch_s_adamw_learns(shape: str, changes: dict[str, Any], pass_tokens: int) -> None:
    base = tiny_base(shape)
    plan = plan_of(base, TrainingSettings(**{**vars_of(FULL), **changes}))
    before = weights_of(base.model)
    trained, result = train_full(base, plan, StepLimits(pass_tokens=pass_tokens))
    theirs, losses = by_hand(base, plan)
    assert result.losses == pytest.approx(losses, rel=1e-4)
    assert result.tokens == plan.tokens
    for name, value in trained.model.state_dict().items():
        if not name.endswith(
            "query_key_value.bias"
        ):  # the loss hardly depends on the keys', and Adam steps along noise
            assert torch.allclose(value, theirs.state_dict()[name], atol=2e-5), name
    moved = [name for name, value in trained.model.state_dict().items() if not torch.equal(value, before[name])]
    assert len(moved) == len(before)  # embeddings and norms too
    assert all(torch.equal(value, before[name]) for name, value in base.model.state_dict().items())
    assert not any(weight.requires_grad for model in (base, trained) for weight in model.model.parameters())


def vars_of(settings: TrainingSettings) -> dict[str, Any]:
    return {name: getattr(settings, name) for name in settings.__dataclass_fields__}


def test_checkpointing_changes_memory_and_not_what_is_learnt() -> None:
    base = tiny_base()
    plan = plan_of(base, FULL)
    plain, there = (train_full(base, plan, StepLimits(checkpointing=on)) for on in (False, True))
    assert there[1].losses == pytest.approx(plain[1].losses, rel=1e-5)
    for one, other in zip(plain[0].model.parameters(), there[0].model.parameters(), strict=True):
        assert torch.allclose(one, other, atol=1e-5)


def run(base: LoadedBase, *trials: Trial, **more: Any) -> list[TrialOutcome]:
    return run_trials(base, trials, [QUESTIONS] * len(trials), replay_documents=OLD, probes=QUESTIONS[:1], **more)


def trial(name: str, settings: TrainingSettings = FULL, documents: Sequence[str] = DOCUMENTS) -> Trial:
    return Trial(name, tuple(documents), 7, settings)


LORA = TrainingSettings(rank=4, learning_rate=1e-2, epochs=4, batch_size=2)


def test_in_a_batch_others_do_not_notice_and_the_student_is_untouched() -> None:
    base = tiny_base()
    before = weights_of(base.model)
    apart = run(base, trial("a", LORA), trial("none", LORA, ()))
    mixed = run(base, trial("full"), trial("a", LORA), trial("again"), trial("none", LORA, ()), trial("no", FULL, ()))
    assert [one.trial_id for one in mixed] == ["full", "a", "again", "none", "no"]
    full, a, again, none, nothing = mixed
    for ours, alone in ((a, apart[0]), (none, apart[1])):
        assert ours.answers == alone.answers
        assert ours.losses == alone.losses
    assert full.answers == again.answers
    assert full.losses == again.losses
    assert len(full.losses) == 8
    assert full.final_loss is not None
    assert full.final_loss < full.losses[0]
    assert full.train_seconds > 0
    assert full.answer_seconds > 0
    assert len(full.probe_answers) == 1
    assert full.answers[0].gold_logprob > none.answers[0].gold_logprob
    # without material it is the untouched student
    assert [one.text for one in nothing.answers] == [one.text for one in none.answers]
    golds = [one.gold_logprob for one in none.answers]
    assert [one.gold_logprob for one in nothing.answers] == pytest.approx(golds, abs=1e-5)
    assert all(torch.equal(value, before[name]) for name, value in base.model.state_dict().items())


def test_a_student_without_targets_for_adapters_can_be_trained_whole() -> None:
    (outcome,) = run(tiny_base("gpt_neox"), trial("full"))
    assert outcome.failure is None
    assert outcome.steps == 8


def test_cancelling_ends_it_at_the_next_step_and_the_rest_goes_on() -> None:
    steps: list[int] = []
    gone: set[str] = set()

    def on_step(number: int) -> None:
        steps.append(number)
        if len(steps) == 3:
            gone.add("full")

    full, other = run(tiny_base(), trial("full"), trial("other"), on_step=on_step, cancelled=lambda: gone)
    assert full.failure is not None
    assert full.failure[0] == "CANCELLED"
    assert (full.steps, other.steps) == (3, 8)
    assert other.failure is None


def test_an_exception_of_on_step_ends_the_batch() -> None:
    def on_step(number: int) -> None:
        if number == 2:
            raise KeyboardInterrupt

    base = tiny_base()
    before = weights_of(base.model)
    with pytest.raises(KeyboardInterrupt):
        run(base, trial("full"), on_step=on_step)
    assert all(torch.equal(value, before[name]) for name, value in base.model.state_dict().items())


def test_one_that_diverges_fails_alone() -> None:
    wild = TrainingSettings(full=True, learning_rate=1e20, epochs=200, max_grad_norm=1e30, schedule="constant")
    base = tiny_base()
    broken, sound = run(base, trial("broken", wild), trial("sound"))
    assert broken.failure is not None, broken.losses[-1]
    assert broken.failure[0] == "TRIAL_DIVERGED"
    assert sound.failure is None


def test_one_for_which_there_is_no_memory_says_what_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    base = tiny_base()
    numbers = sum(one.numel() for one in base.model.parameters())
    free = 2 * (16 * numbers + 300_000)  # enough for adapters
    monkeypatch.setattr(trial_runner, "free_bytes", lambda _device: free)
    full, adapter = run(base, trial("full"), trial("adapter", LORA))
    assert full.failure is not None
    reason, message = full.failure
    assert reason == "TRIAL_OUT_OF_MEMORY"
    assert f"{numbers:,} weights" in message
    assert adapter.failure is None


def test_one_that_does_not_fit_after_all_fails_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def full_memory(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(trial_runner, "train_full", full_memory)
    full, adapter = run(tiny_base(), trial("full"), trial("adapter", LORA))
    assert full.failure is not None
    assert full.failure[0] == "TRIAL_OUT_OF_MEMORY"
    assert adapter.failure is None


@pytest.mark.parametrize("checkpointing", [False, True])
def test_it_takes_what_was_planned(checkpointing: bool) -> None:
    base = tiny_base(num_hidden_layers=4, context=512)
    text = "word " * 60
    settings = TrainingSettings(full=True, epochs=1, batch_size=8)
    (one,) = base.encode([text])
    item = lesson(text, one.ids, one.starts, settings, base.eos_id, base.context)
    plan = make_plan([item] * 8, [], settings, 0)
    free = 32_000_000
    limits = plan_full_memory(base, plan, free, Caps(checkpointing=checkpointing))
    assert limits.checkpointing == checkpointing
    with PeakMemory() as memory:
        train_full(base, plan, limits)
    assert memory.peak < free / 2  # the share of a CPU's memory that plans may count on
    with pytest.raises(PreceptorError, match="GiB") as told:
        plan_full_memory(base, plan, 200_000, Caps())
    assert told.value.reason == "TRIAL_OUT_OF_MEMORY"


def test_weights_without_a_gradient_are_refused() -> None:
    base = tiny_base()
    layer: Any = base.model.get_submodule("model.layers.0.mlp.up_proj")
    layer.weight = nn.Parameter(layer.weight.data.to(torch.int8), requires_grad=False)
    with pytest.raises(PreceptorError, match=r"up_proj.weight is quantised") as told:
        check_trainable(base)
    assert told.value.reason == "BASE_NOT_ADAPTABLE"


def test_what_is_asked_is_what_the_student_s_type_can_hold() -> None:
    """Trained in float32 and rounded once: in bfloat16 steps as small as these would be lost."""
    base = tiny_base()
    nn.Module.to(base.model, torch.bfloat16)
    plan = plan_of(base, TrainingSettings(**{**vars_of(FULL), "learning_rate": 1e-5, "epochs": 60}))
    trained, _ = train_full(base, plan, StepLimits())
    assert {value.dtype for value in trained.model.parameters()} == {torch.bfloat16}
    pairs = zip(base.model.parameters(), trained.model.parameters(), strict=True)
    assert any(not torch.equal(one, other) for one, other in pairs)


def test_an_answer_server_is_not_asked_about_it() -> None:
    def served(*_: object, **__: object) -> Any:
        raise AssertionError("it has the student as it was")

    (outcome,) = run(tiny_base(), trial("full"), answer=served)
    assert outcome.failure is None
    assert answer is not served


def test_what_is_said_of_adapters_is_no_part_of_a_full_fine_tune_s_identity() -> None:
    def resolved(**given: Any) -> trial_pb2.TrainingSettings:
        return resolve_training(trial_pb2.TrainingSettings(**given), types_pb2.Directive(), "here")

    plain = resolved(full=True)
    assert resolved(full=True, rank=64, alpha=3.0, target_modules=["q_proj"]) == plain
    assert resolved(full=True, learning_rate=1e-5) != plain
    directive = types_pb2.Directive(fine_tuning=types_pb2.FINE_TUNING_FULL, rank=4, targets="qv")
    assert resolve_training(trial_pb2.TrainingSettings(), directive, "here") == plain
    back = types_pb2.Directive(fine_tuning=types_pb2.FINE_TUNING_LORA, rank=4, targets="qv")
    settings = resolve_training(trial_pb2.TrainingSettings(full=True), back, "here")
    assert (settings.full, settings.rank, list(settings.target_modules)) == (False, 4, ["q_proj", "v_proj"])
