"""The inner-loop benchmark runs, and its report keeps its keys."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bench import inner_loop_arms as arms
from bench.inner_loop import ARMS, main, matmul_flops
from bench.inner_loop_workload import (
    HISTOGRAM,
    TARGETS,
    make_histogram,
    random_base,
    self_edit_workload,
    share_of,
    short_workload,
)

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # by PEFT

KEYS = {"trials_per_second", "tokens_per_second", "peak_memory_bytes", "limit_share"}


def test_the_report_keeps_its_keys(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report, picture = tmp_path / "report.json", tmp_path / "report.png"
    options = "--shape minute --trials 5 --epochs 1 --targets qv --padded-steps 2"
    main([*options.split(), "--json", str(report), "--plot", str(picture)])
    written = json.loads(report.read_text())
    assert set(written) == {"arms", "short", "shape", "device", "matmul_flops", "details"}
    assert (written["shape"], written["device"]) == ("minute", "cpu")
    assert set(written["arms"]) == set(ARMS)
    assert set(written["short"]) == {"ours_k15", "bare_peft"}
    for name, arm in {**written["arms"], **written["short"]}.items():
        assert set(arm) - {"scaled_from_steps", "not_measured"} == KEYS, name
        if "not_measured" in arm:
            assert name == "trl_sft"
            assert all(arm[key] is None for key in KEYS)
        else:
            assert all(arm[key] > 0 for key in KEYS), name
    assert written["arms"]["padded_2048"]["scaled_from_steps"] == 2
    assert picture.stat().st_size > 0
    assert "ours_k15 = " in capsys.readouterr().out


def test_every_arm_trains_each_candidate_equally_often() -> None:
    work = self_edit_workload(30, epochs=1)
    few, passage = share_of(work, 3), share_of(work, 6)
    assert (len(few), len(passage), len(share_of(work, 16))) == (5, 15, 30)
    assert sum(item.plan.tokens for item in passage) == 3 * sum(item.plan.tokens for item in few)
    assert sum(len(item.documents) for item in work) == sum(len(item.plan.steps) for item in work)


def test_the_workload_is_the_same_every_time() -> None:
    assert self_edit_workload(15) == self_edit_workload(15)
    lengths = [len(lesson.ids) for item in short_workload(15, epochs=1) for lesson in item.documents]
    assert max(lengths) < 40


def test_the_histogram_holds_numbers_and_says_where_they_are_from() -> None:
    shipped = json.loads(HISTOGRAM.read_text(encoding="utf-8"))
    assert "MIT (c) 2025 Adam Zweiger" in shipped["licence"]
    assert sum(sum(f["documents_per_self_edit"].values()) for f in shipped["formats"].values()) == 400
    made = make_histogram([json.dumps({"format": "f", "completion": "one two\n\nthree\nfour"})])
    assert made["formats"]["f"] == {"documents_per_self_edit": {"3": 1}, "words_per_document": {"1": 2, "2": 1}}


def test_the_model_is_left_as_it_was() -> None:
    base = random_base("minute", "cpu")
    before = [name for name, _ in base.model.named_modules()]
    work = share_of(self_edit_workload(15, epochs=1), 1)
    for arm in (lambda: arms.bare_peft(base, work[:1], TARGETS["qv"]), lambda: arms.ours(base, work, TARGETS["qv"], 4)):
        arm()
        assert [name for name, _ in base.model.named_modules()] == before
    assert matmul_flops("cpu") > 0


def test_trl_trains_the_same_documents_at_the_same_rates_as_the_plain_loop(tmp_path: Path) -> None:
    if reason := arms.why_no_trl():
        pytest.skip(f"{reason}: the docstring of bench/inner_loop.py says how to install it")
    base = random_base("minute", "cpu")
    item, targets = self_edit_workload(1, epochs=2)[0], TARGETS["qv"]
    plain, theirs, rates = [], [], []

    model = arms._with_peft(base, targets, item.seed)
    model.register_forward_hook(lambda *called: plain.append(float(called[2].loss.detach())))
    arms._train_peft(model, item.plan, base.device)
    model.unload()

    with arms.sft_trainer(base, item, targets, str(tmp_path)) as trainer:
        loss_of = trainer.compute_loss

        def recorded(*given: Any, **named: Any) -> Any:
            rates.append(trainer.lr_scheduler.get_last_lr()[0])
            loss = loss_of(*given, **named)
            theirs.append(float(loss.detach()))
            return loss

        trainer.compute_loss = recorded
        trainer.train()

    documents = len(item.documents)
    assert len(theirs) == trainer.state.global_step == len(plain) == len(item.plan.steps) == 2 * documents
    assert rates == pytest.approx(item.plan.learning_rates)
    # later epochs come in another order
    assert theirs[:documents] == pytest.approx(plain[:documents], abs=1e-5)
    assert max(plain[:documents]) - min(plain[:documents]) > 1e-2, "another order would show"


def test_trl_leaves_the_model_as_it_was(tmp_path: Path) -> None:
    if reason := arms.why_no_trl():
        pytest.skip(f"{reason}: the docstring of bench/inner_loop.py says how to install it")
    base = random_base("minute", "cpu")
    before, forward = [name for name, _ in base.model.named_modules()], base.model.forward
    arms.trl_sft(base, self_edit_workload(1, epochs=1), TARGETS["qv"])
    assert [name for name, _ in base.model.named_modules()] == before
    assert base.model.forward == forward
    assert not base.model.is_gradient_checkpointing
