"""Every reward against its reference implementation, on 10,000 seeded inputs, most of them hostile."""

import collections
import doctest
import math
import random
import re
import string
import time
from collections.abc import Callable
from functools import cache

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rouge_score import rouge_scorer
from sacrebleu import sentence_bleu, sentence_chrf

import rollcast_envs.subsequence
from rollcast_envs.rewards import bleu, chrf, exact_match, rouge, token_f1
from rollcast_envs.subsequence import lcs_length, lcs_positions

Case = tuple[str, list[str]]

KINDS = ["rouge1", "rouge2", "rougeL", "rougeLsum"]
COUNT = 10_000
CPU_SECONDS = 5.0
"""For 100,000 characters. An idle core takes about one; what is quadratic takes minutes."""

ENGLISH = "the a An The cat cats running runs relational happily agreed sky skies dying yyyy sensational ed s y"
MARKED = "Paris Saint-Denis don't U.S. 1,000.5 3-4 10- $5 50% e.g. (see) [x] {y} http://x.y/z?a=b&c=d"
SPACED = "&amp; &amp;lt; &quot; <skipped> -\n \n \r\n \t . , ; … ' '' “ ” « » ! ?"
SCRIPTS = "東京 東京都です。 你好，世界 한국어 ภาษาไทย हिन्दी Москва МОСКВА ἀρχή İstanbul ıI ß ẞ ﬁ ǅ ½ ② ٣ Ⅷ"
JOINED = "مرحبا שלום \u202eabc\u202c \u200f \u200d \ufeff é e\u0301 Z\u0300\u0316\u0300 🙂 👩‍👩‍👧 🏳️‍🌈 👍🏽 🇫🇷"
CONTROL = "\x00 \x0b \x1c \x1f \x7f \x85 \u00a0 \u2028 \u3000 \ud800 \udfff \ufffe \U0010ffff _ __ ``"
PIECES = [
    *(piece for texts in (ENGLISH, MARKED, SCRIPTS, JOINED) for piece in texts.split()),
    *(piece for texts in (SPACED, CONTROL) for piece in texts.split(" ")),
]


def random_text(rng: random.Random) -> str:
    shape = rng.random()
    if shape < 0.04:
        return rng.choice(["", " ", "\n", " \t\n", "\u3000", ".", "the", "...", "\x00"])
    if shape < 0.08:
        return rng.choice(PIECES) * rng.randint(1, 40)
    if shape < 0.16:
        return "".join(chr(rng.randrange(rng.choice([0x80, 0x3000, 0x110000]))) for _ in range(rng.randint(1, 20)))
    pieces = rng.choice([ENGLISH.split(), ENGLISH.split(), PIECES])
    chosen = (rng.choice(pieces) + rng.choice([" ", " ", " ", "\n", ""]) for _ in range(rng.randint(1, 20)))
    return "".join(chosen)


def changed(rng: random.Random, text: str) -> str:
    """A text that shares much with this one: pieces cut out, put in, repeated, in another order or on other lines."""
    pieces = re.split(r"([ \n])", text)
    for _ in range(rng.randint(0, 4)):
        start = rng.randrange(len(pieces) + 1)
        part = pieces[start : start + rng.randint(0, 24)]
        moved = rng.sample(part, len(part))
        instead = [[], [rng.choice(PIECES)], part * 2, moved, moved, moved, ["\n", *moved]]
        pieces[start : start + len(part)] = rng.choice(instead)
    return "".join(pieces)


@pytest.fixture(scope="module")
def cases() -> list[Case]:
    rng = random.Random(20)
    made = []
    for _ in range(COUNT):
        references = [random_text(rng) for _ in range(rng.choice([1, 1, 1, 2]))]
        answer = random_text(rng) if rng.random() < 0.2 else changed(rng, references[0])
        made.append((answer, references))
    return made


def difference(scores: list[float], expected: list[float]) -> float:
    assert len(scores) == len(expected) == COUNT
    assert all(math.isfinite(score) and 0.0 <= score <= 1.0 for score in scores)
    assert len(set(scores)) > 1
    return max(abs(score - other) for score, other in zip(scores, expected, strict=True))


