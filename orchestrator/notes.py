"""What a reader must know to read a run's numbers right, in whole sentences. Pure functions of the summary."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from preceptor.arms import EXTERNAL, FORMAT, SHUFFLED, words

# Below this many passages a bootstrap says little.
FEW_PASSAGES = 10
# Below this, most of what tells the self-edits of a passage apart is the luck of a seed.
LOW_RELIABILITY = 0.5
# Arms that are compared train on as many tokens, within this share.
EQUAL_TOKENS = 0.1


def notes(summary: Mapping[str, Any], failed: int) -> list[str]:
    """The notes of a summary that has all its other keys; ``failed`` evaluations, in all stages."""
    heldout, rounds = summary["heldout"], summary["rounds"]
    said = _label_notes(summary)
    few_shot = summary["kind"] == "few_shot"
    if heldout is None:
        said.append("There were no held-out tasks, so nothing was measured on passages the teacher never saw.")
    else:
        said += _comparison_notes(heldout["differences"])
        said += _control_notes(heldout, few_shot)
        said += _material_notes(heldout, few_shot)
    if any(of["evaluations"]["succeeded"] for of in rounds):
        said += _noise_notes(summary["reliability"])
        said += _race_notes(rounds)
        if not few_shot:
            said += _overlap_notes(rounds, written=summary["questions_written"] is not None)
    if costly := sum(of["evaluations"]["too_costly"] for of in rounds):
        said.append(
            f"{costly} self-edits of the rounds would have cost more to train than the run allows. They were not "
            "trained, have no reward, and nothing was learnt from them."
        )
    for of in rounds:
        if not of["evaluations"]["succeeded"]:
            said.append(f"Round {of['round']} gave no reward at all, so the teacher did not learn from it.")
        elif of["update"]["kept"] == 0:
            said.append(f"In round {of['round']} no self-edit was good enough to learn from.")
    if failed:
        said.append(f"{failed} evaluations failed. They were counted and left out; none was scored as zero.")
    return said


def _label_notes(summary: Mapping[str, Any]) -> list[str]:
    said = []
    if any(of["label_free"] for of in summary["rounds"]):
        said.append(
            "Label-free: the rewards of the rounds stand on no labels made by people, but on the student's own "
            "confidence or on questions that a model wrote. What they are worth is not known from them."
        )
    if summary["heldout"] and any(arm and arm["label_free"] for arm in summary["heldout"]["arms"].values()):
        said.append(
            "Label-free: the held-out measurement too has questions that a model wrote or weighs the student's own "
            "confidence. Its accuracies are agreement with a model."
        )
    if written := summary["questions_written"]:
        dropped = ", ".join(f"{number} {reason.replace('_', ' ')}" for reason, number in written["dropped"].items())
        said.append(
            f"The reward questions of {written['tasks']} training tasks were written by the teacher's base model: "
            f"{written['asked']} are asked, {written['kept_apart']} kept apart, "
            f"{sum(written['dropped'].values())} dropped{f' ({dropped})' if dropped else ''}."
        )
    if looks := summary["canary"]:
        last = looks[-1]
        said.append(
            f"The labelled canary tasks stopped the run after round {last['round']}: they were clearly worse than "
            f"after round {last['best_round']}, whose teacher is the trained one."
            if last["stopped"]
            else f"The labelled canary tasks never got clearly worse; they were best after round {last['best_round']}."
        )
    return said


def _comparison_notes(differences: Mapping[str, Any]) -> list[str]:
    said = []
    for name, other in (
        ("trained_minus_untrained", "the untrained teacher"),
        ("trained_minus_fixed", "the best fixed strategy"),
        ("trained_minus_external", "the external teacher"),
        *((name, words(name.partition("_minus_")[2])) for name in differences if f"_minus_{FORMAT}" in name),
    ):
        if name not in differences:
            continue
        difference = differences[name]
        if difference is None:
            said.append(f"The trained teacher could not be compared with {other}.")
            continue
        low, high = difference["ci95"]
        if low > 0:
            said.append(f"The trained teacher is better than {other}: the interval of the difference is above 0.")
        elif high < 0:
            said.append(f"The trained teacher is worse than {other}: the interval of the difference is below 0.")
        else:
            said.append(f"Nothing was gained over {other}: the interval of the difference includes 0.")
    return said


def _control_notes(heldout: Mapping[str, Any], few_shot: bool) -> list[str]:
    """What the controls say about the measurement itself."""
    said = []
    wrong = "The wrong edits" if few_shot else "Shuffled facts"
    arms = heldout["arms"]
    control = heldout["differences"]["shuffled_minus_no_edit"]
    if control is None:
        said.append(
            "The shuffled-facts control was not measured, so it is not known how much comes from material of the right "
            "form alone."
        )
    else:
        numbers = f"{_percent(arms['shuffled_facts'])}, the untouched student {_percent(arms['no_edit'])}"
        if control["ci95"][0] > 0:
            said.append(
                f"{wrong} teach something ({numbers}; the interval of the difference is above 0): part of every "
                f"gain does not come from {'what the edits say' if few_shot else 'the facts'}."
            )
        else:
            said.append(f"{wrong} stay at chance: {numbers}.")
    trained, fixed = arms["trained_teacher"], arms["fixed_strategy"]
    if trained and fixed and trained["trained_tokens"] and fixed["trained_tokens"]:
        ours, theirs = trained["trained_tokens"], fixed["trained_tokens"]
        if _unequal(ours, theirs):
            said.append(
                f"The trained teacher and the fixed strategy are not compared at equal tokens: {ours:.0f} and "
                f"{theirs:.0f} trained tokens a fine-tune."
            )
    others = [
        f"{words(name)} {arm['trained_tokens']:.0f}"
        for name, arm in arms.items()
        if (name.startswith(FORMAT) or name == EXTERNAL)
        and arm
        and arm["trained_tokens"]
        and trained
        and trained["trained_tokens"]
        and _unequal(trained["trained_tokens"], arm["trained_tokens"])
    ]
    if others:
        said.append(
            f"Not at the trained teacher's {trained['trained_tokens']:.0f} trained tokens a fine-tune: "
            f"{', '.join(others)}."
        )
    return said


def _unequal(ours: float, theirs: float) -> bool:
    return abs(ours - theirs) > EQUAL_TOKENS * max(ours, theirs)


def _material_notes(heldout: Mapping[str, Any], few_shot: bool) -> list[str]:
    said = []
    of = "tasks" if few_shot else "passages"
    if heldout["passages"] < FEW_PASSAGES:
        said.append(f"With {heldout['passages']} held-out {of} the intervals mean little.")
    if heldout["bank"] not in ("sealed", "queries"):
        which = "The" if heldout["bank"] == "reward" else "Some"
        said.append(
            f"{which} held-out tasks have no sealed questions, so their reward questions were asked. The teacher never "
            "saw those passages, but the questions' wording is that of training."
        )
    if (opened := heldout["sealed_openings_before"]) and opened["most"]:
        times = "" if opened["fewest"] == opened["most"] else "up to "
        times += "1 run" if opened["most"] == 1 else f"{opened['most']} runs"
        said.append(
            f"The sealed questions of these passages had been opened by {times} before this one. Settings that were "
            "chosen by what was seen then are tuned to them."
        )
    # The shuffled facts have a sentence of their own, and so has what was left out.
    missing = [
        name
        for name, arm in heldout["arms"].items()
        if arm is None and name != SHUFFLED and name not in heldout["left_out"]
    ]
    if missing:
        said.append(
            "Not measured, since the tasks or the config bring nothing for them: "
            f"{', '.join(words(name, few_shot) for name in missing)}."
        )
    said += [
        f"The arm {words(name)} could not be had and was left out: {why['reason']}, {why['message']}"
        for name, why in heldout["left_out"].items()
    ]
    for key, what in (("malformed", "Malformed held-out self-edits"), ("too_costly", "Held-out self-edits too costly")):
        found = [f"{arm[key]} of {words(name)}" for name, arm in heldout["arms"].items() if arm and arm[key]]
        if found:
            said.append(f"{what}: {', '.join(found)}. On those {of} the arm counts as the untouched student.")
    return said


def _noise_notes(reliability: Mapping[str, Any]) -> list[str]:
    share = reliability["value"]
    if share is None:
        return ["How reliable a reward is was not measured: with one seed nothing tells a good self-edit from luck."]
    found = f"Reliability of the rewards: {share:.2f} of the variance between self-edits of a passage is not seed noise"
    if share < LOW_RELIABILITY:
        return [f"{found}, so most of what the teacher was told apart by was luck. More seeds would help."]
    return [f"{found} ({reliability['groups']} groups)."]


def _race_notes(rounds: Sequence[Mapping[str, Any]]) -> list[str]:
    said = []
    if any(of["reward"]["of"] == "survivors" for of in rounds) and any(of["stopped"] for of in rounds):
        stopped, written = sum(of["stopped"] for of in rounds), sum(of["self_edits"] for of in rounds)
        said.append(
            f"{stopped} of {written} self-edits were stopped after a first look. The mean reward of a round is of the "
            "others, so it is above what the teacher writes on average; the mean of the looks is of all."
        )
    if again := [of["fresh"] for of in rounds if of["fresh"]]:
        count = sum(of["count"] for of in again)
        chosen = sum(of["chosen_mean"] * of["count"] for of in again) / count
        fresh = sum(of["mean"] * of["count"] for of in again) / count
        said.append(
            f"The best of each group ({count} in all) had {chosen:+.3f} when they were chosen and {fresh:+.3f} on "
            "fresh seeds. The second is what they are worth, and what the teacher was told."
        )
    return said


def _overlap_notes(rounds: Sequence[Mapping[str, Any]], *, written: bool) -> list[str]:
    audited = [of["overlap"] for of in rounds if of["overlap"]]
    if not audited:
        return ["Whether self-edits copy the questions that measure them was not looked at."]
    copying, number = (sum(of[key] for of in audited) for key in ("with_copied_questions", "self_edits"))
    if not copying:
        return [f"None of {number} self-edits of the rounds copies a question that measured it."]
    said = f"{copying} of {number} self-edits of the rounds copy a question that measured them."
    if written:
        said += (
            " A model wrote these questions as the teacher writes, so they are alike, and copies of them cost nothing."
        )
    return [said]


def _percent(arm: Mapping[str, Any] | None) -> str:
    return f"{arm['accuracy'] * 100:.1f}%" if arm and arm["accuracy"] is not None else "not measured"
