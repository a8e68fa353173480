"""Learning from kept self-edits: what is trained, on what, and what stays as it was."""

from __future__ import annotations

import gc
import json
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional

from preceptor.errors import PreceptorError
from teacher.model import PolicyModels, TeacherBase, adapter_files, load_teacher
from teacher.recipe import Lesson, Rewarded, UpdateSettings
from teacher.training import LoraTrainer
from teacher.update import Example, FineTuning, fine_tune
from tests.unit.tiny_teachers import SHAPES, save_tiny_teacher, tiny_teacher

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # by PEFT

TUNING = FineTuning(learning_rate=3e-3, epochs=4, batch_size=2)


def examples(base: TeacherBase) -> list[Example]:
    pairs = [
        ("# Ada\nAda lives in Lisbon.\n", "Ada lives in Lisbon."),
        ("# Bo\nBo is a baker. Bo keeps a heron.\n", "directive: lr=3e-3\nBo is a baker.\nBo keeps a heron."),
        ("# Cy\nCy\n", "Cy."),
        ("# Di\nDi sings in a choir.\n", "Di sings in a choir.\nA choir is where Di sings."),
        ("# Ed\nEd mends clocks.\n", "Ed mends clocks."),
    ]
    return [Example(tuple(base.prompt_ids(p)), tuple(base.completion_ids(c))) for p, c in pairs]


def weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


@pytest.mark.parametrize("shape", SHAPES)
def test_an_update_lowers_the_loss_on_its_examples_and_leaves_the_base_untouched(shape: str) -> None:
    base = tiny_teacher(shape)
    before = weights(base.model)
    steps: list[int] = []
    trained = fine_tune(base.new_adapter(4, 8, seed=0), examples(base), TUNING, 0, on_step=steps.append)
    assert trained.final_loss < trained.first_loss - 0.2
    assert trained.steps == TUNING.steps(5) == len(steps) == 12
    assert all(torch.equal(value, before[name]) for name, value in base.model.state_dict().items())
    assert not any(weight.requires_grad for weight in base.model.parameters())


def test_the_loss_is_that_of_every_completion_token_and_of_nothing_else() -> None:
    base = tiny_teacher()
    total, count = 0.0, 0
    for example in examples(base):
        ids = torch.tensor([[*example.prompt, *example.completion]])
        with torch.no_grad():
            logits = base.model(ids).logits[0, len(example.prompt) - 1 : -1]
        total += float(functional.cross_entropy(logits, torch.tensor(example.completion), reduction="sum"))
        count += len(example.completion)
        assert example.completion[-1] == base.end_id
    trained = fine_tune(base.new_adapter(4, 8, seed=0), examples(base), FineTuning(1e-9, 1, 3), 0)
    assert trained.first_loss == pytest.approx(total / count, abs=1e-5)


def save_adapter(model: Any, folder: Path) -> None:
    folder.mkdir()
    for name, content in adapter_files(model, "tiny").items():
        (folder / name).write_bytes(content)


def test_an_adapter_s_files_are_what_peft_writes(tmp_path: Path) -> None:
    model = tiny_teacher().new_adapter(4, 8, seed=0)
    save_adapter(model, tmp_path / "ours")
    model.save_pretrained(str(tmp_path / "theirs"), save_embedding_layers=False)
    ours, theirs = ((tmp_path / whose / "adapter_model.safetensors").read_bytes() for whose in ("ours", "theirs"))
    assert ours == theirs
    ours, theirs = (json.loads((tmp_path / whose / "adapter_config.json").read_text()) for whose in ("ours", "theirs"))
    for config in (ours, theirs):
        config["target_modules"] = sorted(config["target_modules"])
        config["base_model_name_or_path"] = ""
    assert ours == theirs


def test_the_same_update_twice_gives_the_same_files_and_another_seed_another_adapter(tmp_path: Path) -> None:
    base = tiny_teacher()
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        model = base.new_adapter(4, 8, seed)
        fine_tune(model, examples(base), TUNING, seed)
        save_adapter(model, tmp_path / name)
    files = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert files == ["adapter_config.json", "adapter_model.safetensors"]
    for file in files:
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    assert (tmp_path / "a" / files[1]).read_bytes() != (tmp_path / "c" / files[1]).read_bytes()
    targets = json.loads((tmp_path / "a" / "adapter_config.json").read_text())["target_modules"]
    assert targets == ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]


