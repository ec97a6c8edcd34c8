"""Built-in parts of a reward: values worked out by hand, and that they are finite and linear whatever the answer."""

import math
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rollcast_envs.shaping import SHAPING, compression, contains, full_match, length, repetition, word_list

IN_PROCESS = {
    "length": {"budget": 3, "unit": "word"},
    "word_list": {"words": ["damn", "ill will", "日本"]},
    "repetition": {"n": 2},
    "contains": {},
    "compression": {},
}


@pytest.mark.parametrize(
    ("answer", "options", "value"),
    [
        ("", {}, 0.0),
        ("Paris", {}, 5.0),
        ("Paris", {"budget": 5}, 0.0),
        ("Paris", {"budget": 3}, 2.0),
        ("It is Paris, isn't it?", {"unit": "word"}, 5.0),
        ("It is Paris, isn't it?", {"unit": "word", "budget": 4}, 1.0),
        ("日本\n🙂", {}, 4.0),
    ],
)
def test_length_counts_what_is_beyond_the_budget(answer: str, options: dict[str, Any], value: float) -> None:
    assert length(answer, [], **options) == value


@pytest.mark.parametrize(
    ("answer", "words", "share"),
    [
        ("", ["damn"], 0.0),
        ("a fine day", ["damn"], 0.0),
        ("DAMN!", ["damn"], 1.0),
        ("damned day", ["damn"], 0.0),
        ("a damn day, damn", ["damn"], 0.5),
        ("he bears ill will to all", ["ill will"], 2 / 6),
        ("ill. Will he?", ["ill will"], 2 / 3),
        ("ill ill will", ["ill", "ill will"], 1.0),
        ("Schei\u00dfe", ["SCHEISSE"], 1.0),
    ],
)
def test_word_list_knows_words_and_phrases(answer: str, words: list[str], share: float) -> None:
    assert word_list(answer, [], words=words) == pytest.approx(share)
    assert word_list(answer, [], words=words, measure="any") == float(share > 0)


def test_word_list_reads_a_file(tmp_path: Path) -> None:
    file = tmp_path / "words.txt"
    file.write_text("# not this\ndamn\n\n  Ill will \n", encoding="utf-8")
    assert word_list("this damn ill will", [], file=str(file)) == 0.75
    assert word_list("this damn ill will", [], file=str(file), words=["this"]) == 1.0


@pytest.mark.parametrize(
    ("answer", "options", "value"),
    [
        ("", {}, 0.0),
        ("one two", {}, 0.0),
        ("one two three four", {}, 0.0),
        ("no no no no", {"n": 1}, 0.75),
        ("a b a b a b", {"n": 2}, 0.6),
        ("Yes. yes! YES?", {"n": 1}, 2 / 3),
        ("ababab", {"n": 2, "unit": "character"}, 0.6),
    ],
)
def test_repetition_is_the_share_of_ngrams_seen_before(answer: str, options: dict[str, Any], value: float) -> None:
    assert repetition(answer, [], **options) == pytest.approx(value)


@pytest.mark.parametrize(
    ("answer", "references", "value"),
    [
        ("It is Paris.", ["Paris"], 1.0),
        ("PARIS", ["London", "paris"], 1.0),
        ("Parisian", ["Paris"], 0.0),
        ("addis, ababa", ["Addis Ababa"], 1.0),
        ("Ababa Addis", ["Addis Ababa"], 0.0),
        ("anything", [], 0.0),
        ("anything", ["", "..."], 0.0),
        ("", ["Paris"], 0.0),
    ],
)
def test_contains_gives_credit_for_a_reference_in_whole_words(answer: str, references: list[str], value: float) -> None:
    assert contains(answer, references) == value


def test_contains_takes_parts_of_words_where_there_are_no_spaces() -> None:
    assert contains("首都は東京です", ["東京"]) == 0.0
    assert contains("首都は東京です", ["東京"], whole_words=False) == 1.0
    assert contains("東京", [" "], whole_words=False) == 0.0


def test_compression_is_the_answers_share_of_the_document() -> None:
    fields = {"text": "one two three four"}
    assert compression("one two", [], fields=fields, document="text") == 0.5
    assert compression("one " * 9, [], fields=fields, document="text") == 1.0
    assert compression("", [], fields=fields, document="text") == 0.0
    assert compression("one", [], fields={"document": ""}) == 1.0
    with pytest.raises(ValueError, match=r"no text in the field 'document'; the fields are text"):
        compression("one", [], fields=fields)


def test_format_matches_the_whole_answer() -> None:
    assert full_match("42", [], pattern=r"\d+") == 1.0
    assert full_match("42.", [], pattern=r"\d+") == 0.0
    assert full_match("a\nb", [], pattern=r"(?s)a.b") == 1.0


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("length", {"budget": -1}, "not negative"),
        ("length", {"unit": "token"}, "expected character or word"),
        ("word_list", {}, "the word list is empty"),
        ("word_list", {"words": "damn"}, "expected a list"),
        ("word_list", {"words": ["damn"], "measure": "most"}, "expected share or any"),
        ("repetition", {"n": 0}, "expected 1 to 32"),
    ],
)
def test_bad_options_say_what_was_expected(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SHAPING[name].measure("answer", [], {}, options)


def test_options_are_listed_and_penalties_are_known() -> None:
    assert SHAPING["word_list"].options == ["words", "file", "measure"]
    assert SHAPING["compression"].options == ["document", "unit"]
    assert {name for name, part in SHAPING.items() if part.in_child} == {"format"}
    assert {name for name, part in SHAPING.items() if not part.both_ways} == {"format", "contains"}


@given(st.text(max_size=60), st.lists(st.text(max_size=10), max_size=3), st.text(max_size=60))
def test_every_value_is_finite_and_shares_stay_in_range(answer: str, references: list[str], document: str) -> None:
    for name, options in IN_PROCESS.items():
        value = SHAPING[name].measure(answer, references, {"document": document}, options)
        assert isinstance(value, float) and math.isfinite(value) and value >= 0
        assert name == "length" or value <= 1


def test_a_very_long_answer_takes_no_more_than_its_length() -> None:
    """Ten times the text takes about ten times the time, not a hundred times."""

    def seconds(words: int) -> float:
        answer, began = "damn ill will and so on " * (words // 6), time.process_time()
        for name, options in IN_PROCESS.items():
            SHAPING[name].measure(answer, ["not in it at all"], {"document": answer}, options)
        return time.process_time() - began

    seconds(1000)
    assert seconds(120_000) < 40 * max(seconds(12_000), 1e-3)
