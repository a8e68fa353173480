"""What models write, in the shapes in which they write it (the texts are ours)."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from preceptor.splitting import SPLITTINGS, split

DATA = Path(os.environ.get("PRECEPTOR_TEST_DATA", "")) / "self_edits/qwen2.5-7b.jsonl"
NUMBERED = """Sure! Here are the implications of the passage:

1. The bridge was built in 1871.
2. **Span**: It is 240 metres long,
   with four arches.

3. Ships pass
- under the second arch
- at high tide
4.
5. The bridge was built in 1871.
6. It carries two tracks."""
NUMBERED_DOCUMENTS = (
    "The bridge was built in 1871.",
    "Span: It is 240 metres long,\nwith four arches.",
    "Ships pass\n- under the second arch\n- at high tide",
    "It carries two tracks.",
)
OLD = ("The bridge is old.", "Old is the bridge.")
ADA = ("Question: Who?\nAnswer: Ada.", "Question: When?\nAnswer: In 1871.")


@pytest.mark.parametrize(
    ("how", "text", "documents"),
    [
        ("lines", "1. One.\n\n Two. \n---", ("1. One.", "Two.", "---")),
        ("numbered", NUMBERED, NUMBERED_DOCUMENTS),
        ("auto", NUMBERED, NUMBERED_DOCUMENTS),
        # What a base model goes on with: a chat, another list, another passage, remarks.
        ("numbered", "1. A fact.\n2. Another.\nYou are an AI assistant. You will be given a task.", 2),
        ("numbered", "1. A fact.\n2. Another.\n\nPassage:\nThe sea is salty.\n1. It is wet.", 2),
        ("numbered", "1. A fact.\n2. Another.\n\n1. A list of something else.\n2. More of it.", 2),
        ("numbered", "1. A fact.\n2. Another.\n\nLet me know if you need more!", 2),
        ("numbered", "1. A fact.\n2. Another.\n\nThese statements are derived from the passage.", 2),
        ("numbered", "1. A fact.\n2. Another.\n\nHowever, something was said behind the list.", 2),
        # Lists as people write them.
        ("numbered", "(1) A fact.\n(2) Another.", ("A fact.", "Another.")),
        ("numbered", "- A fact.\n- Another.\n* A third.", ("A fact.", "Another.", "A third.")),
        ("numbered", "1. A fact.\n1. Another.\n1. A third.", ("A fact.", "Another.", "A third.")),
        ("numbered", "1.\n\n2.\n\n3.\nStatements:\n\n1. A fact.\n2. Another.", ("A fact.", "Another.")),
        ("numbered", "A fact.\n2. Another.\n3. A third.", ("A fact.", "Another.", "A third.")),
        ("numbered", "No list at all.\nBut lines.", ("No list at all.", "But lines.")),
        ("numbered", "```text\n1. A fact.\n2. Another.\n```", ("A fact.", "Another.")),
        (
            "qa",
            "Question 1: Who built it?\nAnswer 1: Ada Brook.\n\nQuestion 2:  When?\n\nAnswer:\nIn 1871.\nIn May.",
            ("Question: Who built it?\nAnswer: Ada Brook.", "Question: When?\nAnswer: In 1871.\nIn May."),
        ),
        ("qa", "Q: Who?\nA: Ada.\nQ: When?\nA: In 1871.", ADA),
        ("qa", "**Q1:** Who?\n**A1:** Ada.", ("Question: Who?\nAnswer: Ada.",)),
        ("qa", "Question: Who? Answer: Ada.", ("Question: Who?\nAnswer: Ada.",)),
        # "Question 1:" stood in the prompt.
        ("qa", "Who built it?\nAnswer 1: Ada.\nQuestion 2: When?\nAnswer 2: 1871.", 2),
        ("qa", "Question 1: Who?\nAda built it.\nQuestion 2: When?\nIn 1871.", 2),
        ("qa", "Question 1: Who?\nQuestion 2: When?\nQuestion 3: Why?", ()),  # nothing to learn from
        ("qa", "Question 1: Who?\nAnswer 1: Ada.\nQuestion 2: When?", 1),
        ("qa", "Question 1: Who?\nAnswer 1: Ada.\n\nPlease say it simply.\n\nQuestion 1: Who?\nAnswer: Ada.", 1),
        ("qa", "The bridge is old.\nIt is long.", ("The bridge is old.", "It is long.")),
        ("rules", "First part,\nsecond line.\n---\n\n## A heading\nSecond part.\n***\n---\n", 2),
        ("auto", "**Version 1:**\nThe bridge is old.\n\n**Version 2:**\nOld is the bridge.", OLD),
        ("auto", "Passage 1: The bridge is old.\nPassage 2: Old is the bridge.", OLD),
        ("auto", "### Version 1: Chatty\nHey, bridge!\n### Version 2: Dry\nBridge.", ("Hey, bridge!", "Bridge.")),
        ("auto", "The bridge is old.\nIt is long.\n\nOld is the bridge.", 2),
        ("auto", "**The bridge is old.**\n\n**It is long.**", ("The bridge is old.", "It is long.")),
        ("auto", "Passages of ships are rare.\nOptions are few.", ("Passages of ships are rare.", "Options are few.")),
        ("whole", "\n 1. All\n of it ", ("1. All\n of it",)),
        *((how, " \n\n", ()) for how in SPLITTINGS),
    ],
)  # fmt: skip
def test_a_completion_becomes_documents(how: str, text: str, documents: tuple[str, ...] | int) -> None:
    found = split(text, how)
    if isinstance(documents, int):
        assert len(found) == documents, found
    else:
        assert found == documents


def test_a_title_that_stands_alone_is_no_document() -> None:
    text = "1. Old Bridge\n2. The bridge is old.\n3. Old Bridge is long."
    assert split(text, "numbered", title="Old bridge") == ("The bridge is old.", "Old Bridge is long.")


@pytest.mark.parametrize("how", ["numbered", "qa", "rules", "auto"])
def test_of_what_was_cut_off_the_last_document_is_left_out(how: str) -> None:
    text = {"qa": "Q: a?\nA: b.\nQ: c?\nA: d", "rules": "a\n---\nb"}.get(how, "1. a.\n2. b")
    assert len(split(text, how)) == 2
    assert len(split(text, how, finished=False)) == 1


@given(st.text(alphabet=st.sampled_from("ab 1.2)-*:?\n#QA`_"), max_size=120), st.sampled_from(SPLITTINGS))
def test_no_text_breaks_the_splitting_and_no_document_is_blank(text: str, how: str) -> None:
    found = split(text, how)
    assert all(document.strip() for document in found)
    assert all(set(document) <= set(text) | set("Question: Answer\n") for document in found)


@pytest.mark.skipif(not DATA.is_file(), reason="PRECEPTOR_TEST_DATA has none")
def test_real_completions_are_split_sensibly() -> None:
    """At least 95 of the 100 completions of each format hold documents, and these are no debris."""
    by = {"implications": "numbered", "implications-long": "numbered", "rewrite": "auto", "self-qa": "qa"}
    openings = {"self-qa": "Question 1: "}
    counts: dict[str, list[int]] = {name: [] for name in by}
    for line in DATA.read_text().splitlines():
        row = json.loads(line)
        text = openings.get(row["format"], "") + row["completion"]
        documents = split(text, by[row["format"]], title=row["title"])
        counts[row["format"]].append(len(documents))
        debris = [d for d in documents if re.search(r"^\W*\d+[.)]\s|^(Sure|Here are)|You are an AI", d)]
        assert len(debris) <= len(documents) / 10, debris
    for name, found in counts.items():
        assert sum(map(bool, found)) >= 94, name
        assert 2 <= sorted(found)[len(found) // 2] <= 15, name


@pytest.mark.timeout(60)  # it took more than five minutes
@pytest.mark.parametrize("text", ["q: " + " " * 60_000 + "x", "\n" * 60_000 + "a", "1. a\n" * 15_000, "- " * 30_000])
def test_what_a_model_repeats_for_ever_is_split_at_once(text: str) -> None:
    for how in SPLITTINGS:
        split(text, how)
