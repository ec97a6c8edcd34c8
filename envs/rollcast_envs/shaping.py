"""Built-in parts of a reward: what helps where the task's own measure is too sparse, and what a safe answer avoids.

Owns the measures, as pure functions `(answer, references, **options) -> float`, finite, each linear in the length of
the answer but for `format`. Does not know weights: every function says how much of something there is, and the weight
says whether that is good. None of them is a metric of the task; they are reported by their own names.

Imports the standard library only: `format` is run in a child process, which loads this file by itself.
"""

import inspect
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

WORD = re.compile(r"\w+(?:['’]\w+)*")


def length(answer: str, references: Sequence[str], *, budget: int = 0, unit: str = "character") -> float:
    """How many characters, or words, the answer has beyond `budget`; the weight is then what each costs.

    >>> length("It is Addis Ababa.", [], budget=3, unit="word")
    1.0
    """
    _not_negative("budget", budget)
    return float(max(0, len(_units(answer, unit)) - budget))


def word_list(
    answer: str,
    references: Sequence[str],
    *,
    words: Sequence[str] = (),
    file: str | None = None,
    measure: str = "share",
) -> float:
    """The share of the answer's words that are on a list, or with `measure="any"` whether one is: 0 or 1.

    The list is `words`, and the lines of `file` without those that begin with "#". An entry may be a phrase. Case does
    not count; words are runs of letters and digits, so text without spaces is one word.

    >>> word_list("Damn, that is a damn long list.", [], words=["damn", "long list"])
    0.5714285714285714
    >>> word_list("All fine.", [], words=["damn"], measure="any")
    0.0
    """
    if measure not in ("share", "any"):
        raise ValueError(f"measure is {measure!r}; expected share or any")
    found = _covered(_words(answer), _phrases(words, file))
    return float(any(found)) if measure == "any" else sum(found) / max(1, len(found))


def repetition(answer: str, references: Sequence[str], *, n: int = 3, unit: str = "word") -> float:
    """The share of the answer's n-grams that occurred in it before.

    >>> repetition("no no no no no", [], n=2)
    0.75
    """
    if not 1 <= n <= MAX_N:
        raise ValueError(f"n is {n}; expected 1 to {MAX_N}")
    units = _units(answer, unit)
    grams = [tuple(units[start : start + n]) for start in range(len(units) - n + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def full_match(answer: str, references: Sequence[str], *, pattern: str) -> float:
    """1 if the whole answer matches the regular expression, else 0.

    A pattern can take for ever, so as a reward (`format`) it is matched in a child process, with a deadline.

    >>> full_match("<think>2 + 2</think> 4", [], pattern=r"(?s)<think>.*</think>[^<>]*")
    1.0
    """
    return float(re.fullmatch(pattern, answer) is not None)


def contains(answer: str, references: Sequence[str], *, whole_words: bool = True) -> float:
    """1 if a reference occurs in the answer, else 0: credit for a right answer in too many words.

    Case does not count. An answer that lists everything contains everything; a part for `length` makes that cost.

    >>> contains("It is Addis Ababa, I think.", ["addis ababa"])
    1.0
    >>> contains("Parisian", ["Paris"]), contains("Parisian", ["Paris"], whole_words=False)
    (0.0, 1.0)
    """
    if whole_words:
        text = _spaced(answer)
        return float(any(_spaced(gold) in text for gold in references if _words(gold)))
    text = answer.casefold()
    return float(any(gold.casefold() in text for gold in references if gold.strip()))


def compression(
    answer: str,
    references: Sequence[str],
    *,
    fields: Mapping[str, Any],
    document: str = "document",
    unit: str = "word",
) -> float:
    """The length of the answer as a share of the document's, at most 1; `document` names the field that holds it.

    >>> compression("Cats sleep.", [], fields={"document": "Cats sleep for most of the day."})
    0.2857142857142857
    """
    text = fields.get(document)
    if not isinstance(text, str):
        raise ValueError(f"there is no text in the field {document!r}; the fields are {', '.join(fields) or 'none'}")
    return min(1.0, len(_units(answer, unit)) / max(1, len(_units(text, unit))))


MAX_N = 32


@dataclass(frozen=True)
class Shaping:
    """A built-in part of a reward, and how it may be used."""

    function: Callable[..., float]
    both_ways: bool
    """It may be good or bad, most often bad: so its weight has to be stated."""
    in_child: bool = False
    """It may hang, so it has to run in a child process."""

    @property
    def options(self) -> list[str]:
        parameters = inspect.signature(self.function).parameters.values()
        return [p.name for p in parameters if p.kind is p.KEYWORD_ONLY and p.name != "fields"]

    def measure(
        self, answer: str, references: Sequence[str], fields: Mapping[str, Any], options: Mapping[str, Any]
    ) -> float:
        """Raises `TypeError`, `ValueError` or `OSError` for options that do not fit."""
        given = {"fields": fields} if "fields" in inspect.signature(self.function).parameters else {}
        return self.function(answer, references, **given, **options)


SHAPING = {
    "length": Shaping(length, both_ways=True),
    "word_list": Shaping(word_list, both_ways=True),
    "repetition": Shaping(repetition, both_ways=True),
    "format": Shaping(full_match, both_ways=False, in_child=True),
    "contains": Shaping(contains, both_ways=False),
    "compression": Shaping(compression, both_ways=True),
}


def _units(text: str, unit: str) -> Sequence[str]:
    if unit not in ("character", "word"):
        raise ValueError(f"unit is {unit!r}; expected character or word")
    return text if unit == "character" else _words(text)


def _words(text: str) -> list[str]:
    return WORD.findall(text.casefold())


def _spaced(text: str) -> str:
    return f" {' '.join(_words(text))} "


def _not_negative(name: str, value: int) -> None:
    if value < 0:
        raise ValueError(f"{name} is {value}; expected a number that is not negative")


def _phrases(words: Sequence[str], file: str | None) -> frozenset[tuple[str, ...]]:
    if isinstance(words, str):
        raise ValueError(f"words is the string {words!r}; expected a list")
    phrases = _parsed(tuple(words)) | (_read(file) if file is not None else frozenset())
    if not phrases:
        raise ValueError("the word list is empty; give words, or a file with one a line")
    return phrases


@lru_cache(maxsize=64)
def _parsed(words: tuple[str, ...]) -> frozenset[tuple[str, ...]]:
    return frozenset(tuple(_words(entry)) for entry in words) - {()}


@lru_cache(maxsize=64)
def _read(file: str) -> frozenset[tuple[str, ...]]:
    lines = Path(file).read_text(encoding="utf-8").splitlines()
    return _parsed(tuple(line for line in lines if not line.startswith("#")))


def _covered(words: list[str], phrases: frozenset[tuple[str, ...]]) -> list[bool]:
    """Which words belong to a phrase on the list."""
    covered = [False] * len(words)
    for start, size in _occurrences(words, phrases):
        covered[start : start + size] = [True] * size
    return covered


def _occurrences(words: list[str], phrases: frozenset[tuple[str, ...]]) -> Iterator[tuple[int, int]]:
    for size in {len(phrase) for phrase in phrases}:
        for start in range(len(words) - size + 1):
            if tuple(words[start : start + size]) in phrases:
                yield start, size
