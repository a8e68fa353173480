"""The graders that are at hand, by name."""

from __future__ import annotations

from collections.abc import Mapping

from evaluator.graders.cascade import Cascade
from evaluator.graders.exact import ExactMatch
from evaluator.graders.grader import Grader
from evaluator.graders.grid import GridMatch
from evaluator.graders.lexical import Lexical
from preceptor.errors import PreceptorError

# What a protocol may name; the last two need a judge.
NAMES = ("exact", "lexical", "grid", "judge", "cascade")


class Graders:
    """All graders of an evaluator. Without a ``judge``, naming one is an error that says how to set it."""

    def __init__(self, judge: Grader | None = None) -> None:
        lexical = Lexical()
        self._graders: Mapping[str, Grader] = {
            "exact": ExactMatch(),
            "lexical": lexical,
            "grid": GridMatch(),
            **({"judge": judge, "cascade": Cascade(lexical, judge)} if judge else {}),
        }

    def named(self, name: str) -> Grader:
        """The grader a protocol names; empty means "exact". Raises PreceptorError(GRADER_UNKNOWN, JUDGE_NOT_SET)."""
        name = name or "exact"
        if (grader := self._graders.get(name)) is not None:
            return grader
        if name in NAMES:
            raise PreceptorError(
                "JUDGE_NOT_SET", f"the grader {name!r} asks a judge, and this evaluator has none", field="grader"
            )
        raise PreceptorError(
            "GRADER_UNKNOWN", f"there is no grader {name!r}; known: {', '.join(NAMES)}", field="grader"
        )


WITHOUT_A_JUDGE = Graders()