# SQuAD's evaluate-v1.1.py and evaluate-v2.0.py, written out again.


def official_normalise(s: str) -> str:
    def remove_articles(text: str) -> str:
        return re.sub(re.compile(r"\b(a|an|the)\b", re.UNICODE), " ", text)

    def remove_punctuation(text: str) -> str:
        exclude = set(string.punctuation)
        return "".join(ch for ch in text if ch not in exclude)

    return " ".join(remove_articles(remove_punctuation(s.lower())).split())


def official_tokens(s: str) -> list[str]:
    return official_normalise(s).split() if s else []


def official_f1(gold: str, predicted: str, version: int) -> float:
    gold_tokens, predicted_tokens = official_tokens(gold), official_tokens(predicted)
    same = sum((collections.Counter(gold_tokens) & collections.Counter(predicted_tokens)).values())
    if version == 2 and (len(gold_tokens) == 0 or len(predicted_tokens) == 0):
        return int(gold_tokens == predicted_tokens)
    if same == 0:
        return 0
    precision, recall = 1.0 * same / len(predicted_tokens), 1.0 * same / len(gold_tokens)
    return (2 * precision * recall) / (precision + recall)


def official_scores(answer: str, references: list[str], version: int) -> tuple[float, float]:
    if version == 2:
        references = [gold for gold in references if official_normalise(gold)] or [""]
    exact = max(int(official_normalise(gold) == official_normalise(answer)) for gold in references)
    return exact, max(official_f1(gold, answer, version) for gold in references)


def test_exact_match_and_f1_are_squads(cases: list[Case]) -> None:
    expected = [official_scores(answer, references, 2) for answer, references in cases]
    assert difference([exact_match(*case) for case in cases], [exact for exact, _ in expected]) == 0.0
    assert difference([token_f1(*case) for case in cases], [f1 for _, f1 in expected]) == 0.0


def test_the_first_squad_differs_only_where_a_text_is_empty(cases: list[Case]) -> None:
    full = [(answer, golds) for answer, golds in cases if all(map(official_normalise, [answer, *golds]))]
    assert len(full) > COUNT / 2
    assert [(exact_match(*case), token_f1(*case)) for case in full] == [official_scores(*case, 1) for case in full]


words = st.sampled_from(["the", "a", "An", "Paris", "paris,", "Saint-Denis", "東京", "É", "...", "'", "\n", ""])
texts = st.lists(words, max_size=6).map(" ".join) | st.text(max_size=20)


@given(texts, st.lists(texts, max_size=4))
def test_squads_measures_hold_for_any_number_of_references(answer: str, references: list[str]) -> None:
    assert (exact_match(answer, references), token_f1(answer, references)) == official_scores(answer, references, 2)


def test_bleu_is_sacrebleus(cases: list[Case]) -> None:
    expected = [
        max(sentence_bleu(answer, [gold], use_effective_order=True, tokenize="13a").score / 100 for gold in references)
        for answer, references in cases
    ]
    assert difference([bleu(*case) for case in cases], expected) < 1e-12


def test_chrf_is_sacrebleus(cases: list[Case]) -> None:
    expected = [max(sentence_chrf(answer, [gold]).score / 100 for gold in references) for answer, references in cases]
    assert difference([chrf(*case) for case in cases], expected) < 1e-12


def test_rouge_is_rouge_scores(cases: list[Case]) -> None:
    scorer = rouge_scorer.RougeScorer(KINDS, use_stemmer=True)
    expected = [scorer.score_multi(references, answer) for answer, references in cases]
    for kind in KINDS:
        scores = [rouge(answer, references, kind) for answer, references in cases]
        assert difference(scores, [row[kind].fmeasure for row in expected]) == 0.0
    # The order of words matters often enough to be tested.
    assert sum(row["rouge1"].fmeasure != row["rougeL"].fmeasure for row in expected) > COUNT / 20


