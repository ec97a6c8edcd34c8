"""The prompt ledger: no group lost, none trained twice, and a journal from which the same state comes back.

A state machine drives a ledger and an independent model of it through leases, results, deadlines, losses, training
and crashes in any order.
"""

import json
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from rollcast.ledger import Lease, Ledger

LEASE_S = 30.0
MAX_ATTEMPTS = 3


class Clock:
    """Time that passes when told."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def ledger(tmp_path: Path, clock: Clock) -> Ledger:
    return Ledger(tmp_path / "ledger.jsonl", LEASE_S, MAX_ATTEMPTS, clock=clock)


def counts(ledger: Ledger) -> tuple[int, int, int, int]:
    """(pending, leased, done, failed)"""
    found = ledger.counts()
    return found["pending"], found["leased"], found["done"], found["failed"]


def events(tmp_path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (tmp_path / "ledger.jsonl").read_text().splitlines() if line]


def test_a_group_goes_from_lease_to_done(ledger: Ledger, tmp_path: Path, clock: Clock) -> None:
    lease = ledger.lease(worker=4)
    assert lease == Lease(id=lease.id, group=0, worker=4, deadline=clock.now + LEASE_S, attempt=1)
    assert counts(ledger) == (0, 1, 0, 0) and ledger.outstanding == ledger.leased_to(4) == 1
    assert ledger.accept(lease) and ledger.leased_to(4) == 0 and ledger.outstanding == 1
    ledger.trained([0], step=1)
    assert counts(ledger) == (0, 0, 1, 0) and ledger.outstanding == 0
    assert [row["event"] for row in events(tmp_path)] == ["lease", "done"]


def test_a_late_result_is_refused_and_the_work_is_done_again(ledger: Ledger, clock: Clock) -> None:
    late = ledger.lease(worker=0)
    clock.now += LEASE_S - 0.001
    assert ledger.expire() == []
    clock.now += 0.001
    assert ledger.expire() == [late] and counts(ledger) == (1, 0, 0, 0)
    again = ledger.lease(worker=1)
    assert (again.group, again.attempt) == (late.group, 2)
    assert not ledger.accept(late)
    assert ledger.accept(again) and not ledger.accept(again), "and neither is it taken twice"
    ledger.trained([again.group], 1)
    with pytest.raises(KeyError):
        ledger.trained([again.group], 2)


def test_a_result_before_anybody_looked_at_the_clock_still_counts(ledger: Ledger, clock: Clock) -> None:
    lease = ledger.lease(worker=0)
    clock.now += 10 * LEASE_S
    assert ledger.accept(lease) and ledger.expire() == []


def test_a_lost_worker_gives_back_its_own_leases_only(ledger: Ledger) -> None:
    mine, other = ledger.lease(worker=0), ledger.lease(worker=1)
    held = ledger.lease(worker=0)
    ledger.accept(held)
    assert ledger.release_worker(0) == [mine] and ledger.release_worker(0) == []
    assert counts(ledger) == (1, 2, 0, 0), "what it has delivered stays"
    assert ledger.lease(worker=2).group == mine.group
    assert ledger.accept(other)


def test_what_a_leaving_worker_hands_back_was_no_try(ledger: Ledger, tmp_path: Path) -> None:
    for _ in range(2 * MAX_ATTEMPTS):
        lease, other = ledger.lease(0), ledger.lease(1)
        assert (lease.group, lease.attempt) == (0, 1)
        assert ledger.hand_back(0) == [lease] and ledger.hand_back(0) == []
        assert not ledger.accept(lease), "it may still be on its way"
        assert ledger.accept(other)
        ledger.put_back(other.group, "stale")
        assert counts(ledger) == (2, 0, 0, 0)
    ledger.flush()
    assert {"event": "return", "group": 0, "why": "worker left"} in events(tmp_path)


def test_three_lost_attempts_fail_a_group(ledger: Ledger, tmp_path: Path) -> None:
    for attempt in range(1, MAX_ATTEMPTS + 1):
        assert (ledger.lease(attempt).group, counts(ledger)) == (0, (0, 1, 0, 0))
        ledger.release_worker(attempt)
    assert counts(ledger) == (0, 0, 0, 1) and ledger.lease(9).group == 1
    ledger.flush()
    assert events(tmp_path)[-2] == {"event": "failed", "group": 0, "why": "worker lost 3 times"}


def test_a_stale_group_may_be_played_again_as_often_as_it_takes(ledger: Ledger) -> None:
    for _ in range(2 * MAX_ATTEMPTS):
        lease = ledger.lease(0)
        assert lease.group == 0 and lease.attempt == 1
        ledger.accept(lease)
        ledger.put_back(0, "stale")
    assert counts(ledger) == (1, 0, 0, 0)


def test_resuming_at_a_step_rolls_later_training_back(tmp_path: Path) -> None:
    journal = tmp_path / "ledger.jsonl"
    ledger = Ledger(journal, LEASE_S, MAX_ATTEMPTS)
    for step in (1, 2, 3):
        for lease in [ledger.lease(0), ledger.lease(0)]:
            ledger.accept(lease)
            ledger.trained([lease.group], step)
    ledger.lease(0)
    ledger.close()
    resumed = Ledger.resume(journal, LEASE_S, MAX_ATTEMPTS, step=2)
    assert counts(resumed) == (3, 0, 4, 0)
    assert [resumed.lease(0).group for _ in range(4)] == [4, 5, 6, 7]
    resumed.close()
    # The rollback is in the journal: training that was undone does not come back at a higher step.
    assert counts(Ledger.resume(journal, LEASE_S, MAX_ATTEMPTS, step=9)) == (4, 0, 4, 0)


@pytest.mark.parametrize("torn", ['{"event": "do', '{"event": "done", "group": 5, "step": 1', "\0\0\0", "\n"])
def test_a_torn_last_line_costs_only_itself(tmp_path: Path, torn: str) -> None:
    journal = tmp_path / "ledger.jsonl"
    ledger = Ledger(journal, LEASE_S, MAX_ATTEMPTS)
    for step in (1, 2):
        ledger.accept(ledger.lease(0))
        ledger.trained([step - 1], step)
    ledger.close()
    with journal.open("a") as file:
        file.write(torn)
    resumed = Ledger.resume(journal, LEASE_S, MAX_ATTEMPTS, step=1)
    assert counts(resumed) == (1, 0, 1, 0)
    resumed.close()
    # What was written after the torn line is whole: the rollback above was not glued to it.
    assert counts(Ledger.resume(journal, LEASE_S, MAX_ATTEMPTS, step=2)) == (1, 0, 1, 0)


def test_a_run_without_a_journal_starts_at_group_0(tmp_path: Path) -> None:
    ledger = Ledger.resume(tmp_path / "ledger.jsonl", LEASE_S, MAX_ATTEMPTS, step=0)
    assert counts(ledger) == (0, 0, 0, 0) and ledger.lease(0).group == 0


def test_what_was_trained_is_on_disk_at_once(ledger: Ledger, tmp_path: Path) -> None:
    lease = ledger.lease(0)
    ledger.accept(lease)
    ledger.trained([lease.group], 1)
    assert counts(Ledger.resume(tmp_path / "ledger.jsonl", LEASE_S, MAX_ATTEMPTS, 1)) == (0, 0, 1, 0)


class LedgerMachine(RuleBasedStateMachine):
    """A ledger beside a model that is nothing but sets."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.TemporaryDirectory()
        self.journal = Path(self.folder.name) / "ledger.jsonl"
        self.clock = Clock()
        self.ledger = Ledger(self.journal, LEASE_S, MAX_ATTEMPTS, clock=self.clock)
        self.step = 0
        self.issued = 0
        self.pending: set[int] = set()
        self.failed: set[int] = set()
        self.held: set[int] = set()
        self.trained_at: dict[int, int] = {}
        self.live: dict[int, Lease] = {}
        self.dead: list[Lease] = []

    def teardown(self) -> None:
        self.ledger.close()
        self.folder.cleanup()

    @rule(worker=st.integers(0, 2))
    def lease(self, worker: int) -> None:
        lease = self.ledger.lease(worker)
        assert lease.group in (self.pending or {self.issued}), "what is pending goes first, then a new group"
        self.pending.discard(lease.group)
        self.issued = max(self.issued, lease.group + 1)
        assert 1 <= lease.attempt <= MAX_ATTEMPTS
        self.live[lease.id] = lease

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def deliver(self, data: st.DataObject) -> None:
        lease = self.live.pop(data.draw(st.sampled_from(sorted(self.live))))
        assert self.ledger.accept(lease)
        self.held.add(lease.group)
        self.dead.append(lease)

    @precondition(lambda self: self.dead)
    @rule(data=st.data())
    def deliver_late_or_twice(self, data: st.DataObject) -> None:
        assert not self.ledger.accept(data.draw(st.sampled_from(self.dead)))

    @rule(seconds=st.sampled_from([1.0, LEASE_S / 2, LEASE_S]))
    def time_passes(self, seconds: float) -> None:
        self.clock.now += seconds
        late = [lease for lease in self.live.values() if lease.deadline <= self.clock.now]
        assert self.ledger.expire() == late
        self._lose(late)

    @rule(worker=st.integers(0, 2))
    def worker_dies(self, worker: int) -> None:
        lost = [lease for lease in self.live.values() if lease.worker == worker]
        assert self.ledger.release_worker(worker) == lost and self.ledger.leased_to(worker) == 0
        self._lose(lost)

    def _lose(self, leases: list[Lease]) -> None:
        for lease in leases:
            del self.live[lease.id]
            self.dead.append(lease)
            (self.failed if lease.attempt == MAX_ATTEMPTS else self.pending).add(lease.group)

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def train(self, data: st.DataObject) -> None:
        groups = data.draw(st.lists(st.sampled_from(sorted(self.held)), unique=True, min_size=1))
        self.step += 1
        self.ledger.trained(groups, self.step)
        for group in groups:
            assert group not in self.trained_at, "trained twice"
            self.held.remove(group)
            self.trained_at[group] = self.step

    @precondition(lambda self: self.held)
    @rule(data=st.data(), again=st.booleans())
    def give_up_or_put_back(self, data: st.DataObject, again: bool) -> None:
        group = data.draw(st.sampled_from(sorted(self.held)))
        self.held.remove(group)
        (self.ledger.put_back if again else self.ledger.fail)(group, "because")
        (self.pending if again else self.failed).add(group)

    @rule(data=st.data(), flushed=st.booleans(), torn=st.sampled_from(["", '{"event": "don', "\0"]))
    def crash_and_resume(self, data: st.DataObject, flushed: bool, torn: str) -> None:
        if flushed:
            self.ledger.flush()
        survived = self.journal.read_text()
        self.ledger.close()
        self.journal.write_text(survived + torn)
        self.step = data.draw(st.integers(0, self.step), label="checkpoint")
        self.ledger = Ledger.resume(self.journal, LEASE_S, MAX_ATTEMPTS, self.step)
        self.ledger._clock = self.clock
        if not flushed:  # Groups and failures that only memory knew are as if they had never been.
            self._forget_unwritten(survived)
        self.trained_at = {g: step for g, step in self.trained_at.items() if step <= self.step}
        self.live, self.held, self.dead = {}, set(), []
        self.pending = set(range(self.issued)) - self.trained_at.keys() - self.failed

    @rule(data=st.data())
    def roll_back(self, data: st.DataObject) -> None:
        """A learner died: the ledger stays, and stands where a resume would; results on their way are late."""
        self.step = data.draw(st.integers(0, self.step), label="checkpoint")
        self.ledger.roll_back(self.step)
        self.trained_at = {g: step for g, step in self.trained_at.items() if step <= self.step}
        self.dead += self.live.values()
        self.live, self.held = {}, set()
        self.pending = set(range(self.issued)) - self.trained_at.keys() - self.failed

    def _forget_unwritten(self, survived: str) -> None:
        rows = [json.loads(line) for line in survived.splitlines() if line.endswith("}")]
        self.issued = max((row["group"] for row in rows), default=-1) + 1
        self.failed &= {row["group"] for row in rows if row["event"] == "failed"}

    @invariant()
    def every_group_is_in_exactly_one_place(self) -> None:
        leased = {lease.group for lease in self.live.values()}
        places = [self.pending, leased, self.held, self.trained_at.keys(), self.failed]
        assert sum(map(len, places)) == len(set().union(*places)) == self.issued
        expected = tuple(map(len, (self.pending, leased | self.held, self.trained_at, self.failed)))
        assert counts(self.ledger) == expected
        assert self.ledger.outstanding == len(leased) + len(self.held)


LedgerMachine.TestCase.settings = settings(
    max_examples=60, stateful_step_count=40, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
TestLedgerMachine = LedgerMachine.TestCase


def test_a_lease_of_another_life_is_refused(tmp_path: Path) -> None:
    journal = tmp_path / "ledger.jsonl"
    first = Ledger(journal, LEASE_S, MAX_ATTEMPTS)
    first.lease(0)
    old = first.lease(0)
    first.close()
    resumed = Ledger.resume(journal, LEASE_S, MAX_ATTEMPTS, 0)
    resumed.lease(0)
    new = resumed.lease(1)
    assert new.id == old.id and not resumed.accept(old)
    assert resumed.accept(replace(new))
