"""Exact match and token F1 against SQuAD's own arithmetic, written out again as in evaluate-v2.0."""

import collections
import re
import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rollcast_envs.rewards import exact_match, token_f1


def official_normalise(s: str) -> str:
    def remove_articles(text: str) -> str:
        return re.sub(re.compile(r"\b(a|an|the)\b", re.UNICODE), " ", text)

    def remove_punctuation(text: str) -> str:
        exclude = set(string.punctuation)
        return "".join(ch for ch in text if ch not in exclude)

    return " ".join(remove_articles(remove_punctuation(s.lower())).split())


def official_tokens(s: str) -> list[str]:
    return official_normalise(s).split() if s else []


def official_f1(gold: str, predicted: str) -> float:
    gold_tokens, predicted_tokens = official_tokens(gold), official_tokens(predicted)
    same = sum((collections.Counter(gold_tokens) & collections.Counter(predicted_tokens)).values())
    if len(gold_tokens) == 0 or len(predicted_tokens) == 0:
        return int(gold_tokens == predicted_tokens)
    if same == 0:
        return 0
    precision, recall = 1.0 * same / len(predicted_tokens), 1.0 * same / len(gold_tokens)
    return (2 * precision * recall) / (precision + recall)


def official_scores(answer: str, references: list[str]) -> tuple[float, float]:
    gold_answers = [gold for gold in references if official_normalise(gold)] or [""]
    exact = max(int(official_normalise(gold) == official_normalise(answer)) for gold in gold_answers)
    return exact, max(official_f1(gold, answer) for gold in gold_answers)


words = st.sampled_from(["the", "a", "An", "Paris", "paris,", "Saint-Denis", "東京", "É", "...", "'", "\n", ""])
phrases = st.lists(words, max_size=6).map(" ".join)
texts = phrases | st.text(max_size=20)


@given(texts, st.lists(texts, max_size=4))
def test_both_measures_equal_the_official_ones(answer: str, references: list[str]) -> None:
    assert (exact_match(answer, references), token_f1(answer, references)) == official_scores(answer, references)


@given(texts, st.lists(texts, max_size=4))
def test_scores_stay_in_range_and_an_exact_match_has_full_f1(answer: str, references: list[str]) -> None:
    exact, f1 = exact_match(answer, references), token_f1(answer, references)
    assert exact in (0.0, 1.0) and 0.0 <= f1 <= 1.0
    assert f1 == 1.0 or exact == 0.0


@given(
    texts,
    st.lists(texts.filter(official_normalise), min_size=1, max_size=3),
    texts.filter(official_normalise),
)
def test_one_more_reference_never_lowers_the_score(answer: str, references: list[str], more: str) -> None:
    assert token_f1(answer, [*references, more]) >= token_f1(answer, references)


@pytest.mark.parametrize(
    ("answer", "references", "exact", "f1"),
    [
        ("Paris", ["Paris"], 1, 1),
        ("  the PARIS. ", ["Paris"], 1, 1),
        ("The capital of France is Paris.", ["Paris"], 0, 1 / 3),
        ("Addis", ["Addis Ababa"], 0, 2 / 3),
        ("Paris Paris", ["Paris"], 0, 2 / 3),
        ("Kiev", ["Kyiv", "Kiev"], 1, 1),
        ("Brasilia", ["Brasília"], 0, 0),
        ("Saint Denis", ["Saint-Denis"], 0, 0),
        ("東京", ["東京"], 1, 1),
        ("東京都", ["東京"], 0, 0),
        ("東京 です", ["東京"], 0, 2 / 3),
        ("「東京」", ["東京"], 0, 0),
        ("МОСКВА!", ["Москва"], 1, 1),
        ("", ["Paris"], 0, 0),
        ("", [""], 1, 1),
        ("", [], 1, 1),
        ("the", ["..."], 1, 1),
        ("Paris", [], 0, 0),
        ("", ["the", "Paris"], 0, 0),
        ("Paris\n🙂", ["Paris"], 0, 2 / 3),
    ],
)
def test_known_cases(answer: str, references: list[str], exact: float, f1: float) -> None:
    assert exact_match(answer, references) == exact
    assert token_f1(answer, references) == pytest.approx(f1)


def test_a_bare_string_is_not_a_list_of_references() -> None:
    with pytest.raises(TypeError, match=r"pass \['Paris'\]"):
        token_f1("Paris", "Paris")
