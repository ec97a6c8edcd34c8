"""What is best, what a name means, and text while it grows: the pure parts of the live policy."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rollcast.live.texts import GrowingText
from rollcast.live.versions import NoSuchPolicy, Releases, aliases, engine_for


def test_the_gate_promotes_and_counts_once() -> None:
    releases = Releases().passed_gate(3).passed_gate(3)
    assert releases == Releases(best=3, gate=3)
    assert releases.passed_gate(5) == Releases(best=5, previous=(3,), gate=5)


def test_what_was_rolled_back_stays_so_until_evaluation_finds_a_better_one() -> None:
    releases = Releases().passed_gate(3).passed_gate(5).rollback()
    assert (releases.best, releases.previous) == (3, ())
    assert releases.passed_gate(5).best == 3, "the gate says the same again"
    assert releases.passed_gate(8).best == 8
    with pytest.raises(NoSuchPolicy, match="no best policy of before"):
        releases.rollback()


def test_a_rollback_can_name_its_target() -> None:
    releases = Releases().promote(1).promote(2).promote(3)
    assert releases.previous == (1, 2) and releases.rollback(1).best == 1
    with pytest.raises(NoSuchPolicy, match=r"7 was not the best one before; 1, 2 can"):
        releases.rollback(7)


@given(st.lists(st.one_of(st.integers(0, 9), st.just("back")), max_size=30))
def test_whatever_is_chosen_the_best_one_is_kept_and_listed_once(choices: list[int | str]) -> None:
    releases = Releases()
    for choice in choices:
        if isinstance(choice, int):
            releases = releases.promote(choice)
            assert releases.best == choice
        elif releases.previous:
            back = releases.previous[-1]
            releases = releases.rollback()
            assert releases.best == back
        assert len(set(releases.kept)) == len(releases.kept) <= 5


def test_names() -> None:
    assert aliases(7, 5) == {"latest": 7, "best": 5, "candidate": 7}
    assert aliases(7, 7) == {"latest": 7, "best": 7} and aliases(7, None) == {"latest": 7}
    resident = aliases(7, 5)
    assert [engine_for(asked, resident, 0.0, 0.0) for asked in ("latest", "candidate", "7", "best", "5")] == [
        *("latest", "latest", "latest", "best", "best")
    ]


def test_a_canary_gets_its_share_of_best_alone() -> None:
    draw, resident = random.Random(0), aliases(7, 5)
    chosen = [engine_for("best", resident, 0.2, draw.random()) for _ in range(5000)]
    assert 0.18 < chosen.count("latest") / 5000 < 0.22
    assert engine_for("5", resident, 1.0, 0.0) == "best", "a pin is no share"
    assert engine_for("best", aliases(5, 5), 1.0, 0.0) == "best", "there is no candidate"


def decode(ids: object) -> str:
    return bytes(ids).decode("utf-8", "replace")  # type: ignore[call-overload]


def grown(content: bytes, *stops: str) -> tuple[list[str], GrowingText]:
    text = GrowingText(decode, stops)
    pieces = [text.add(token) for token in content]
    return [*pieces, text.finish()], text


def test_characters_leave_whole() -> None:
    pieces, _ = grown("aß€😀".encode())
    assert [piece for piece in pieces if piece] == ["a", "ß", "€", "😀"]


def test_an_unfinished_character_leaves_at_the_end() -> None:
    assert "".join(grown("a€".encode()[:-1])[0]) == "a\ufffd"
    assert len("".join(grown(b"\xff" * 64)[0])) == 64, "nor does garbage wait for ever"


@given(st.text(alphabet="abß", max_size=30), st.lists(st.text(alphabet="abß", min_size=1, max_size=4), max_size=3))
def test_nothing_of_a_stop_text_ever_leaves(said: str, stops: list[str]) -> None:
    pieces, text = grown(said.encode(), *stops)
    first = min([said.find(stop) for stop in stops if stop in said], default=None)
    told = "".join(pieces)
    assert text.ended == (first is not None) and told == text.text
    assert not any(stop in told for stop in stops)
    if first is None:
        assert told == said
    else:  # Of two that begin at once, the one that is complete first counts.
        assert said.startswith(told)