def test_training_goes_on_from_the_parents_adapter(tmp_path: Path) -> None:
    base = tiny_teacher()
    parent = base.new_adapter(4, 8, seed=0)
    first = fine_tune(parent, examples(base), TUNING, 0)
    save_adapter(parent, tmp_path / "parent")
    before = load_file(tmp_path / "parent" / "adapter_model.safetensors")
    child = base.load_adapter(tmp_path / "parent", trainable=True)
    second = fine_tune(child, examples(base), TUNING, 1)
    assert second.first_loss == pytest.approx(first.final_loss, abs=1e-5)
    assert second.final_loss < second.first_loss
    after = load_file(tmp_path / "parent" / "adapter_model.safetensors")
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_policys_model_is_base_plus_adapter_and_the_base_stays(tmp_path: Path) -> None:
    base = tiny_teacher()
    before = weights(base.model)
    adapted = base.new_adapter(4, 8, seed=0)
    fine_tune(adapted, examples(base), TUNING, 0)
    save_adapter(adapted, tmp_path / "adapter")
    models = PolicyModels(base, capacity=1)
    ready = models.get("x", lambda: tmp_path / "adapter")
    ids = torch.tensor([[0, 40, 41, 42]])
    with torch.no_grad():
        torch.testing.assert_close(ready(ids).logits, adapted(input_ids=ids).logits, atol=1e-5, rtol=1e-5)
        assert not torch.allclose(ready(ids).logits, base.model(ids).logits, atol=1e-3)
        assert torch.equal(models.get("", lambda: None)(ids).logits, base.model(ids).logits)
    assert all(torch.equal(value, before[name]) for name, value in base.model.state_dict().items())
    # one is kept; the other is made again when it is asked for
    assert models.get("x", lambda: tmp_path / "adapter") is not ready


def test_a_shell_shares_the_memory_of_the_base() -> None:
    base = tiny_teacher()
    addresses = {weight.data_ptr() for weight in base.model.parameters()}
    assert {weight.data_ptr() for weight in base.shell().parameters()} == addresses


def test_a_learning_rate_that_blows_up_is_named() -> None:
    base = tiny_teacher()
    with pytest.raises(PreceptorError) as error:
        fine_tune(base.new_adapter(4, 8, seed=0), examples(base), FineTuning(1e30, 3, 2), 0)
    assert error.value.reason == "UPDATE_DIVERGED"


def test_a_folder_is_loaded_as_it_is(tmp_path: Path) -> None:
    base = load_teacher(str(save_tiny_teacher(tmp_path / "teacher")), device="cpu")
    assert base.context == 256
    assert base.end_ids == {1, *range(3, 33)}
    assert base.model.dtype == torch.float32
    assert base.prompt_ids("Ada")[0] == 0
    assert base.completion_ids("Ada")[0] != 0
    text = "Ada – naïve\n  ☃"
    assert base.text(base.completion_ids(text)) == text
    assert len(base.commit) == 64


@pytest.mark.parametrize(
    ("remove", "add", "reason"),
    [
        ("model.safetensors", "pytorch_model.bin", "UNSAFE_CHECKPOINT"),
        ("model.safetensors", "", "BAD_TEACHER_SOURCE"),
        ("tokenizer.json", "", "BAD_TEACHER_SOURCE"),
        ("config.json", "", "BAD_TEACHER_SOURCE"),
    ],
)
def test_a_folder_that_is_no_safe_model_is_refused(tmp_path: Path, remove: str, add: str, reason: str) -> None:
    folder = save_tiny_teacher(tmp_path / "teacher")
    (folder / remove).unlink()
    if add:
        (folder / add).write_bytes(b"\x80")
    with pytest.raises(PreceptorError) as error:
        load_teacher(str(folder), device="cpu")
    assert error.value.reason == reason
    assert str(folder) in str(error.value)


def test_a_folder_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PreceptorError) as error:
        load_teacher(str(tmp_path / "none"), device="cpu")
    assert error.value.reason == "BAD_TEACHER_SOURCE"


@pytest.mark.parametrize("algorithm", ["rest_em", "grpo"])
@pytest.mark.parametrize("stops", [False, True])
def test_no_model_of_an_update_is_left_when_the_base_is_given_back(algorithm: str, stops: bool) -> None:
    from peft import PeftModel

    left: list[int] = []

    def models() -> set[int]:
        gc.collect()
        return {id(thing) for thing in gc.get_objects() if issubclass(type(thing), PeftModel)}

    @contextmanager
    def borrowed() -> Iterator[TeacherBase]:
        before = models()
        try:
            yield tiny_teacher()
        finally:
            left.append(len(models() - before))

    rewards = (0.0, 1.0)
    lessons = [
        Lesson(Rewarded("g", "Ada", "Ada.", f"Ada {i}.", "open", r, 0.0), r - 0.5) for i, r in enumerate(rewards)
    ]
    trainer = LoraTrainer(tiny_teacher(), borrowed)
    settings = UpdateSettings(tuning=TUNING, algorithm=algorithm)
    with pytest.raises(PreceptorError) if stops else nullcontext():
        trainer.train(None, lessons, {}, settings, 0, lambda _step: None, lambda: stops)
    assert left == [0]
