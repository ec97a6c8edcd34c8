"""Rewards for text answers, as pure functions: an answer and its accepted references in, [0, 1] out.

Owns the measures; does not know tasks, episodes or costs of length. Every function takes the best over
the references. Exact match and token F1 are those of SQuAD's `evaluate-v2.0.py` (Rajpurkar et al. 2016,
"SQuAD: 100,000+ Questions for Machine Comprehension of Text"; Rajpurkar et al. 2018, "Know What You Don't
Know: Unanswerable Questions for SQuAD"), bit for bit, and so with its limits: accents count, only ASCII
punctuation is stripped, and text without spaces, such as Chinese, is one token. A task that should forgive
a spelling lists it as a reference.
"""

import re
import string
from collections import Counter
from collections.abc import Sequence

ARTICLES = re.compile(r"\b(a|an|the)\b")
PUNCTUATION = str.maketrans("", "", string.punctuation)


def exact_match(answer: str, references: Sequence[str]) -> float:
    """1 if the normalised answer equals a normalised reference, else 0.

    >>> exact_match("The Netherlands.", ["netherlands", "Holland"])
    1.0
    """
    normalised = _normalise(answer)
    return float(any(normalised == _normalise(gold) for gold in _answerable(references)))


def token_f1(answer: str, references: Sequence[str]) -> float:
    """F1 over the normalised words that answer and reference share, counted with repetition.

    Where either is empty after normalisation, it is 1 if both are, else 0 (SQuAD v2).

    >>> round(token_f1("It is Addis Ababa", ["Addis Ababa"]), 3)
    0.667
    """
    words = _normalise(answer).split()
    return max(_f1(words, _normalise(gold).split()) for gold in _answerable(references))


def _normalise(text: str) -> str:
    """Lower case, without ASCII punctuation and English articles, one space between words."""
    return " ".join(ARTICLES.sub(" ", text.lower().translate(PUNCTUATION)).split())


def _answerable(references: Sequence[str]) -> Sequence[str]:
    """The references that say something; if none does, the right answer is the empty one (SQuAD v2)."""
    if isinstance(references, str):
        raise TypeError(f"references is the str {references!r}; expected a list: pass [{references!r}]")
    return [gold for gold in references if _normalise(gold)] or [""]


def _f1(words: list[str], gold: list[str]) -> float:
    if not words or not gold:
        return float(words == gold)
    shared = sum((Counter(words) & Counter(gold)).values())
    if not shared:
        return 0.0
    precision, recall = shared / len(words), shared / len(gold)
    return 2 * precision * recall / (precision + recall)
