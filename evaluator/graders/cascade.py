"""Two graders in a row: the second sees only what the first is unsure of."""

from __future__ import annotations

from collections.abc import Sequence

from evaluator.graders.grader import Given, Grader, Verdict, grader_label


class Cascade:
    """Both versions are part of its own."""

    name = "cascade"

    def __init__(self, first: Grader, second: Grader) -> None:
        self._first, self._second = first, second
        self.version = f"1+{grader_label(first)}+{grader_label(second)}"
        self.waits = first.waits or second.waits

    def grade(self, given: Sequence[Given]) -> list[Verdict]:
        """The first one's verdict where it is sure, else the second one's. Raises what they raise."""
        verdicts = self._first.grade(given)
        unsure = [place for place, verdict in enumerate(verdicts) if not verdict.sure]
        if unsure:
            for place, verdict in zip(unsure, self._second.grade([given[place] for place in unsure]), strict=True):
                verdicts[place] = verdict
        return verdicts
