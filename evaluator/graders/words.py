"""Text as the lexical grader compares it: words as stems, numbers as values, in the order of the text. Pure.

``read("The 1,000 dogs' 25-year-old house")`` is ``the #1000 dog #25 year old hous``. Alike come out: digits and number
words, ordinals and cardinals, thousands separators, Roman numerals, percent and currency signs, months and their
abbreviations, British and American spelling, diacritics, plurals and most endings. Units stay words of their own.
"""

from __future__ import annotations

import re
import unicodedata
from functools import lru_cache


def _list(words: str) -> list[str]:
    return words.split()


_SMALL = _list(
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen"
)
_TENS = _list("twenty thirty forty fifty sixty seventy eighty ninety")
_VALUES: dict[str, int] = {
    **{word: value for value, word in enumerate(_SMALL)},
    **{f"{word}th": value for value, word in enumerate(_SMALL)},
    **{word: 10 * value for value, word in enumerate(_TENS, 2)},
    **{f"{word[:-1]}ieth": 10 * value for value, word in enumerate(_TENS, 2)},
    **{"first": 1, "second": 2, "third": 3, "fifth": 5, "eighth": 8, "ninth": 9, "twelfth": 12, "twice": 2},
}
# From II: a lone I, V or X is more often a word, an initial or a letter.
_ROMAN = {
    word: value
    for value, word in enumerate(_list("ii iii iv v vi vii viii ix x xi xii xiii xiv xv xvi xvii xviii xix xx"), 2)
    if len(word) > 1
}
_SCALES = {"hundred": 100, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}
_SCALES |= {f"{word}th": value for word, value in _SCALES.items()}
_MONTHS = _list("january february march april may june july august september october november december")
_SAME = {
    **{month[:3]: month for month in _MONTHS if month != "may"},
    **{"sept": "september", "bce": "bc", "ce": "ad"},
    **{"%": "percent", "percentage": "percent", "$": "dollar", "€": "euro", "£": "pound", "°": "degree"},
    **{"km": "kilometer", "kg": "kilogram", "cm": "centimeter", "mm": "millimeter", "lb": "pound", "ft": "foot"},
    **{"feet": "foot", "children": "child", "men": "man", "women": "woman", "people": "person", "teeth": "tooth"},
    **{"usa": "us", "dr": "doctor", "st": "saint", "mt": "mount", "prof": "professor"},
}
_ISO_DATE = re.compile(r"\b(\d{4})-(\d{2})-(\d{2})\b")
_TOKEN = re.compile(
    r"(?P<number>(?:(?<!\w)[-−])?\d+(?:,\d{3})*(?:\.\d+)?)"
    r"|(?P<after>(?<=\d)(?:st|nd|rd|th|s)\b)"
    r"|(?P<word>(?:[^\W\d_]\.){2,}|[^\W\d_]+(?:['’][^\W\d_]+)*|[%$€£°])"
)
_BRITISH = re.compile(r"(?<=..)tre(s?)$")
_ENDINGS = sorted(
    _list(
        "s es ies e y i al ally ial ic ical ity ous ive ed ing ingly ly ize ise izing ising ized ised ization isation "
        "ation ations ition ion ions or ors er ers est ment ments ness ance ence ant ent ancy ency able ible ful ism "
        "ist ists ian ians an"
    ),
    key=len,
    reverse=True,
)
_INFLECTIONS = frozenset({"s", "es", "ies", "e", "y", "ed", "ing"})
# What is left of a word must still say which word it was.
_LEAST_INFLECTED, _LEAST_DERIVED = 3, 4

NEGATIONS = frozenset({"not", "no", "never", "neither", "nor", "without", "cannot", "none", "nobody", "nothing"})
_PARTICLES = NEGATIONS.union(
    _list(
        "a an the of in on at to for by with from as is are was were be been being it its this that these those and "
        "or but their his her our your my they he she we you i which who whom whose what when where how why there "
        "than then into during about through between also such some any can could would will do does did had has have "
        "so because due if yes around approximately roughly nearly almost over circa"
    )
)


def read(text: str) -> list[str]:
    """The words of ``text``, as stems; numbers as ``#value``."""
    return _merge(_tokens(fold(text)))


