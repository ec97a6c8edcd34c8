"""How many workers a run should have: the rule on traces, on a simulated run, and what is shown to it."""

import doctest
from collections.abc import Iterator, Sequence
from itertools import pairwise

import pytest

from rollcast import autoscale
from rollcast.autoscale import GROW_AFTER, SHRINK_AFTER, Bounds, Seen, Size, resize
from rollcast.staffing import LONGEST_WINDOW_S, Staffing

BOUNDS = Bounds(1, 8)


def sizes(start: Size, seen: Sequence[Seen], bounds: Bounds = BOUNDS) -> Iterator[int]:
    for one in seen:
        start = resize(start, one, bounds)
        yield start.workers


def test_the_example_holds() -> None:
    assert doctest.testmod(autoscale).failed == 0


@pytest.mark.parametrize(
    ("waited", "workers", "expected"),
    [(0.06, 2, 3), (0.4, 3, 5), (0.5, 2, 4), (0.9, 2, 4), (1.0, 3, 6), (1.0, 6, 8), (1.0, 8, 8)],
)
def test_a_learner_that_waits_gets_what_would_just_do_and_at_most_the_double(
    waited: float, workers: int, expected: int
) -> None:
    trace = [Seen(waited, 0.0, workers)] * GROW_AFTER
    assert list(sizes(Size(workers), trace)) == [workers] * (GROW_AFTER - 1) + [expected]


def test_one_slow_answer_starts_no_engine() -> None:
    trace = [Seen(0.9, 0.0, 2), Seen(0.03, 0.5, 2)] * 10
    assert set(sizes(Size(2), trace)) == {2}


def test_a_full_buffer_and_no_waiting_cost_one_worker_at_a_time() -> None:
    trace = [Seen(0.0, 1.0, 3)] * SHRINK_AFTER + [Seen(0.0, 1.0, 2)] * SHRINK_AFTER + [Seen(0.0, 1.0, 1)] * 20
    found = list(sizes(Size(3), trace))
    assert found[SHRINK_AFTER - 2 : SHRINK_AFTER + 1] == [3, 2, 2]
    assert found[-20:] == [1] * 20, "never below the fewest"


@pytest.mark.parametrize("seen", [Seen(0.03, 1.0, 2), Seen(0.0, 0.8, 2), Seen(0.0, 0.0, 2)])
def test_between_the_two_a_fleet_stays_as_it_is(seen: Seen) -> None:
    assert set(sizes(Size(2), [seen] * 50)) == {2}


@pytest.mark.parametrize("ready", [1, 3])
def test_while_a_worker_starts_or_leaves_the_learners_waiting_says_nothing(ready: int) -> None:
    assert set(sizes(Size(2), [Seen(1.0, 0.0, ready)] * 10)) == {2}


def test_a_worker_that_finds_no_place_is_given_up_when_it_is_not_missed() -> None:
    assert list(sizes(Size(3), [Seen(0.0, 1.0, 2)] * SHRINK_AFTER))[-1] == 2
    assert set(sizes(Size(3), [Seen(0.0, 1.0, 4)] * 10)) == {3}, "one still leaves"


def test_a_cluster_that_got_smaller_holds_fewer() -> None:
    assert list(sizes(Size(4), [Seen(0.0, 0.0, 4)], Bounds(1, 2))) == [2]
    assert list(sizes(Size(1), [Seen(1.0, 0.0, 1)] * 3, Bounds(0, 1))) == [1, 1, 1]


def simulated(needed: Sequence[float], bounds: Bounds = BOUNDS) -> list[int]:
    """A run whose learner is just kept busy by `needed[step]` workers; they start and leave at once."""
    size, found = Size(1), []
    for need in needed:
        waited = max(1.0 - size.workers / need, 0.0)
        size = resize(size, Seen(waited, 1.0 if size.workers > need else 0.5, size.workers), bounds)
        found.append(size.workers)
    return found


@pytest.mark.parametrize("need", [1.0, 2.9, 3.0, 3.5, 7.8])
def test_a_fleet_finds_its_size_and_stays_there(need: float) -> None:
    found = simulated([need] * 300)
    settled = found[50:]
    smallest = -(-need // 1)
    assert max(settled) - min(settled) <= 1 and min(settled) >= smallest - 1
    assert settled.count(int(smallest)) / len(settled) > 0.9
    changes = [a != b for a, b in pairwise(settled)]
    assert sum(changes) <= 10, "an engine that starts costs minutes"


def test_it_follows_a_need_that_changes() -> None:
    found = simulated([6.0] * 40 + [1.0] * 60 + [4.0] * 40)
    assert found[39] == 6 and found[99] == 1 and found[139] == 4


# ---- what is shown to it


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def steps(staffing: Staffing, clock: Clock, count: int, waits: float, learns: float, full: float) -> int:
    """So many steps of a run; the size after them."""
    for _ in range(count):
        ready = staffing.wanted(False, staffing.size.workers, 8)
        staffing.learner_comes(full)
        clock.now += waits
        staffing.learner_goes(ready)
        clock.now += learns
    return staffing.size.workers


def test_what_counts_is_the_share_of_the_time_since_the_batch_before(clock: Clock) -> None:
    staffing = Staffing(BOUNDS, 1, clock=clock)
    assert steps(staffing, clock, 1, 5.0, 1.0, 0.0) == 1
    assert steps(staffing, clock, 1, 1.0, 0.0, 0.0) == 2
    assert steps(Staffing(BOUNDS, 2, clock=clock), clock, 9, 0.1, 4.0, 0.0) == 2, "2 % is not waiting"
    assert steps(Staffing(Bounds(3, 3), 3, clock=clock), clock, 9, 5.0, 1.0, 0.0) == 3, "a number is a number"


def test_a_wait_without_end_is_seen_before_it_ends(clock: Clock) -> None:
    staffing = Staffing(BOUNDS, 1, clock=clock)
    staffing.learner_comes(0.0)
    for _ in range(GROW_AFTER):
        clock.now += LONGEST_WINDOW_S + 1
        staffing.wanted(False, 1, 8)
    assert staffing.wanted(False, 1, 8) == 2


def test_a_paused_run_rests_only_where_it_may_be_empty_and_comes_back_as_it_was(clock: Clock) -> None:
    for fewest, resting in ((0, 0), (1, 3)):
        staffing = Staffing(Bounds(fewest, 8), 3, rests_after_s=60, clock=clock)
        staffing.learner_comes(0.0)
        assert staffing.wanted(True, 3, 8) == 3
        clock.now += 61
        assert staffing.wanted(True, 3, 8) == resting
        clock.now += 1000
        assert staffing.wanted(False, 0, 8) == 3, "the pause was no waiting"
        clock.now += 5
        staffing.learner_goes(3)
        assert staffing.size.workers == 3
