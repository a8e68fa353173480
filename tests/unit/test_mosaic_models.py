"""Promises of the files that ship with the world of grids: they load, they are small, and they do what the world is
for: demonstrations in the prompt teach nothing, the right directive does, a wrong one does not."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest

from preceptor.completions import Limits, MalformedSelfEdit
from preceptor.few_shot.directives import parse_json_directive
from preceptor.few_shot.text import task_text
from preceptor.few_shot.training import training_documents
from preceptor.few_shot.views import views
from preceptor.tasks import Directive, FewShotTask, Question
from worlds.mosaic import MODELS
from worlds.mosaic.directives import SEEN
from worlds.mosaic.rules import FAMILIES, rules, rules_of
from worlds.mosaic.tasks import RIGHT, WRONG, directive, few_shot_tasks, make_task

tokenizers = pytest.importorskip("tokenizers")
torch = pytest.importorskip("torch")

NAMES = ("teacher", "student")
SHIPPED_BYTES = 5 * 2**20
SAMPLES = 4


@pytest.mark.parametrize("name", NAMES)
def test_every_model_has_the_files_that_from_pretrained_reads(name: str) -> None:
    files = {path.name for path in (MODELS / name).iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"} <= files
    assert not [f for f in files if f.endswith((".bin", ".pt", ".pkl"))]
    assert (MODELS / name / "model.safetensors").stat().st_mode & 0o044 == 0o044  # for every user of an image


def test_all_weights_together_are_small_and_the_tokenizer_is_one() -> None:
    assert sum((MODELS / name / "model.safetensors").stat().st_size for name in NAMES) < SHIPPED_BYTES
    assert len({(MODELS / name / "tokenizer.json").read_bytes() for name in NAMES}) == 1


@pytest.mark.parametrize(
    "text",
    [
        "Input: 012/345/678\nOutput: 876/543/210",
        "Naïve façade — 東京, emoji 🦆\tand a tab\r\nsecond line",
        "\x00\x1b control",
    ],
)
def test_any_text_comes_back_from_the_tokenizer(text: str) -> None:
    tokenizer = tokenizers.Tokenizer.from_file(str(MODELS / "student" / "tokenizer.json"))
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False).ids) == text


def test_a_cell_is_a_token_wherever_it_stands_and_so_is_the_word_of_a_rule() -> None:
    tokenizer = tokenizers.Tokenizer.from_file(str(MODELS / "student" / "tokenizer.json"))
    pieces = tokenizer.encode(" 012/345/678", add_special_tokens=False)
    assert [tokenizer.decode([one]) for one in pieces.ids] == list(" 012/345/678")
    for word in ("Output", *(rule.word for rule in rules())):
        assert len(tokenizer.encode(f"\n{word}:", add_special_tokens=False).ids) == 3


def test_demonstrations_in_the_prompt_teach_nothing_the_right_directive_does_and_a_wrong_one_does_not() -> None:
    earned = {family: [0.0, 0.0, 0.0] for family in FAMILIES}
    for task in few_shot_tasks(5, "train", 4):
        family = next(family for family in FAMILIES if family == task.labels["family"])
        for place, edit in enumerate((Directive(), directive(family, RIGHT[family]), directive(family, WRONG[family]))):
            earned[family][place] += probability(task, edit) / 2
    for untouched, right, wrong in earned.values():
        assert untouched < 0.02
        assert right > 0.4
        assert wrong < right / 2


def probability(task: FewShotTask, directive: Directive) -> float:
    """Of the right outputs, mean over the queries, after training as the run does; ``Directive()``: untouched."""
    from bench.directives import answer_tokens, run_settings
    from student.base import load_base
    from student.trial import AnsweringSettings, Trial
    from student.trial_runner import run_trials

    settings, most = run_settings()
    asked = [Question(query[0].prompt, query[0].gold) for query in views(task, votes=1)]
    augmentations = directive.augmentations
    documents = training_documents(task, augmentations, max_documents=most) if augmentations else ()
    base = load_base(MODELS / "student", source="mosaic", commit="")
    answering = AnsweringSettings(prompt_template="{question}", max_new_tokens=answer_tokens(asked))
    [result] = run_trials(base, [Trial("0", documents, 0, settings.under(directive))], [asked], answering=answering)
    assert result.failure is None
    return sum(math.exp(answer.gold_logprob) for answer in result.answers) / len(asked)


def test_the_teacher_sees_what_happens_and_what_it_writes_is_a_directive_drawn_from_many() -> None:
    from teacher.model import load_teacher
    from teacher.prompts import FEW_SHOT_FORMATS
    from teacher.sampling import SamplingSettings, sample, uniforms

    base, rng = load_teacher(str(MODELS / "teacher"), device="cpu"), random.Random(1)
    families = [family for family in FAMILIES for _ in range(6)]
    tasks = [make_task(f"task-1-{i}", rng.choice(rules_of("heldout", f)), rng) for i, f in enumerate(families)]
    prompts = [FEW_SHOT_FORMATS["augmentations"].render(task.name, task_text(task)) for task in tasks]
    rows = [place for place in range(len(prompts)) for _ in range(SAMPLES)]
    written = sample(
        base.decoder(base.model),
        [base.tokenizer(prompt)["input_ids"] for prompt in prompts],
        rows,
        torch.from_numpy(np.stack([uniforms(0, str(row), row, 1, 128) for row in range(len(rows))])),
        SamplingSettings(temperature=1.0, top_p=1.0, max_new_tokens=128),
        base.end_ids,
    )
    texts = [base.tokenizer.decode(one.tokens) for one in written]
    seen = sum(SEEN[families[row]] in text.split("\n")[0] for row, text in zip(rows, texts, strict=True))
    directives = [found for text in texts if (found := read(text)) is not None]
    assert seen >= 0.8 * len(texts)
    assert len(directives) >= 0.9 * len(texts)
    assert len(set(directives)) >= 0.9 * len(directives)  # of a thousand: it has no opinion yet


def read(text: str) -> Directive | None:
    try:
        return parse_json_directive(text, Limits())
    except MalformedSelfEdit:
        return None
