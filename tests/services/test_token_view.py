"""Samples token by token: the columns fall on the right tokens, in the terminal and on a page that stands alone."""

import io
from collections.abc import Sequence
from html.parser import HTMLParser
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from rollcast.records import learned_of, record
from rollcast.token_page import to_page
from rollcast.token_view import SeenToken, largest_push, percent, samples_of, show
from rollcast_learners.types import TokenDetails
from trajectories import episode

TWO_TURNS = episode(
    [[([65, 66], False), ([67, 60], True), ([68], False), ([69], True)]],
    [0.0, 1.0],
    number=3,
    logprobs=[[-1.0, -2.0, -3.0]],
)


def details(index: int = 0, push: tuple[float, ...] = (0.5, 0.0, -1.0)) -> TokenDetails:
    columns = [np.array(values, np.float32) for values in ((-1.5, -1.0, -3.0), (0.1, 0.2, 0.3), (0.5, 0.5, -1.0), push)]
    return TokenDetails(np.array([index], np.int32), np.array([3], np.int32), *columns)


def recorded() -> dict[str, Any]:
    return record(TWO_TURNS, learned_of([details()])[0])


def spelt(ids: Sequence[int]) -> str:
    """A tokenizer whose tokens are bytes."""
    return bytes(ids).decode("utf-8", errors="replace")


def test_columns_fall_on_the_sampled_tokens_and_the_rest_stands_between() -> None:
    (sample,) = samples_of([recorded()], spelt)
    asked, first, second, told, last = sample.parts
    assert (asked, told) == ("AB", "D") and sample.name == "0.3" and sample.reward == 1.0
    assert first == SeenToken("C", 0, -1.0, -1.5, pytest.approx(0.1), 0.5, 0.5)  # type: ignore[arg-type]
    assert isinstance(second, SeenToken) and second.left_out and second.ratio == pytest.approx(np.e)
    assert isinstance(last, SeenToken) and last.push == -1.0 and not last.left_out


def test_episodes_are_found_by_their_place_in_the_step() -> None:
    both = TokenDetails(
        np.array([2, 0], np.int32), np.array([1, 2], np.int32), *(np.arange(3, dtype=np.float32) for _ in range(4))
    )
    found = learned_of([both, details(index=1)])
    assert found[2]["push"] == [0.0] and found[0]["push"] == [1.0, 2.0] and found[1]["logprobs"] == [-1.5, -1.0, -3.0]


def test_what_is_not_finite_is_written_as_zero() -> None:
    assert learned_of([details(push=(float("nan"), float("inf"), 1.0))])[0]["push"] == [0.0, 0.0, 1.0]


def test_a_character_of_several_tokens_is_told_at_its_end() -> None:
    played = episode([[([0xE6, 0x9D, 0xB1], False), ([0xE4, 0xBA, 0xAC], True)]], [1.0], logprobs=[[-1.0, -2.0, -3.0]])
    (sample,) = samples_of([record(played, learned_of([details()])[0])], spelt)
    assert sample.asked == "東" and [token.text for token in sample.tokens] == ["⋯", "⋯", "京"]
    noise = episode([[([65], False), ([0xE4, 0xE4, 67], True)]], [1.0], logprobs=[[-1.0, -2.0, -3.0]])
    (sample,) = samples_of([record(noise, learned_of([details()])[0])], spelt)
    assert [token.text for token in sample.tokens] == ["⋯", "⋯", "��C"]


def test_probabilities_are_told_in_percent() -> None:
    assert [percent(value) for value in (0.0, -0.693147, -6.9, -20.0)] == ["100.0", "50.0", "0.1", "2e-07"]


def test_colours_end_where_all_but_the_strongest_pushes_do() -> None:
    (sample,) = samples_of([recorded()], spelt)
    assert largest_push([sample]) == 0.5 and largest_push([]) == 0.0


def test_the_table_tells_every_token() -> None:
    out = io.StringIO()
    show(samples_of([recorded()], spelt), 7, Console(file=out, width=140))
    text = out.getvalue()
    assert "step 7, sample 0.3: reward 1.000 · 3 tokens (1 up, 1 down) · policy version 0" in text
    rows = {
        line.split()[0]: line.split()[1:] for line in text.splitlines() if line.strip() and line.split()[0] in "C<E"
    }
    assert rows["C"][:6] == ["36.8", "22.3", "0.607", "0.100", "+0.500", "+0.500"]
    assert rows["<"][-2:] == ["left", "out"] and "▼" * 8 in rows["E"]


class Strict(HTMLParser):
    """Tags must close in order."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[str] = []

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.seen += [tag, *(name for name, _ in attrs)]
        if tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_stands_alone_and_nothing_a_policy_says_is_markup() -> None:
    page = to_page(samples_of([recorded()], spelt), 7, "<script>run")
    parser = Strict()
    parser.feed(page)
    assert parser.open == [] and not {"script", "src", "href", "link"} & set(parser.seen)
    assert (
        "&lt;script&gt;run" in page and ">&lt;</span>" in page and 'data-t="C    sampled 36.8 %   policy 22.3 %' in page
    )
    assert page.count("<tr>") == 1 + 3 and "url(" not in page and "@import" not in page


def test_samples_of_one_prompt_stand_below_it_and_blanks_can_be_seen() -> None:
    said = episode([[([65, 66], False), ([10, 9], True)]], [2.0], number=4, logprobs=[[-1.0, -2.0]])
    other = record(said, {name: [0.1, 0.2] for name in ("logprobs", "values", "advantages", "push")})
    page = to_page(samples_of([recorded(), other | {"group": recorded()["group"]}], spelt), 7, "run")
    assert page.count('<div class="asked">AB</div>') == 1 and page.count("best of its group") == 1
    assert ">⏎\n</span>" in page and ">⇥\t</span>" in page and "<td>⏎</td>" in page
    assert page.count('<div class="asked">') == 1 and "<i>D</i>" in page, "what is said in between is told"