def fold(text: str) -> str:
    """Case, width and diacritics away."""
    spread = unicodedata.normalize("NFKD", unicodedata.normalize("NFKD", text).casefold())
    return "".join(character for character in spread if not unicodedata.combining(character))


def content(words: list[str]) -> list[str]:
    """Those of ``read`` that carry meaning, each once, in order: no articles, pronouns, auxiliaries or negations."""
    return list(dict.fromkeys(word for word in words if word not in _PARTICLES))


def is_number(word: str) -> bool:
    """Whether a word of ``read`` is a number."""
    return word.startswith("#")


def is_negation(word: str) -> bool:
    """Whether a word of ``read`` negates."""
    return word in NEGATIONS


@lru_cache(maxsize=100_000)
def stem(word: str) -> str:
    """What remains of a folded word without its endings. Words of one family mostly share it; some strangers do too."""
    if word in _PARTICLES:
        return word
    word = _BRITISH.sub(r"ter\1", word)
    for _ in range(3):
        for ending in _ENDINGS:
            least = _LEAST_INFLECTED if ending in _INFLECTIONS else _LEAST_DERIVED
            if word.endswith(ending) and len(word) - len(ending) >= least:
                word = word[: -len(ending)]
                break
        else:
            break
    if len(word) > _LEAST_DERIVED and word[-1] == word[-2]:
        word = word[:-1]
    return word.replace("our", "or") if len(word) > _LEAST_DERIVED else word


def _tokens(text: str) -> list[tuple[str, str]]:
    """(kind, text) of each token: "digits", "value" (a number word), "scale", "and" or "word"."""
    text = _ISO_DATE.sub(lambda found: f"{found[1]} {_month(int(found[2]))} {int(found[3])}", text)
    tokens: list[tuple[str, str]] = []
    for found in _TOKEN.finditer(text):
        token = found[0]
        if found["number"]:
            tokens.append(("digits", token.replace(",", "").replace("−", "-")))
        elif found["after"]:
            if token == "s" and tokens:  # the 1960s are not 1960
                tokens[-1] = ("decade", tokens[-1][1])
        else:
            word = token.replace(".", "").replace("’", "'")
            if word.endswith("n't"):
                tokens.append(("word", "not"))
                continue
            word = word.removesuffix("'s").replace("'", "")
            kind = "scale" if word in _SCALES else "value" if word in _VALUES else "and" if word == "and" else "word"
            tokens.append((kind, _SAME.get(word, word)))
    return tokens


def _merge(tokens: list[tuple[str, str]]) -> list[str]:
    """Joins what is one number ("2 million", "three hundred and five", "twenty-five") and stems the rest."""
    words: list[str] = []
    number: float | None = None
    spelled = False  # the number so far is in words
    held_and = False
    for kind, token in [*tokens, ("end", "")]:
        if kind == "scale" and not held_and:
            number, spelled = (1.0 if number is None else number) * _SCALES[token], True
            continue
        if kind == "value" and number is not None and spelled and _continues(number, _VALUES[token]):
            number, held_and = number + _VALUES[token], False
            continue
        if kind == "and" and number is not None and spelled and number >= 100 and not held_and:
            held_and = True
            continue
        if number is not None:
            words.append(_number(number))
            number = None
        if held_and:
            words.append("and")
            held_and = False
        if kind == "digits":
            number, spelled = float(token), False
        elif kind == "value":
            number, spelled = float(_VALUES[token]), True
        elif kind == "scale":
            number, spelled = float(_SCALES[token]), True
        elif kind == "decade":
            words.append(f"#{token}s")
        elif token in _ROMAN:
            words.append(_number(_ROMAN[token]))
        elif token:
            words.append(stem(token))
    return words


def _continues(number: float, value: int) -> bool:
    """Whether ``value`` said after ``number`` belongs to it: 20 + 5, 300 + 25, but not 5 + 20."""
    return (value < 10 and number % 100 >= 20 and number % 10 == 0 and value > 0) or (
        number >= 100 and number % 100 == 0 and 0 < value < 100
    )


def _month(number: int) -> str:
    return _MONTHS[number - 1] if 1 <= number <= len(_MONTHS) else str(number)


def _number(value: float) -> str:
    return f"#{value:.12g}"