class Splitter:
    """The form in which rouge_score takes a tokenizer."""

    def tokenize(self, text: str) -> list[str]:
        return list(text.replace("\n", ""))


def test_rouge_with_other_tokens_is_rouge_scores(cases: list[Case]) -> None:
    scorer = rouge_scorer.RougeScorer(KINDS, tokenizer=Splitter())
    for answer, references in cases[:500]:
        expected = scorer.score_multi([text[:60] for text in references], answer[:60])
        for kind in KINDS:
            score = rouge(answer[:60], [text[:60] for text in references], kind, Splitter().tokenize)
            assert score == expected[kind].fmeasure


def test_subsequences_are_rouge_scores_at_every_block_size() -> None:
    rng = random.Random(3)
    for _ in range(2000):
        first, second = ([rng.choice("abcdef"[: rng.randint(1, 6)]) for _ in range(rng.randint(0, 14))] for _ in "12")
        assert lcs_positions(first, second) == rouge_scorer.lcs_ind(first, second)[::-1]
        length = rouge_scorer._lcs_table(first, second)[-1][-1]
        assert {lcs_length(first, second, block) for block in (1, 2, 3, 7, 64)} == {length}
    first, second = ([str(rng.randrange(150)) for _ in range(900)] for _ in "12")
    assert lcs_positions(first, second) == rouge_scorer.lcs_ind(first, second)[::-1]
    assert lcs_length(first, second, 100) == len(lcs_positions(first, second)) > 100


def test_the_examples_of_the_subsequences_are_true() -> None:
    results = doctest.testmod(rollcast_envs.subsequence)
    assert results.attempted > 0 and results.failed == 0


@cache
def long_texts() -> dict[str, tuple[str, str]]:
    """Pairs of 100,000 characters."""
    rng = random.Random(5)
    vocabulary = ["".join(rng.choices(string.ascii_lowercase, k=rng.randint(2, 9))) for _ in range(5000)]
    chinese, marks = [chr(code) for code in range(0x4E00, 0x9000)], "!?()[]{}$%&/.,-1"
    return {
        "prose": tuple(" ".join(rng.choices(vocabulary, k=50_000))[:100_000] for _ in "12"),
        "short words": tuple(" ".join(rng.choices(string.ascii_lowercase, k=50_000)) for _ in "12"),
        "repetitive": ("ha " * 33_333, "ha ha ha. " * 10_000),
        "one word": ("y" * 100_000, "y" * 99_993 + "ational"),
        "chinese": tuple("".join(rng.choices(chinese, k=100_000)) for _ in "12"),
        "punctuation": tuple("".join(rng.choices(marks, k=100_000)) for _ in "12"),
        "marks": ("a" + "\u0316\u0300" * 50_000, "a" + "\u0300\u0316" * 50_000),
        "lines": ("\n".join(rng.choices(vocabulary, k=50_000))[:100_000], " ".join(vocabulary[:60]) + "\nend"),
    }


TEXTS = ["prose", "short words", "repetitive", "one word", "chinese", "punctuation", "marks", "lines"]
MEASURES: dict[str, Callable[[str, list[str]], float]] = {
    "exact_match": exact_match,
    "token_f1": token_f1,
    "bleu": bleu,
    "chrf": chrf,
    "rouge2": lambda answer, references: rouge(answer, references, "rouge2"),
    "rougeL": rouge,
    "rougeL of words": lambda answer, references: rouge(answer, references, tokenizer="words"),
    "rougeL of characters": lambda answer, references: rouge(answer, references, tokenizer="characters"),
    "rougeLsum": lambda answer, references: rouge(answer, [text[:2000] for text in references], "rougeLsum"),
}


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("measure", MEASURES)
def test_a_hundred_thousand_characters_do_not_hold_up_an_episode(measure: str, text: str) -> None:
    answer, reference = long_texts()[text]
    start = time.thread_time()
    assert 0.0 <= MEASURES[measure](answer, [reference]) <= 1.0
    assert time.thread_time() - start < CPU_SECONDS
