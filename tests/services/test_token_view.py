"""Samples token by token: the columns fall on the right tokens, in the terminal and on a page that stands alone."""

import io
from html.parser import HTMLParser
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from rollcast.records import learned_of, record
from rollcast.token_view import SeenToken, samples_of, show, to_page
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


def test_columns_fall_on_the_sampled_tokens_and_the_rest_stands_between() -> None:
    (sample,) = samples_of([recorded()], chr)
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


def test_the_table_tells_every_token() -> None:
    out = io.StringIO()
    show(samples_of([recorded()], chr), 7, Console(file=out, width=140))
    text = out.getvalue()
    assert "step 7, sample 0.3: reward 1.000" in text
    rows = {
        line.split()[0]: line.split()[1:] for line in text.splitlines() if line.strip() and line.split()[0] in "C<E"
    }
    assert rows["C"][:7] == ["0", "-1.000", "-1.500", "0.607", "0.100", "+0.500", "+0.500"]
    assert rows["<"][-1] == "-" and "▼" * 8 in rows["E"]


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
    page = to_page(samples_of([recorded()], chr), 7, "<script>run")
    parser = Strict()
    parser.feed(page)
    assert parser.open == [] and not {"script", "src", "href", "link"} & set(parser.seen)
    assert "&lt;script&gt;run" in page and ">&lt;</b>" in page and 'title="version 0, sampled -1.000' in page
    assert page.count("<tr>") == 1 + 3
