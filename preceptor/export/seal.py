"""A run in the files of SEAL's published code (github.com/Continual-Intelligence/SEAL, MIT), for its scripts and
whatever else reads them:

* ``self_edits.json``: [{title, context, prompt, completions: [text], questions: [{question, answer}]}]
* ``sft.jsonl``: {prompt, completion}, of the best self-edits: what ReST-EM would train on
* ``results.json``: {overall, articles: [{title, context, prompt, stats, completions: [{text, stats, questions}]}]}

A passage of two rounds stands there twice, as in SEAL's files of two iterations. Answers of students are not stored, so
``questions`` of the results tell right and wrong without the words; there are none where a model wrote what was asked.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import TYPE_CHECKING, Any

from preceptor.channel import call
from preceptor.errors import PreceptorError
from preceptor.export.runs import ExportedRun, Selection, groups, tasks
from preceptor.export.writers import json_lines, json_list
from preceptor.v1 import evaluator_pb2
from preceptor.v1 import orchestrator_pb2 as pb
from preceptor.v1 import types_pb2 as types

if TYPE_CHECKING:
    from preceptor.v1.evaluator_pb2_grpc import EvaluatorServiceStub
    from preceptor.v1.orchestrator_pb2_grpc import OrchestratorServiceStub

FILES = ("self_edits.json", "sft.jsonl", "results.json")


@dataclass(slots=True)
class Counts:
    """What was written, and what could not be."""

    passages: int = 0
    completions: int = 0
    examples: int = 0
    measured: int = 0
    without_text: int = 0  # malformed or too costly: no completion to train on
    without_reward: int = 0
    without_questions: int = 0  # the evaluation is no longer stored, or asked other questions than the passage's


def write_seal(
    stub: OrchestratorServiceStub,
    evaluator: EvaluatorServiceStub,
    run: ExportedRun,
    render: Callable[[str, str], str],
    selection: Selection,
    folder: Path,
    on_group: Callable[[int], None] = lambda _self_edits: None,
) -> Counts:
    """Writes the three files. ``render`` makes a prompt of title and text.

    Raises what the services raise, OUTPUT_NOT_WRITABLE, and INVALID_REQUEST of a run with few-shot tasks.
    """
    counts, seen, articles = Counts(), 0, _Articles()
    known = {task.id: _passage(run, task) for task in tasks(stub, run.id)}
    with ExitStack() as files:
        self_edit = files.enter_context(json_list(folder / FILES[0]))
        example = files.enter_context(json_lines(folder / FILES[1]))
        article = files.enter_context(json_list(folder / FILES[2], "articles", articles.overall))
        for group in groups(stub, run.id):
            passage = known[group[0].task_id]
            prompt = render(passage.title, passage.text)
            written = [edit for edit in group if edit.HasField("self_edit")]
            counts.without_text += len(group) - len(written)
            counts.without_reward += sum(not edit.HasField("reward") for edit in written)
            head = {"title": passage.title, "context": passage.text, "prompt": prompt}
            if written:
                questions = [{"question": q.text, "answer": q.answer} for q in passage.questions]
                completions = [edit.completion for edit in written]
                self_edit({**head, "completions": completions, "questions": questions})
                counts.passages += 1
                counts.completions += len(written)
            for edit in selection.of(group):
                example({"prompt": prompt, "completion": edit.completion})
                counts.examples += 1
            asked = [] if run.questions_written else list(passage.questions)
            measured = [_measured(evaluator, edit, asked, counts) for edit in written if edit.HasField("reward")]
            if measured:
                counts.measured += len(measured)
                article({**head, "stats": articles.add(measured), "completions": measured})
            seen += len(group)
            on_group(seen)
    return counts


def _passage(run: ExportedRun, task: types.Task) -> types.Passage:
    if not task.HasField("passage"):
        raise PreceptorError(
            "INVALID_REQUEST",
            f"run {run.id} has few-shot tasks, whose self-edits are directives; SEAL's layouts hold passages",
            field="run",
        )
    return task.passage


def _measured(
    evaluator: EvaluatorServiceStub, edit: pb.LedgerSelfEdit, asked: Sequence[types.Question], counts: Counts
) -> dict[str, Any]:
    """One completion with its outcome; ``asked``: what its reward is about, where that is known."""
    reward = edit.reward
    found: evaluator_pb2.Evaluation | None = None
    try:
        request = evaluator_pb2.GetEvaluationRequest(evaluation_id=edit.evaluation_id)
        found = call(evaluator.GetEvaluation, request).evaluation
    except PreceptorError as error:
        if error.reason != "EVALUATION_NOT_FOUND":
            raise
    questions = _questions(found, asked) if found else []
    counts.without_questions += not questions
    accuracies = [trial.accuracy for trial in found.trials] if found else []
    stats = {
        "baseline_mean": reward.baseline_accuracy,
        "baseline_std": 0.0,  # the untouched student is measured once
        "adapter_mean": reward.accuracy,
        "adapter_std": stdev(accuracies) if len(accuracies) > 1 else 0.0,
        "gain_mean": reward.accuracy - reward.baseline_accuracy,
    }
    return {"text": edit.completion, "stats": stats, "questions": questions}


def _questions(found: evaluator_pb2.Evaluation, asked: Sequence[types.Question]) -> list[dict[str, Any]]:
    """Right and wrong by question and seed; nothing where other questions were answered."""
    baseline = found.baseline.correct
    if any(len(report.correct) != len(asked) for report in (found.baseline, *found.trials)):
        return []
    return [
        {
            "rep": rep,
            "question": question.text,
            "answer": question.answer,
            "baseline_correct": before,
            "adapter_correct": after,
        }
        for rep, trial in enumerate(found.trials)
        for question, before, after in zip(asked, baseline, trial.correct, strict=True)
    ]


class _Articles:
    """The numbers above the passages."""

    def __init__(self) -> None:
        self._stats: list[dict[str, float]] = []

    def add(self, measured: Sequence[dict[str, Any]]) -> dict[str, float]:
        """The numbers of one passage."""
        stats = [one["stats"] for one in measured]
        adapters = [one["adapter_mean"] for one in stats]
        found = {
            "baseline_accuracy": mean(one["baseline_mean"] for one in stats),
            "adapter_mean_accuracy": mean(adapters),
            "adapter_std_over_completions": stdev(adapters) if len(adapters) > 1 else 0.0,
            "mean_adapter_std_within_completions": mean(one["adapter_std"] for one in stats),
            "mean_gain": mean(one["gain_mean"] for one in stats),
        }
        self._stats.append(found)
        return found

    def overall(self) -> dict[str, Any]:
        """The numbers of all passages, under SEAL's names."""

        def of(name: str) -> list[float]:
            return [one[name] for one in self._stats] or [0.0]

        def spread(values: Sequence[float]) -> float:
            return stdev(values) if len(values) > 1 else 0.0

        overall = {
            "baseline_mean_accuracy": mean(of("baseline_accuracy")),
            "baseline_std_of_article_means": spread(of("baseline_accuracy")),
            "adapter_mean_accuracy": mean(of("adapter_mean_accuracy")),
            "adapter_std_of_article_means": spread(of("adapter_mean_accuracy")),
            "mean_adapter_std_over_completions": mean(of("adapter_std_over_completions")),
            "mean_adapter_std_within_completions": mean(of("mean_adapter_std_within_completions")),
            "mean_gain": mean(of("mean_gain")),
        }
        return {"overall": overall, "n_articles": len(self._stats)}
