"""What a run has written, as files, through the command line."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from preceptor.channel import call
from preceptor.cli import main
from preceptor.export import corpus as corpora
from preceptor.export.corpus import COLUMNS
from preceptor.self_edit_files import read_self_edits
from preceptor.task_files import read_task_file
from preceptor.testing.scripted_house import ScriptedHouse
from preceptor.v1 import orchestrator_pb2 as pb
from tests.integration.test_label_free_runs import WRITTEN, AskingTeacher
from tests.orchestrated import Orchestrator, create_request, few_shot_request, orchestrator_here, run_config


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Orchestrator, ScriptedHouse]]:
    home = tmp_path_factory.mktemp("home")
    with ScriptedHouse(home / "house") as house, orchestrator_here(house, home) as orchestrator:
        yield orchestrator, house


@pytest.fixture(scope="module")
def run_id(stack: tuple[Orchestrator, ScriptedHouse]) -> str:
    orchestrator, _ = stack
    created = orchestrator.create(create_request(run_config(teacher={"max_resamples": 0})))
    assert orchestrator.finish(created).state == pb.RUN_STATE_SUCCEEDED
    return created


@pytest.fixture(autouse=True)
def here(stack: tuple[Orchestrator, ScriptedHouse], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    orchestrator, house = stack
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PRECEPTOR_ORCHESTRATOR_ADDRESS", orchestrator.address)
    for service in ("teacher", "evaluator"):
        monkeypatch.setenv(f"PRECEPTOR_{service.upper()}_ADDRESS", house.address(service))


def lines(path: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


def test_every_document_of_a_rewarded_self_edit_is_a_line_with_its_provenance(
    stack: tuple[Orchestrator, ScriptedHouse], run_id: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", "corpus", run_id, "--out", "deep/corpus.jsonl", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    found = lines("deep/corpus.jsonl")
    ledger = {(e.round, e.task_id, e.index): e for e in stack[0].self_edits(run_id)}
    rewarded = [e for e in ledger.values() if e.HasField("reward")]
    assert len(found) == said["documents"] == sum(len(e.self_edit.documents) for e in rewarded) > 20
    assert said["self_edits"] == len(ledger) == said["exported"] + said["malformed"] + said["without_reward"]
    for line in found:
        edit = ledger[line["round"], line["task"], line["index"]]
        assert list(line) == list(COLUMNS)
        assert line["text"] == edit.self_edit.documents[line["document"]]
        assert (line["reward"], line["policy"]) == (edit.reward.value, edit.policy_id)
        assert (line["run"], line["title"]) == (run_id, edit.task_title)
        assert line["student"]
        assert line["student_commit"]


def test_only_the_best_of_each_group_above_a_bound_are_written(run_id: str) -> None:
    assert main(["export", "corpus", run_id, "--out", "all.jsonl"]) == 0
    assert main(["export", "corpus", run_id, "--out", "best.jsonl", "--best", "1"]) == 0
    every, best = lines("all.jsonl"), lines("best.jsonl")
    groups = {(line["round"], line["task"]) for line in every}
    assert {(line["round"], line["task"]) for line in best} == groups
    for round_, task in groups:
        mine = {line["index"]: line["reward"] for line in every if (line["round"], line["task"]) == (round_, task)}
        kept = {line["index"] for line in best if (line["round"], line["task"]) == (round_, task)}
        assert len(kept) == 1
        assert mine[kept.pop()] == max(mine.values())
    middle = sorted(line["reward"] for line in every)[len(every) // 2]
    assert main(["export", "corpus", run_id, "--out", "above.jsonl", "--min-reward", str(middle)]) == 0
    assert lines("above.jsonl") == [line for line in every if line["reward"] >= middle]


def test_parquet_holds_the_same_lines(run_id: str, monkeypatch: pytest.MonkeyPatch) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    monkeypatch.setattr("preceptor.export.writers._ROWS", 7)
    assert main(["export", "corpus", run_id, run_id, "--out", "corpus.parquet"]) == 0
    assert main(["export", "corpus", run_id, "--out", "corpus.jsonl"]) == 0
    assert parquet.read_table("corpus.parquet").to_pylist() == lines("corpus.jsonl")


def test_without_the_extra_parquet_is_refused_and_nothing_is_left(
    run_id: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert main(["export", "corpus", run_id, "--out", "corpus.parquet"]) == 2
    error = capsys.readouterr().err
    assert "needs the extra `parquet`" in error
    assert "pip install 'preceptor[EXTRA]'" in error
    assert list(Path().iterdir()) == []


def test_a_file_that_was_there_stays_if_the_export_fails(run_id: str, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("corpus.jsonl").write_text("old\n")
    real = corpora.corpus_lines

    def failing(*arguments: Any) -> Iterator[dict[str, Any]]:
        yield from real(*arguments)
        raise KeyboardInterrupt

    monkeypatch.setattr(corpora, "corpus_lines", failing)
    assert main(["export", "corpus", run_id, "--out", "corpus.jsonl"]) == 130
    assert [path.name for path in Path().iterdir()] == ["corpus.jsonl"]
    assert Path("corpus.jsonl").read_text() == "old\n"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["corpus", "run-x", "--out", "a.jsonl"], "RUN_NOT_FOUND"),
        (["seal", "run-x", "--out", "a"], "RUN_NOT_FOUND"),
        (["corpus", "RUN", "run-x", "--out", "a.jsonl"], "RUN_NOT_FOUND"),
        (["corpus", "RUN", "--out", "a.csv"], "--out must end in .jsonl or .parquet"),
        (["corpus", "RUN", "--out", "a.jsonl", "--best", "0"], "--best"),
        (["corpus", "RUN", "--out", "a.jsonl", "--min-reward", "nan"], "--min-reward must be a number"),
        (["corpus", "RUN", "--out", "/dev/null/a.jsonl"], "OUTPUT_NOT_WRITABLE"),
        (["seal", "RUN", "--out", "/dev/null/a"], "OUTPUT_NOT_WRITABLE"),
    ],
)
def test_what_is_asked_wrongly_is_said_and_writes_nothing(
    run_id: str, arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", *(run_id if word == "RUN" else word for word in arguments)]) == 2
    assert said in capsys.readouterr().err
    assert list(Path().iterdir()) == []


def test_seals_files_are_written_and_read_again(
    stack: tuple[Orchestrator, ScriptedHouse], run_id: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", "seal", run_id, "--out", "seal", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    ledger = [e for e in stack[0].self_edits(run_id) if e.HasField("self_edit")]
    passages = json.loads(Path("seal/self_edits.json").read_text())
    assert sum(len(p["completions"]) for p in passages) == said["completions"] == len(ledger)
    for passage in passages:
        assert passage["title"] in passage["prompt"]
        assert passage["context"] in passage["prompt"]
        assert passage["questions"]
        assert all(q["question"].startswith("reward") for q in passage["questions"])  # nothing sealed
    examples = lines("seal/sft.jsonl")
    assert len(examples) == len(passages)
    assert {(e["prompt"], e["completion"]) for e in examples} <= {
        (p["prompt"], text) for p in passages for text in p["completions"]
    }
    result = json.loads(Path("seal/results.json").read_text())
    articles = result["articles"]
    assert result["n_articles"] == len(articles) == len(passages)
    assert all(one["questions"] for article in articles for one in article["completions"])
    assert not said["without_questions"]
    gains = [a["stats"]["adapter_mean_accuracy"] - a["stats"]["baseline_accuracy"] for a in articles]
    assert result["overall"]["mean_gain"] == pytest.approx(sum(gains) / len(gains))
    # Our own readers take them back.
    tasks = read_task_file(Path("seal/self_edits.json"))
    assert not [p for p in tasks.problems if "same text" not in p.message]  # a passage of two rounds stands there twice
    for file in ("seal/self_edits.json", "seal/sft.jsonl", "seal/results.json"):
        assert read_self_edits([file]).self_edits


def test_answers_to_written_questions_are_not_said_of_the_passages_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    house = ScriptedHouse(tmp_path / "house", AskingTeacher())
    with house, orchestrator_here(house, tmp_path / "home") as o:
        monkeypatch.setenv("PRECEPTOR_ORCHESTRATOR_ADDRESS", o.address)
        for service in ("teacher", "evaluator"):
            monkeypatch.setenv(f"PRECEPTOR_{service.upper()}_ADDRESS", house.address(service))
        run_id = o.create(create_request(run_config(tasks=WRITTEN)))
        assert o.finish(run_id).state == pb.RUN_STATE_SUCCEEDED
        assert main(["export", "seal", run_id, "--out", "seal", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    articles = json.loads(Path("seal/results.json").read_text())["articles"]
    assert said["without_questions"] == said["measured"] > 0
    assert not any(one["questions"] for article in articles for one in article["completions"])


def test_a_few_shot_run_has_no_passages_for_seals_layouts(
    stack: tuple[Orchestrator, ScriptedHouse], capsys: pytest.CaptureFixture[str]
) -> None:
    orchestrator, _ = stack
    grids = orchestrator.create(few_shot_request())
    assert orchestrator.finish(grids).state == pb.RUN_STATE_SUCCEEDED
    assert main(["export", "seal", grids, "--out", "seal"]) == 2
    assert "has few-shot tasks" in capsys.readouterr().err
    assert main(["export", "corpus", grids, "--out", "corpus.jsonl", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["documents"] == 0
    assert said["without_documents"] == said["exported"] > 0


def test_a_runs_tasks_are_listed_without_what_is_sealed(stack: tuple[Orchestrator, ScriptedHouse], run_id: str) -> None:
    stub = stack[0].stub
    first = call(stub.ListRunTasks, pb.ListRunTasksRequest(run_id=run_id, page_size=3))
    rest = call(stub.ListRunTasks, pb.ListRunTasksRequest(run_id=run_id, page_token=first.next_page_token))
    found = [*first.tasks, *rest.tasks]
    assert [task.passage.title for task in found] == [f"town {i}" for i in range(5)]
    assert not rest.next_page_token
    for task in found:
        assert not task.reference_edits
        assert all(question.text.startswith("reward") for question in task.passage.questions)
