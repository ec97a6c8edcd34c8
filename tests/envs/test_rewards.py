"""The rewards' rules: range, best of the references, empty text, known cases, threads, and texts too long for them."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rollcast_envs import rewards
from rollcast_envs.rewards import TextTooLong, bleu, chrf, exact_match, rouge, token_f1

Measure = Callable[[str, list[str]], float]

KINDS = ["rouge1", "rouge2", "rougeL", "rougeLsum"]
ROUGES: list[Measure] = [partial(rouge, kind=kind, tokenizer=how) for kind in KINDS for how in (None, "words")]
OVERLAPS: list[Measure] = [bleu, chrf, *ROUGES]
SQUADS: list[Measure] = [exact_match, token_f1]

words = st.sampled_from(["the", "a", "An", "Paris", "paris,", "Saint-Denis", "東京", "É", "...", "'", "\n", ""])
texts = st.lists(words, max_size=6).map(" ".join) | st.text(max_size=20)

# The first ROUGE imports nltk, which may take seconds.
unhurried = settings(deadline=None)


@unhurried
@given(texts, st.lists(texts, max_size=4))
def test_scores_stay_in_range(answer: str, references: list[str]) -> None:
    assert all(0.0 <= measure(answer, references) <= 1.0 for measure in OVERLAPS + SQUADS)
    assert token_f1(answer, references) == 1.0 or exact_match(answer, references) == 0.0


@unhurried
@given(texts, st.lists(texts, min_size=1, max_size=3))
def test_the_best_reference_counts(answer: str, references: list[str]) -> None:
    for measure in OVERLAPS:
        assert measure(answer, references) == max(measure(answer, [gold]) for gold in references)


@unhurried
@given(texts, st.lists(texts, min_size=1, max_size=3), texts)
def test_one_more_reference_that_says_something_never_lowers_the_score(
    answer: str, references: list[str], more: str
) -> None:
    # To SQuAD an empty reference means that there is no answer, until another reference says something.
    references, more = [gold + " Paris" for gold in references], more + " Paris"
    for measure in OVERLAPS + SQUADS:
        assert measure(answer, [*references, more]) >= measure(answer, references)


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
def test_known_cases_of_squad(answer: str, references: list[str], exact: float, f1: float) -> None:
    assert exact_match(answer, references) == exact
    assert token_f1(answer, references) == pytest.approx(f1)


@pytest.mark.parametrize("measure", OVERLAPS)
def test_overlap_with_empty_text_is_none(measure: Measure) -> None:
    for answer, references in [("", [""]), ("", ["Paris"]), ("Paris", [""]), ("Paris", []), ("", []), (" ", ["\n"])]:
        assert measure(answer, references) == 0.0


@pytest.mark.parametrize("measure", OVERLAPS)
def test_a_perfect_answer_has_the_full_score(measure: Measure) -> None:
    text = "The cat sat on the mat, and the dog ran."
    assert measure(text, ["no", text]) == 1.0


@pytest.mark.parametrize("measure", OVERLAPS + SQUADS)
def test_a_bare_string_is_not_a_list_of_references(measure: Measure) -> None:
    with pytest.raises(TypeError, match=r"pass \['Paris'\]"):
        measure("Paris", "Paris")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("tokenizer", "answer", "reference", "score"),
    [
        (None, "Running CATS", "the cat runs", 4 / 5),
        (None, "Москва", "Москва", 0),
        (None, "naïve", "na ve", 1),
        ("words", "Я люблю Москву!", "я люблю москву", 1),
        ("words", "हिन्दी में", "हिन्दी", 2 / 3),
        ("words", "cafe\u0301", "café", 1),
        ("words", "running", "runs", 0),
        ("characters", "東京都。", "東京", 4 / 5),
        ("characters", "你好，世界", "你好世界", 1),
        ("characters", "👍🏽 好", "好", 1),
        (str.split, "a. b", "a. c", 1 / 2),
    ],
)
def test_rouge_sees_what_the_tokenizer_shows_it(
    tokenizer: str | Callable[[str], list[str]] | None, answer: str, reference: str, score: float
) -> None:
    assert rouge(answer, [reference], "rouge1", tokenizer) == pytest.approx(score)


def test_lines_are_the_sentences_of_rouge_lsum() -> None:
    answer, reference = "the dog ran\nthe cat sat", "the cat sat\nthe dog ran"
    assert rouge(answer, [reference], "rougeLsum") == 1.0
    assert rouge(answer, [reference], "rougeL") == pytest.approx(1 / 2)
    assert rouge(answer.replace("\n", ". "), [reference.replace("\n", ". ")], "rougeLsum") == pytest.approx(1 / 2)


def test_unknown_kinds_and_tokenizers_are_refused_with_those_known() -> None:
    with pytest.raises(ValueError, match=r"'rouge0'.*rouge1 to rouge9, rougeL or rougeLsum"):
        rouge("a", ["a"], "rouge0")
    with pytest.raises(ValueError, match=r"'word'.*'words', 'characters'"):
        rouge("a", ["a"], tokenizer="word")


def test_texts_that_would_take_seconds_are_refused_by_name() -> None:
    with pytest.raises(TextTooLong, match=r"kind='rougeL'.*120,000 tokens.*shorten the answer"):
        rouge("a " * 120_000, ["a " * 120_000])
    lines = "\n".join(f"the cat{number} sat{number}" for number in range(3_000))
    with pytest.raises(
        TextTooLong, match=r"kind='rougeLsum'.*3,000 lines with 9,000 tokens against.*shorten the answer"
    ):
        rouge(lines, [lines], "rougeLsum")


def test_threads_get_the_scores_of_one() -> None:
    sentences = [f"running {number} cats happily agreed on {number % 7} mats" for number in range(60)]
    pairs = [(answer, sentences[::7]) for answer in sentences]

    def scores(pair: tuple[str, list[str]]) -> list[float]:
        return [measure(*pair) for measure in OVERLAPS + SQUADS]

    with ThreadPoolExecutor(8) as threads:
        assert list(threads.map(scores, pairs)) == [scores(pair) for pair in pairs]


def test_only_short_words_are_remembered() -> None:
    rouge("remembered", ["remembered"])
    before = rewards._short_stem.cache_info()
    assert before.maxsize is not None and before.currsize <= before.maxsize
    assert rouge("forgotten" * 1000 + "running", ["forgotten" * 1000 + "runs"]) == 1.0
    assert rewards._short_stem.cache_info().currsize == before.currsize
